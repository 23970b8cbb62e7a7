"""The `cpu` target from portable file to running engine: bytes, streaming, lowering.json, refusals of its reader."""

import json
import subprocess
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from export.errors import ContractError, EnvironmentLacksError
from pipeline import machine
from pipeline.backends import BACKENDS, lowering_file
from pipeline.backends.base import LoweredGraph
from pipeline.backends.cpu import CpuBackend, CpuOptions
from pipeline.backends.cpu.engine import open_session
from pipeline.recipe import Recipe
from tests.support import native
from tests.support.hooked_sessions import hooked
from tests.support.portable import activations, portable, random_linear

RECIPE = Recipe("test", "none").with_options(CpuOptions("stock"))
BODY = """
  h = fpq.QuantizedLinear <layer="a"> (x)
  y = fpq.QuantizedLinear <layer="b"> (h)
"""


@pytest.fixture
def source(tmp_path):
    """Folder with a portable model of two linears; model.onnx with its weights outside."""
    layers = [random_linear("a", n=64, granularity="exact_group", group=16), random_linear("b", n=32, seed=1)]
    model = portable(BODY, layers, "float[B,S,64] x", "float[B,S,32] y")
    folder = tmp_path / "bundle"
    folder.mkdir()
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=0)
    return folder


def built(source, name="cpu", recipe=RECIPE):
    backend = CpuBackend()
    work = source.parent / f"work-{name}"
    work.mkdir()
    (source / name).mkdir()
    return backend.build(backend.lower(source / "model.onnx", work, recipe), source / name, recipe)


def test_an_engine_runs_and_agrees_with_the_portable_model(source):
    result = built(source)
    assert all((source / file).is_file() for file in result.files)
    engine = BACKENDS["cpu"].load(source)
    x = activations(np.random.default_rng(0))[:, 3:]
    output = engine.run({"x": x})["y"]
    expected = open_session(source / "model.onnx").run(None, {"x": x})[0]
    engine.close()
    # One code of the second linear may flip where float32 sums differ in their last bit.
    assert np.linalg.norm(output - expected) <= 1e-2 * np.linalg.norm(expected)


def test_the_same_portable_model_gives_the_same_bytes(source):
    built(source)
    built(source, "again")
    for name in ("model.onnx", "model.onnx.data"):
        assert (source / "cpu" / name).read_bytes() == (source / "again" / name).read_bytes()


def test_weights_are_int8_and_outside_of_the_graph(source):
    built(source)
    graph = onnx.load(source / "cpu" / "model.onnx", load_external_data=False).graph
    image = next(item for item in graph.initializer if item.name == "a.image")
    assert image.data_type == onnx.TensorProto.INT8 and image.data_location == onnx.TensorProto.EXTERNAL
    assert not {item.name for item in graph.initializer} & {"a.codes", "a.scales", "a.multipliers"}


def test_lowering_json_gives_back_what_was_written(source):
    result = built(source)
    graph = lowering_file.read(source / "cpu" / "lowering.json")
    assert graph.probes == result.lowered.probes and graph.choices == result.lowered.choices
    assert graph.path == source / "cpu" / "model.onnx"
    assert {choice.layer for choice in graph.choices} == {"a", "b"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"schema_version": 99}, "schema version 99"),
        ({"probes": [{"layer": "a"}]}, "'probes.0.path' is missing"),
        (None, "not valid JSON"),
    ],
)
def test_a_damaged_lowering_file_is_refused(tmp_path, change, message):
    path = tmp_path / "lowering.json"
    lowering_file.write(LoweredGraph(tmp_path / "model.onnx", (), ()), path)
    path.write_text("{" if change is None else json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ContractError, match=message):
        lowering_file.read(path)


@pytest.mark.parametrize("weight, requires", [("INT4", []), ("INT8", ["int32_dot_product"])])
def test_an_engine_that_would_saturate_elsewhere_is_refused_there(tmp_path, monkeypatch, weight, requires):
    model = portable('y = fpq.QuantizedLinear <layer="a"> (x)', [random_linear(weight=weight, activation="INT8")])
    folder = tmp_path / "bundle"
    folder.mkdir()
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
    monkeypatch.setattr(machine, "cpu_flags", lambda: ("avx512_vnni",))
    assert built(folder).metadata == {"requires": requires}
    CpuBackend().load(folder).close()
    monkeypatch.setattr(machine, "cpu_flags", lambda: ("avx2",))
    if requires:
        with pytest.raises(EnvironmentLacksError, match="int32_dot_product"):
            CpuBackend().load(folder)
    else:
        CpuBackend().load(folder).close()


