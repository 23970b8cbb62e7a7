"""The target `onnx`: the portable model as it is handed to people, proven like the others, and used like them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper
from PIL import Image

from export import to_onnx
from export.checkpoint import QuantizedLinear
from export.dialect.graph import inputs_of, outputs_of
from export.errors import ContractError, EnvironmentLacksError
from export.formats.format import get_format
from export.models import load as models
from export.models.load import LoadedModel
from pipeline import __main__ as cli
from pipeline import load, machine
from pipeline import recipe as recipes
from pipeline.backends import BACKENDS, lowering_file
from pipeline.backends.base import Engine
from pipeline.backends.portable import engine as portable_engine
from pipeline.backends.portable.engine import PortableEngine
from pipeline.backends.portable.linears import portable_linears
from pipeline.bench import baselines, contest, peers
from pipeline.bench import measure as bench
from pipeline.bundle import manifest
from pipeline.compiler import BuildRequest, describe, model_row, parse_targets
from pipeline.distance import sqnr_db
from pipeline.recipe import Recipe
from pipeline.verify import proof as verification
from pipeline.verify.effort import Effort, effort_for, note
from pipeline.verify.gates import ROUNDED_DB, coverage_gate, layer_gates
from pipeline.verify.probe import ProbedGraph, decoded_integers
from pipeline.verify.proof import verify_target
from pipeline.verify.report import Report
from pipeline.verify.study import Study, study
from tests.support import learned, tiny
from tests.support.bundles import NOTHING_MEASURED
from tests.support.faults import CROSS_V, FF_OUT, PORTABLE_FAULTS, Fault, Graph, K, Q, V
from tests.support.faults_learned import LEARNED_FAULTS, OUT
from tests.support.hooked_sessions import hooked
from tests.verify.test_planted_faults_learned import learned_layer

pytestmark = pytest.mark.torch

BACKEND = BACKENDS["onnx"]
# Where other targets compare integer sums, this one compares the operands that it multiplies.
GATE = {"gemm_exact": "operands_exact"}
# The layers that faults are planted in.
WATCHED = frozenset({Q, K, V, CROSS_V, FF_OUT, OUT})


@dataclass(frozen=True)
class Exported:
    """A tiny PixArt as a portable model, with the reference's results."""

    model: LoadedModel
    layers: list[QuantizedLinear]
    recipe: Recipe
    portable: Path
    study: Study

    def report(self, portable: Path, engine: Engine | None = None, effort: Effort | None = None) -> Report:
        graph, report = BACKEND.lower(portable, portable.parent, self.recipe), Report()
        verify_target("onnx", self.model, self.layers, graph, engine, self.study, report, effort=effort)
        return report

    def checks(self, portable: Path) -> set[str]:
        """Names of the gates over layers that fail: a few layers, in one step."""
        graph = BACKEND.lower(portable, portable.parent, self.recipe)
        probed, modules = ProbedGraph(graph), {ref.name: ref.module for ref in self.model.linears()}
        watched = [layer for layer in self.layers if layer.name in WATCHED]
        present = [layer for layer in watched if layer.name in probed.complete]
        single = self.study.float32["fp32"]
        steps = self.study.probed[1:2]
        calls = {f"step {step + 1}": self.study.calls[step] for step in steps}
        rows = verification.layer_results("onnx", present, modules, probed, self.study, single, calls, steps)
        gates = [
            coverage_gate("onnx", {row.name for row in present}, [row.name for row in watched]),
            *layer_gates("onnx", rows, 0),
        ]
        return {gate.name.removeprefix("onnx/") for gate in gates if not gate.passed}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Granularity of the weights -> the model; "learned", "mixed": exact groups, and all that methods may learn."""

    @cache
    def make(granularity: str) -> Exported:
        folder = tmp_path_factory.mktemp(granularity)
        model = models.load(str(tiny.folder("pixart", folder)))
        of_methods, of = granularity in ("learned", "mixed"), learned.router()
        layers = tiny.quantized(model, granularity="exact_group" if of_methods else granularity)
        if granularity == "mixed":
            layers = learned.mixed(layers, of)
        if granularity == "learned":
            layers = [learned_layer(layer, i, of, groups=True) for i, layer in enumerate(layers)]
        recipe = recipes.from_dict({"name": "tiny", "model": model.source, "sampling": {"n_steps": 2}}, "test")
        to_onnx.export_portable(model, layers, folder / "model.onnx")
        return Exported(model, layers, recipe, folder / "model.onnx", study(model, layers, recipe))

    return make


# --- proven ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["exact_group", "learned", "mixed"])
def test_the_portable_model_passes_all_gates(kind: str, exported: Any) -> None:
    pixart = exported(kind)
    report = pixart.report(pixart.portable, BACKEND.load(pixart.portable.parent))
    assert report.failures() == []
    values = {gate.name: gate.value for gate in report.gates}
    assert values["onnx/coverage"] == len(pixart.layers) and values["onnx/operands_exact"] == 0
    assert 0 < values["onnx/linear_output"] <= 1 and "onnx/final_psnr_db" in values
    assert "onnx/gemm_exact" not in values, "scaled operands have no integer sum"
    assert any("onnx: gemm_exact compares 0 of" in note for note in report.notes)
    assert any(
        note.startswith("onnx: compared in 2 of 2 steps, linears in 1 of 2 steps, 1 of 4") for note in report.notes
    )


@pytest.mark.parametrize("kind", ["exact_group", "learned", "mixed"])
def test_probe_rows_are_tensors_of_the_graph(kind: str, exported: Any, tmp_path: Path) -> None:
    pixart = exported(kind)
    graph = BACKEND.lower(pixart.portable, tmp_path, pixart.recipe)
    assert ProbedGraph(graph).complete == {layer.name for layer in pixart.layers}
    layers = {layer.name: layer for layer in pixart.layers}
    for row in graph.probes:
        layer = layers[row.layer]
        assert row.output == f"{row.layer}/output" and bool(row.low_rank) is (layer.lora_down is not None)
        assert bool(row.act_scale) is (layer.activation_scale is None)
        assert (row.x in {f"{row.layer}/multiply", f"{row.layer}/offset"}) is False, "x is not balanced yet"
    lowering_file.write(graph, tmp_path / lowering_file.NAME)
    assert lowering_file.read(tmp_path / lowering_file.NAME).probes == graph.probes


def _with(function: Callable[[Any], Any], tensor: str) -> Callable[[Graph], None]:
    return lambda graph: graph.change(tensor, function)


def _first(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Change the first element of an array."""

    def changed(array: Any) -> Any:
        array.flat[0] = change(array.flat[0])
        return array

    return changed


