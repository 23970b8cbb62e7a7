"""The `trt` target as far as it goes without TensorRT: what is refused, the builder's graph, the metadata."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from export.errors import ContractError, EnvironmentLacksError
from pipeline import compiler
from pipeline.backends import BACKENDS
from pipeline.backends.base import MODEL
from pipeline.backends.tensorrt import plugin_payloads
from pipeline.backends.tensorrt.plugin_graph import KernelNode
from pipeline.backends.trt import build as trt_build
from pipeline.backends.trt import engine as trt_engine
from pipeline.recipe import Calibrate, Recipe
from plugins.gpu.spec import QuantizeSpec
from plugins.tensorrt.payload import Payload, from_text
from tests.kernels.test_trt_aot import payload_of
from tests.support.rtx_models import block

RECIPE = Recipe("t", "zoo:pixart_mini")
WIDTH = 128


@pytest.fixture
def lowered(tmp_path: Path):
    portable = tmp_path / "portable.onnx"
    onnx.save(block(WIDTH, group_size=64), portable, save_as_external_data=True, location="portable.onnx.data")
    (tmp_path / "work").mkdir()
    return BACKENDS["trt"].lower(portable, tmp_path / "work", RECIPE)


def test_the_target_is_named_and_not_automatic(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiler.parse_targets("cpu,trt") == ("cpu", "trt")
    assert "trt" not in compiler.parse_targets("auto")


def test_without_tensorrt_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.machine.find_spec", lambda name: None if name == "tensorrt" else object())
    (problem,) = BACKENDS["trt"].problems(RECIPE)
    assert problem == "target trt needs tensorrt; install with: pip install tensorrt"
    with pytest.raises(EnvironmentLacksError, match="running the target trt needs tensorrt"):
        BACKENDS["trt"].load(Path("bundle"))


@pytest.mark.parametrize(
    ("version", "sm", "text"),
    [
        ("10.8.0.43", 90, "tensorrt 10.9 or newer, this is 10.8.0.43"),
        ("11.1.0.106", 0, "is built on the NVIDIA GPU that it is for, and none is visible"),
        ("11.1.0.106", 103, "not compiled for SM 103"),
    ],
)
def test_what_else_is_missing_is_named(version: str, sm: int, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.machine.find_spec", lambda name: object())
    monkeypatch.setattr("pipeline.machine.tool_version", lambda name: version)
    (problem,) = trt_engine.environment_problems(sm)
    assert text in problem


def test_nothing_is_missing_with_a_new_release_and_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr("pipeline.machine.find_spec", lambda name: object())
    monkeypatch.setattr("pipeline.machine.tool_version", lambda name: "11.1.0.106")
    monkeypatch.setattr("pipeline.machine.cuda_sm", lambda: 90)
    assert BACKENDS["trt"].problems(RECIPE) == []
    (problem,) = BACKENDS["trt"].problems(replace(RECIPE, calibrate=Calibrate(method="msfp")))
    assert "calibrate.method msfp scales activations per_tensor" in problem


def test_the_builders_graph_has_ahead_of_time_plugins(lowered, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def compiled(kernel: str, spec: object, rows: tuple[int, ...], sms: tuple[int, ...], form: str) -> Payload:
        asked.append((sms, form))
        return payload_of(kernel, spec)

    monkeypatch.setattr(plugin_payloads, "compile_payload", compiled)
    with trt_build.builders_graph(lowered.path, 1, 90) as (path, nodes):
        graph = onnx.load(path, load_external_data=False).graph
    assert not path.exists()
    plugins = {node.name: node for node in graph.node if node.name in {n.name for n in nodes}}
    assert len(plugins) == 8 and plugins["ff.up"].op_type == "PackedGemmMultipliers"
    merged = plugins["attn.to_q+attn.to_k+attn.to_v"]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in merged.attribute}
    assert (attributes["plugin_namespace"], attributes["plugin_version"], attributes["aot"]) == (b"fpq", b"1", 1)
    assert b".visible .entry packed_gemm" in from_text(attributes["payload"].decode()).variants[0].code
    assert set(asked) == {((90,), "ptx")} and len(asked) == 8  # q, k and v are one kernel, and one launch
    assert trt_build.described(lowered, nodes)["plugins"]["packed_gemm"] == 4
    assert "without TensorRT at hand" in trt_build.described(lowered, nodes)["proof"]


def test_probes_are_in_the_lowered_graph(lowered) -> None:
    assert lowered.path.name == MODEL and len(lowered.probes) == 6


NODES = [KernelNode(name, "quantize", QuantizeSpec("E2M3", 64), (1, 2, 3)) for name in ("ff.down", "ff.down/quantize")]


@pytest.mark.parametrize("form", [lambda name: {"Name": name, "LayerType": "PluginV3"}, str], ids=["details", "names"])
def test_a_plugin_that_is_not_among_the_engines_layers_is_named(form) -> None:
    both = json.dumps({"Layers": [form(node.name) for node in NODES], "I/O Tensors": []})
    assert trt_build.layer_names(both) == {"ff.down", "ff.down/quantize"}
    trt_build.check_layers(both, NODES)
    with pytest.raises(ContractError, match=r"^ff.down: the engine has no layer"):  # though its quantizer's name has it
        trt_build.check_layers(json.dumps({"Layers": [form("ff.down/quantize")]}), NODES)


@pytest.mark.parametrize("text", ["", "[]", '{"Bindings": []}', '{"Layers": [{"Type": "x"}]}'])
def test_a_list_of_layers_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ContractError, match="cannot be read"):
        trt_build.check_layers(text, NODES)


@pytest.mark.parametrize(
    ("version", "sm", "text"),
    [
        ("", 90, "pip install tensorrt"),
        ("11.1.0", 0, "none is visible"),
        ("11.1.0", 89, "built on a GPU of SM [90], this one is SM 89"),
        ("11.2.0", 90, "install that release"),
        ("11.1.9", 90, ""),
    ],
)
def test_which_machines_run_an_engine(version: str, sm: int, text: str) -> None:
    problem = trt_engine.machine_problem({"tensorrt": "11.1.0", "compute_capabilities": [90]}, version, sm)
    assert (text in problem) if text else problem is None