@pytest.mark.process
def test_running_needs_no_compiler(source):
    built(source)
    code = (
        "import sys; from pathlib import Path; from pipeline.backends import BACKENDS;"
        f"BACKENDS['cpu'].load(Path({str(source)!r})); print('onnx_ir' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"]


def test_targets_are_listed_without_importing_them():
    assert {"cpu", "rtx", "cuda"} <= set(BACKENDS)
    with pytest.raises(KeyError):
        BACKENDS["gpu"]


def test_nothing_is_missing_here():
    assert CpuBackend().problems(RECIPE) == []


CROSS = """
  k = fpq.QuantizedLinear <layer="a"> (text)
  h = fpq.QuantizedLinear <layer="b"> (hidden_states)
  y = Add(k, h)
"""


@pytest.fixture
def conditioned(tmp_path):
    """Engine whose first linear reads the condition alone."""
    layers = [random_linear("a"), random_linear("b", seed=1)]
    inputs = "float[B,S,64] hidden_states, float[B,S,64] text"
    folder = tmp_path / "bundle"
    folder.mkdir()
    ir.save(portable(CROSS, layers, inputs), folder / "model.onnx", external_data="model.onnx.data")
    result = built(folder)
    assert "cpu/condition.onnx" in result.files
    engine = CpuBackend().load(folder)
    yield engine, result.lowered.path
    engine.close()


def test_the_condition_is_computed_once_and_again_when_it_changes(conditioned):
    engine, lowered = conditioned
    whole, calls = open_session(lowered), []
    engine.sessions = hooked(engine.sessions, condition=lambda: calls.append(1))
    rng = np.random.default_rng(0)
    text = rng.standard_normal((1, 5, 64)).astype(np.float32)
    for step, expected_calls in enumerate((1, 1, 2, 2, 3)):
        if step == 2:
            text[0, 0, 0] += 1  # the caller overwrites its own array
        if step == 4:
            text = np.concatenate([text, text])
        x = rng.standard_normal(text.shape).astype(np.float32)
        feeds = {"hidden_states": x, "text": text}
        np.testing.assert_array_equal(engine.run(feeds)["y"], whole.run(None, feeds)[0])
        assert len(calls) == expected_calls


TIMES = f"""
  axis = Constant <value_ints = [1]> ()
  column = Unsqueeze(timestep, axis)
  frequencies = Constant <value_floats = {[1.0 / (1 + channel) for channel in range(64)]}> ()
  phase = Mul(column, frequencies)
  wave = Cos(phase)
  shift = fpq.QuantizedLinear <layer="t"> (wave)
  rows = Unsqueeze(shift, axis)
  h = fpq.QuantizedLinear <layer="a"> (hidden_states)
  y = Add(h, rows)
"""


def timed(folder, path):
    """An engine of TIMES in `folder`, as it was built."""
    if path == "fused":
        native.need_compiler()
    layers, inputs = [random_linear("t"), random_linear("a", seed=1)], "float[B,S,64] hidden_states, float[B] timestep"
    folder.mkdir()
    ir.save(portable(TIMES, layers, inputs, inner="float[B,16] shift"), folder / "model.onnx")
    return built(folder, recipe=RECIPE.with_options(CpuOptions(path)))


@pytest.mark.parametrize("path", ["stock", "fused"])
def test_what_reads_the_timestep_alone_is_the_same_bits_for_each_sample(tmp_path, path):
    """In a session of its own where the kernel library computes its products, whose rows stand for themselves."""
    result = timed(tmp_path / "bundle", path)
    assert ("cpu/timestep.onnx" in result.files) == (path == "fused")
    engine = CpuBackend().load(tmp_path / "bundle")
    whole = open_session(result.lowered.path, with_library=path == "fused")
    rng = np.random.default_rng(0)
    for times in ([700, 700, 700], [700, 3, 700], [999], [3, 999, 0, 1, 2, 3, 4, 5, 6]):
        x = rng.standard_normal((len(times), 5, 64)).astype(np.float32)
        feeds = {"hidden_states": x, "timestep": np.array(times, np.float32)}
        np.testing.assert_array_equal(engine.run(feeds)["y"], whole.run(None, feeds)[0])
    engine.close()


def test_a_timestep_part_that_reads_more_is_refused(tmp_path):
    result = timed(tmp_path / "bundle", "fused")
    (tmp_path / "bundle" / "cpu" / "timestep.onnx").write_bytes(result.lowered.path.read_bytes())
    with pytest.raises(
        ContractError, match=r"timestep\.onnx: it reads hidden_states, timestep instead of the timestep"
    ):
        CpuBackend().load(tmp_path / "bundle")