def _attributes(node: str, **choices: Any) -> Callable[[Graph], None]:
    def plant(graph: Graph) -> None:
        proto = graph.node(node)
        kept = [item for item in proto.attribute if item.name not in choices]
        del proto.attribute[:]
        proto.attribute.extend([*kept, *(helper.make_attribute(key, value) for key, value in choices.items())])

    return plant


def _body(function: str, old: str, new: str) -> Callable[[Graph], None]:
    """Another op in a function body: every layer that calls it is wrong."""

    def plant(graph: Graph) -> None:
        body = next(item for item in graph.model.functions if item.name == function)
        nodes = [node for node in body.node if node.op_type == old]
        assert nodes, f"{function} has no {old}"
        for node in nodes:
            node.op_type = new

    return plant


def _unclipped(graph: Graph) -> None:
    """No bound before rounding nor after; tables, the decoder's as well, have room for what then comes."""
    for role, tables in (("quantize", ("negative_codes",)), ("dequantize", ("values",))):
        node = graph.node(f"{FF_OUT}/{role}")
        attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        longer = {name: [*attributes[name], *[attributes[name][-1]] * (256 - len(attributes[name]))] for name in tables}
        bounds = {"max_value": 1e30, "max_code": 255} if role == "quantize" else {}
        _attributes(node.name, **longer, **bounds)(graph)


def _code_beyond_the_table(graph: Graph) -> None:
    _attributes(f"{FF_OUT}/dequantize", values=[0.0, 1.0])(graph)


def _decoder_scale(graph: Graph) -> None:
    """Quantizer and its inverse disagree in the last bits of a static scale."""
    scale = graph.array(f"{K}.activation_scale") * np.float32(1 + 2.0**-20)
    graph.node(f"{K}/dequantize").input[1] = graph.add_constant("another_scale", scale)


def one_of_each_gate(faults: Iterable[Fault]) -> list[Fault]:
    """All of them are planted in tests/verify, for targets that inherit what is wrong in this file."""
    return list({fault.gate: fault for fault in faults}.values())


FAULTS = (
    Fault("one nibble of a code", "operands_exact", _with(_first(lambda code: code ^ 1), f"{K}.codes")),
    Fault("a scale by 2^-20", "operands_exact", _with(_first(lambda scale: scale * (1 + 2.0**-20)), f"{K}.scales")),
    Fault("a bias by a thousandth", "linear_output", _with(_first(lambda bias: bias + 1e-3), f"{K}.bias")),
    Fault("rounding down", "codes_inadmissible", _body("QuantizeActivation", "Round", "Floor")),
    Fault("signs exchanged", "codes_inadmissible", _body("QuantizeActivation", "Less", "Greater")),
    Fault("another table of values", "operands_exact", _attributes(f"{K}/dequantize", values=[0.5] * 64)),
    Fault("scale of another format", "scale_error", _attributes(f"{K}/quantize", max_value=7.0)),
    Fault("weight decoded as another format", "operands_exact", _attributes(f"{K}/weight", values=[1.0] * 16)),
    *one_of_each_gate(fault for fault in PORTABLE_FAULTS if not fault.gate.endswith("_db")),
)
FAULTS_OF_METHODS = (
    Fault("quantizer without clip", "codes_inadmissible", _unclipped),
    Fault("static scale by 2^-20", "operands_exact", _decoder_scale),
    *one_of_each_gate(LEARNED_FAULTS),
)
PLANTED = [("exact_group", fault) for fault in FAULTS] + [("learned", fault) for fault in FAULTS_OF_METHODS]


@pytest.mark.parametrize("kind", ["exact_group", "learned"])
def test_the_watched_layers_are_right_without_a_fault(kind: str, exported: Any) -> None:
    assert exported(kind).checks(exported(kind).portable) == set()


@pytest.mark.parametrize(("kind", "fault"), PLANTED, ids=lambda item: getattr(item, "name", ""))
def test_a_fault_in_a_linear_of_the_file_is_caught(kind: str, fault: Fault, exported: Any, tmp_path: Path) -> None:
    graph = Graph(exported(kind).portable)
    fault.plant(graph)
    graph.save(tmp_path / "model.onnx")
    assert GATE.get(fault.gate, fault.gate) in exported(kind).checks(tmp_path / "model.onnx")


@pytest.mark.parametrize("name", ["skipped block", "attention scale"])
def test_a_fault_between_linears_of_the_file_is_caught(name: str, exported: Any, tmp_path: Path) -> None:
    pixart, fault = exported("exact_group"), next(fault for fault in PORTABLE_FAULTS if fault.name == name)
    graph = Graph(pixart.portable)
    fault.plant(graph)
    graph.save(tmp_path / "model.onnx")
    effort = Effort((0, 1), pixart.study.probed[-1:], 0, special=(1,), inside=(), state=False)
    failed = {gate.name for gate in pixart.report(tmp_path / "model.onnx", effort=effort).failures()}
    assert f"onnx/{fault.gate}" in failed and "onnx/operands_exact" not in failed


def test_a_graph_that_stops_is_refused_in_words(exported: Any, tmp_path: Path) -> None:
    graph = Graph(exported("learned").portable)
    _code_beyond_the_table(graph)
    graph.save(tmp_path / "model.onnx")
    with pytest.raises(ContractError, match=r"model\.onnx: onnxruntime refuses it .*out of data bounds"):
        exported("learned").checks(tmp_path / "model.onnx")


def test_codes_that_are_no_numbers_of_the_format_are_no_image() -> None:
    integers = decoded_integers(get_format("E2M1"), np.array([0, 7, 15, 16, 255], np.uint8))
    assert integers[:3].tolist() == [0, 12, -12] and np.isnan(integers[3:]).all()
    assert np.isnan(decoded_integers(get_format("E4M3"), np.array([127], np.uint8))).all(), "the code of NaN"


def test_what_is_not_wired_as_a_quantized_linear_is_not_taken_for_one(exported: Any, tmp_path: Path) -> None:
    graph = Graph(exported("exact_group").portable)
    graph.node(f"{K}/matmul").input[0] = graph.node(f"{K}/quantize").input[0]
    graph.node(f"{CROSS_V}/weight").input[1] = graph.producer(f"{Q}/quantize/scale").output[1]  # computed, not stored
    graph.save(tmp_path / "model.onnx")
    layers = {linear.layer for linear in portable_linears(ir.load(tmp_path / "model.onnx"))}
    assert {layer.name for layer in exported("exact_group").layers} - layers == {K, CROSS_V}


def test_a_model_without_quantized_linears_is_refused(tmp_path: Path) -> None:
    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[2] x) => (float[2] y) { y = Abs(x) }'
    ir.save(ir.from_onnx_text(text), tmp_path / "model.onnx")
    with pytest.raises(ContractError, match="has no quantized linear; export the model again"):
        BACKEND.lower(tmp_path / "model.onnx", tmp_path, Recipe("test", "none"))


def test_ports_are_named_by_the_schema(exported: Any) -> None:
    linear = portable_linears(ir.load(exported("learned").portable))[0]
    assert linear.layer.endswith("attn1.to_q") and linear.quantizer.op_type == "QuantizeStatic"
    assert inputs_of(linear.quantizer).zero.name == f"{linear.layer}.activation_zero"
    assert outputs_of(linear.weight).w.name == f"{linear.layer}/weight"
    with pytest.raises(AttributeError, match="QuantizeStatic has x, scale, zero, not w"):
        inputs_of(linear.quantizer).get("w")


# --- run ------------------------------------------------------------------------------------------------------------


def test_a_large_model_stays_packed_and_computes_the_same(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pixart = exported("exact_group")
    whole = PortableEngine(pixart.portable.parent).run(pixart.study.calls[0])["sample"]
    monkeypatch.setattr(portable_engine, "FOLDED_BYTES", 0)
    opened: list[dict[str, Any]] = []
    session = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: opened.append(k) or session(*a, **k))
    packed = PortableEngine(pixart.portable.parent).run(pixart.study.calls[0])["sample"]
    assert opened[0]["disabled_optimizers"] == ["ConstantFolding"]
    # fusions may add up in another order: the limit of two float32 runs without a flipped code
    assert sqnr_db(whole, packed) > ROUNDED_DB


def test_many_threads_share_one_engine(exported: Any) -> None:
    pixart = exported("exact_group")
    engine = PortableEngine(pixart.portable.parent, threads=1)
    expected = [engine.run(call)["sample"] for call in pixart.study.calls]
    with ThreadPoolExecutor(4) as pool:
        samples = list(pool.map(lambda call: engine.run(call)["sample"], pixart.study.calls * 4))
    assert all(np.array_equal(one, other) for one, other in zip(samples, expected * 4, strict=True))


def test_an_array_overwritten_during_a_call_makes_no_mixture(exported: Any) -> None:
    pixart = exported("exact_group")
    engine, call = PortableEngine(pixart.portable.parent, threads=1), pixart.study.calls[0]
    expected = engine.run(call)["sample"]
    mine = {name: array.copy() for name, array in call.items()}
    engine.sessions = hooked(engine.sessions, step=lambda: mine["hidden_states"].fill(0))
    assert np.array_equal(engine.run(mine)["sample"], expected)


@pytest.fixture(scope="module")
def made_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole bundle of the bundled model for cpu and onnx, put together without proof or measurement."""
    folder = tmp_path_factory.mktemp("whole") / "small"
    (folder / "cpu").mkdir(parents=True)
    model = models.load("zoo:dit_mini")
    layers = tiny.quantized(model, granularity="exact_group")
    recipe = recipes.with_settings(recipes.load("dit_w4a8"), ["sampling.n_steps=1"])
    to_onnx.export_portable(model, layers, folder / "model.onnx")
    results = {}
    for target in ("cpu", "onnx"):
        scratch = tmp_path_factory.mktemp(target)
        lowered = BACKENDS[target].lower(folder / "model.onnx", scratch, recipe)
        results[target] = BACKENDS[target].build(lowered, folder / target, recipe)
    describe(folder, model, recipe)
    facts = manifest.BuildFacts("0" * 64, recipe, model_row(model), layers, list(model.kept()), results)
    manifest.write(manifest.compose(facts, folder), folder)
    return folder


def test_a_bundle_lists_it_and_loads_it(made_bundle: Path) -> None:
    opened = load(made_bundle)
    assert opened.targets == ("cpu", "onnx") and opened.choose("auto") == "cpu"
    row = opened.manifest["targets"]["onnx"]
    assert row["files"] == ["model.onnx", "model.onnx.data"] and set(row["files"]) <= set(opened.manifest["files"])
    assert len(row["choices"]) == len(opened.manifest["layers"])
    assert not (made_bundle / "onnx").exists(), "nothing is stored twice"
    engine = opened.engine("onnx")
    inputs = models.sample_inputs(models.load("zoo:dit_mini"), 2, 0)
    sample, expected = engine.run(inputs)["sample"], opened.engine("cpu").run(inputs)["sample"]
    assert sqnr_db(expected, sample) > 40, "two engines of one model, but for flipped codes"
    engine.close()
    assert opened.as_diffusers("onnx").config.sample_size


def test_generate_and_inspect_know_it(made_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = {}
    for target in ("cpu", "onnx"):
        flags = ["--target", target, "--n-steps", "2", "-o", str(tmp_path / f"{target}.png")]
        assert cli.main(["generate", str(made_bundle), "--prompt", "3", *flags]) == 0
        drawn[target] = np.asarray(Image.open(tmp_path / f"{target}.png"), np.int64)
    assert np.abs(drawn["cpu"] - drawn["onnx"]).mean() < 2, "levels of 255"
    assert cli.main(["inspect", str(made_bundle)]) == 0
    shown = capsys.readouterr().out
    assert "decoded by function bodies in standard ops" in shown
    assert cli.main(["list"]) == 0 and "\nonnx " in capsys.readouterr().out


def test_auto_takes_it_only_where_nothing_faster_runs(
    made_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened = load(made_bundle)
    reason = "target cpu needs another processor"
    monkeypatch.setattr(BACKENDS["cpu"], "fitness_problem", lambda manifest, source: reason)
    with caplog.at_level("WARNING"):
        assert opened.choose("auto") == "onnx"
    [line] = caplog.messages
    assert line == f"no faster target fits this machine ({reason}): the portable model runs, many times slower"
    with pytest.raises(EnvironmentLacksError, match="needs another processor"):
        opened.choose("cpu")
    monkeypatch.setattr(machine, "tool_version", lambda name: "1.0.0")
    with pytest.raises(EnvironmentLacksError, match=r"target onnx was verified with onnxruntime .*, this is 1\.0"):
        opened.choose("onnx")


def test_every_build_has_it(tmp_path: Path) -> None:
    recipe = recipes.Recipe(name="a", model="b")
    assert BuildRequest(recipe, ("cpu",), tmp_path).targets == ("cpu", "onnx")
    assert BuildRequest(recipe, ("onnx", "cpu"), tmp_path).targets == ("onnx", "cpu")
    assert parse_targets("onnx") == ("onnx",)


def test_bench_measures_it_only_when_asked(
    made_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[list[str]] = []
    monkeypatch.setattr(bench, "bench", lambda model, engines, *_: measured.append(list(engines)) or NOTHING_MEASURED)
    monkeypatch.setattr(baselines, "baselines", lambda *_: [])
    for flags in ([], ["--target", "onnx"], ["--target", "cpu,onnx"]):
        assert cli.main(["bench", str(made_bundle), *flags]) == 0
    assert measured == [["cpu"], ["onnx"], ["cpu", "onnx"]]
    assert cli.main(["bench", str(made_bundle), "--target", "rtx"]) == 2
    assert "has no target rtx, only cpu, onnx" in capsys.readouterr().err


@pytest.mark.process
def test_bench_measures_it_beside_peers(
    made_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contest, "CALL_ROUNDS", (1, 1))
    monkeypatch.setattr(peers, "absence", lambda name: "install it" if "openvino" in name else None)
    flags = ["--peers", "onnxruntime_int8,openvino_int8", "--work-dir", str(tmp_path / "work"), "--threads", "1"]
    output = tmp_path / "peers.json"
    assert cli.main(["bench", str(made_bundle), "--target", "cpu,onnx", *flags, "-o", str(output)]) == 0
    answer = capsys.readouterr().out
    document = json.loads(output.read_text())
    rows = document["contestants"]
    assert list(rows) == ["cpu", "cpu_first_step", "onnx", "onnx_first_step", "onnxruntime_int8"]
    assert all(row["load_s"] > 0 and row["peak_rss_bytes"] > 0 for row in rows.values())
    assert rows["cpu"]["sqnr_db"] > 10 and rows["cpu"]["drawing_peak_rss_bytes"] > 0
    assert document["ratios"]["cpu"].keys() == {"onnxruntime_int8"} and not document["failed"]
    assert document["left_out"] == {"openvino_int8": "install it"}
    assert "openvino_int8 was not measured: install it" in answer and "error, dB" in answer
    assert (tmp_path / "work").is_dir()
    assert cli.main(["bench", str(made_bundle), "--peers", "tvm"]) == 2
    assert "peer 'tvm' is unknown" in capsys.readouterr().err


# --- how much of it is run ------------------------------------------------------------------------------------------


def test_a_large_model_is_run_in_few_steps_and_draws_nothing(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixart = exported("exact_group")
    monkeypatch.setattr(verification, "is_large", lambda model: True)
    report = pixart.report(pixart.portable)
    assert report.failures() == []
    assert "onnx/final_psnr_db" not in {gate.name for gate in report.gates}
    expected = "onnx: compared in 1 of 2 steps, linears in 1 of 2 steps, no picture: it is slow; calls of batch 3 "
    expected += (
        "are compared by their outputs alone; calls of batch 1, 2 and 9 are not made; nor are those that show what "
    )
    expected += "is kept between calls"
    assert expected in report.notes and "onnx/step_sqnr_db" in {gate.name for gate in report.gates}


def test_steps_that_are_left_out_have_no_number() -> None:
    chosen = effort_for("onnx", 20, (0, 19), 4, large=False)
    assert chosen == Effort((0, 3, 6, 9, 12, 15, 18, 19), (19,), 1, inside=(1, 2, 3))
    assert note("cpu", effort_for("cpu", 20, (0, 19), 4, large=False), 20, (0, 19), 4) is None
    large = note("cpu", effort_for("cpu", 20, (0, 19), 4, large=True), 20, (0, 19), 4)
    expected = (
        "cpu: large model, linears in 1 of 2 steps; calls of batch 1, 2 and 9 are compared by their outputs alone"
    )
    assert large == f"{expected}; one sample of batch 3 is looked into"
    stood_in = note("rtx", effort_for("rtx", 20, (0, 19), 4, large=True, runs=False), 20, (0, 19), 4)
    assert stood_in.startswith("rtx: large model, linears in 1 of 2 steps, no picture; ")
    assert stood_in.endswith(
        "calls of batch 1 and 2 are compared by their outputs alone; one sample of batch 3 is looked into; "
        "calls of batch 9 are not made"
    )
