"""What is looked at of quantized attentions, what is said of it, and the passes that stop there."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from export.dialect.ops import DOMAIN, OPS, VERSION, attributes
from pipeline.backends.base import LoweredGraph
from pipeline.backends.cpu.quantized_attention import UseQuantizedAttention
from pipeline.backends.cpu.token_chain import VERSION as NATIVE_VERSION
from pipeline.verify.attention_oracle import AttentionNumbers, AttentionProbe
from pipeline.verify.attentions import Attentions, attention_gates, note
from pipeline.verify.extremes import extreme_results, kept_beside
from pipeline.verify.gates import layer_gates
from pipeline.verify.probe import Beside, ProbedGraph
from pipeline.verify.segments import judge_mask
from pipeline.verify.walk import AttentionStop, Stop
from plugins.cpu import library
from tests.support import native
from tests.support.attention_engines import Form, attend

F32 = np.float32
HEADS, TOKENS, CHANNELS = 2, 9, 8
SCALE = float(F32(CHANNELS**-0.5))
NUMBERS = AttentionNumbers("INT8", "E2M3", SCALE)


def operands(batch: int = 2, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(batch, HEADS, TOKENS, CHANNELS)).astype(F32) for name in ("q", "k", "v")}


def probe_of(arrays: dict[str, Any]) -> AttentionProbe:
    """A right engine's."""
    q, k, v = arrays["q"], arrays["k"], arrays["v"]
    none = np.zeros((TOKENS, TOKENS), F32)
    heads = [[attend(q[b, h], k[b, h], v[b, h], none, NUMBERS, Form()) for h in range(HEADS)] for b in range(len(q))]
    return AttentionProbe(q, k, v, np.zeros((1, 1, 1, 1), F32), np.array(heads))


def judged(probe: AttentionProbe, name: str = "a") -> Attentions:
    attentions = Attentions({name: NUMBERS}, [name])
    attentions.judge("cpu", name, "fpq", {"step 1": probe_of(operands(seed=1)), "batch 2": probe})
    return attentions


def test_right_attentions_pass_and_are_counted() -> None:
    (result,) = judged(probe_of(operands())).results
    assert result.output_error <= 1 and result.diagnosis is None and result.nonfinite == 0
    assert result.rows == result.rows_of == 2 * 2 * HEADS * TOKENS
    assert note("cpu", [result]) is None
    gates = attention_gates("cpu", [result], ["a"])
    assert [gate.name for gate in gates] == ["cpu/attention_coverage", "cpu/attention_output"]
    assert all(gate.passed for gate in gates)


def _samples_swapped(output: Any) -> Any:
    return np.stack([output[0], output[0]])


def _heads_swapped(output: Any) -> Any:
    swapped = output.copy()
    swapped[:, 1] = output[:, 0]
    return swapped


@pytest.mark.parametrize(
    ("change", "where", "cause"),
    [
        (_samples_swapped, "only in samples 1 of 2", "of another sample are used"),
        (_heads_swapped, "only in heads 1 of 2", "heads are in another order"),
        (lambda output: output * F32(1.001), "in 4 of 4 heads of all samples", "a format, a scale, the mean of K"),
    ],
)
def test_a_wrong_attention_names_call_place_and_cause(change: Any, where: str, cause: str) -> None:
    right = probe_of(operands())
    attentions = judged(replace(right, output=change(right.output)))
    _, gate = attention_gates("cpu", attentions.results, ["a"])
    assert not gate.passed and gate.value > 100
    assert "most in a, in batch 2: most in sample" in gate.why and where in gate.why and cause in gate.why


def test_attentions_that_a_graph_lacks_are_named() -> None:
    coverage, output = attention_gates("cpu", [], ["a", "b"])
    assert (coverage.value, coverage.limit, coverage.passed) == (0, 2, False) and "without a, b" in coverage.why
    assert not output.passed and math.isnan(output.value) and "see attention_coverage" in output.why


def test_attention_in_float_has_no_gates() -> None:
    assert attention_gates("cpu", [], []) == []


def test_numbers_that_are_not_finite_are_named_where_they_come_first() -> None:
    arrays = operands()
    probe = probe_of(arrays)
    probe.output[1, 0, 3, 2] = np.nan
    attentions = judged(probe)
    finite = layer_gates("cpu", [], 0, None, attentions.results, ["a"])[0]
    assert finite.value == 1 and "first in a, in batch 2" in finite.why


def test_a_long_attention_s_queries_are_sampled_and_a_note_says_so() -> None:
    (result,) = judged(probe_of(operands())).results
    text = note("cpu", [replace(result, rows=10, rows_of=4000)])
    assert text == "cpu: attention is judged in every head of every call, for 10 of 4,000 queries: it is long"


# --- in a graph -----------------------------------------------------------------------------------------------------


def graph_of(path: Path, **changes: object) -> LoweredGraph:
    """Two attentions one after the other, the second with a mask that is an input."""
    nodes, initializers = [], [helper.make_tensor("zeros", TensorProto.FLOAT, [1, 1, 1, 1], [0.0])]
    for layer, q, mask in (("a", "q", "zeros"), ("b", "a/output", "mask")):
        chosen = attributes("QuantizedAttention", layer=layer, qk_format="INT8", pv_format="E2M3", scale=SCALE)
        chosen |= changes
        node = helper.make_node("QuantizedAttention", [q, "k2", "v2", mask], [f"{layer}/output"], layer, domain=DOMAIN)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in chosen.items())
        nodes.append(node)
    doubled = [helper.make_node("Add", [name, name], [f"{name}2"]) for name in "kv"]
    nodes = [helper.make_node("Identity", ["x"], ["q"]), *doubled, *nodes]
    shape = ["batch", HEADS, TOKENS, CHANNELS]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "k", "v")]
    inputs.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["batch", 1, 1, TOKENS]))
    outputs = [helper.make_tensor_value_info("b/output", TensorProto.FLOAT, shape)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[OPS["QuantizedAttention"].function()])
    model.ir_version = 10
    onnx.save(model, path)
    return LoweredGraph(path, (), ())


def by_the_library(path: Path) -> LoweredGraph:
    """The same with the ops of the kernel library: bytes of k and v, and what reads them."""
    native.need_compiler()
    graph_of(path)
    model = ir.load(path)
    UseQuantizedAttention()(model)
    model.opset_imports[library.DOMAIN] = NATIVE_VERSION
    ir.save(model, path)
    return LoweredGraph(path, (), ())


def test_an_attention_whose_bytes_nothing_made_is_not_found(tmp_path: Path) -> None:
    graph = by_the_library(tmp_path / "g.onnx")
    model = onnx.load(graph.path)
    nodes = {node.name: node for node in model.graph.node}
    nodes["b"].input[1] = "k2"
    onnx.save(model, graph.path)
    assert ProbedGraph(graph, 1).complete_attentions == {"a"}


GRAPHS = pytest.mark.parametrize("graph", [graph_of, by_the_library])


def inputs_of_graph() -> dict[str, Any]:
    arrays = operands()
    mask = np.where(np.random.default_rng(2).random((2, 1, 1, TOKENS)) < 0.3, -10000, 0).astype(F32)
    return {"x": arrays["q"], "k": arrays["k"], "v": arrays["v"], "mask": mask}


@GRAPHS
def test_attentions_of_a_graph_are_found_probed_and_right(
    tmp_path: Path, graph: Callable[[Path], LoweredGraph]
) -> None:
    probed = ProbedGraph(graph(tmp_path / "g.onnx"), 1)
    assert probed.complete_attentions == {"a", "b"}
    attentions = Attentions({"a": NUMBERS, "b": NUMBERS}, ["a", "b"])
    outputs: list[Any] = []
    for name, probes in probed.all_probes(["a", "b"], [inputs_of_graph()], outputs):
        (probe,) = (one for one in probes if isinstance(one, AttentionProbe))
        attentions.judge("cpu", name, probed.attentions[name].path, {"a call": probe})
    assert [row.path for row in attentions.results] == 2 * [DOMAIN if graph is graph_of else library.DOMAIN]
    assert max(row.output_error for row in attentions.results) <= 1
    assert np.array_equal(outputs[0]["b/output"], probe.output)


@GRAPHS
@pytest.mark.parametrize("tokens", [None, 4])
def test_attentions_are_right_on_numbers_that_no_call_reaches(
    tmp_path: Path, tokens: int | None, graph: Callable[[Path], LoweredGraph]
) -> None:
    probed, call = ProbedGraph(graph(tmp_path / "g.onnx"), 1), inputs_of_graph()
    read = kept_beside(probed, [], ["a", "b"], 0, tokens)
    assert isinstance(read, Beside) and read.names == {"a": ["q", "k2", "v2"], "b": ["a/output", "k2", "v2", "mask"]}
    list(probed.all_probes(["a", "b"], [call], beside=read))
    assert read.arrays["k2"].shape[2] == read.arrays["mask"].shape[3] == (tokens or TOKENS)
    results = extreme_results(probed, [], read, call, {"a": NUMBERS, "b": NUMBERS})
    assert len(results) == 8 and all(row.passed for row in results)
    other = AttentionNumbers("INT8", "INT6", SCALE)
    assert not all(row.passed for row in extreme_results(probed, [], read, call, {"a": other}))


# --- passes that stop -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["pixart", "hunyuan"])
def model(request: Any, tmp_path_factory: Any) -> Any:
    from export.models import load as models
    from tests.support import tiny

    return models.load(str(tiny.folder(request.param, tmp_path_factory.mktemp(request.param))))


def stops_of(model: Any, change: Any = None) -> Any:
    """Results of stretches for an engine that is the float32 module, with q, k, v and mask that `change` may alter."""
    import torch

    from export.formats.attention import AttentionFormats
    from export.models import load as models
    from pipeline.verify.segments import SegmentCheck, SegmentReference
    from pipeline.verify.walk import Walk, stopping_module, tensors_of

    inputs = models.sample_inputs(model, 2, 0)
    cells = inputs["hidden_states"].shape[2:]
    reference = SegmentReference(model, cells, AttentionFormats("INT8", "INT8"))
    module = stopping_module(model, torch.float32)
    engine = Walk(module, tensors_of(inputs, torch.float32), nullcontext, attentions=True)
    with SegmentCheck("cpu", reference, {"a call": inputs}, "fp32") as segments:
        order, stop = reference.order(inputs), engine.start()
        for name in order:
            assert stop.layer == name
            if isinstance(stop, AttentionStop):
                output = np.full(stop.q.shape, 0.5, F32) + stop.q
                mask = np.zeros((1, 1, 1, 1), F32) if stop.mask is None else stop.mask
                probe = AttentionProbe(stop.q, stop.k, stop.v, mask, output)
                segments.at_attention(name, [probe if change is None else change(name, probe)])
            else:
                features = model.module.get_submodule(name).out_features
                output = np.ones((stop.x.size // stop.x.shape[-1], features), F32) * F32(0.25)
                output[:, ::3] = 1 + np.arange(len(output), dtype=F32)[:, None] / 8
                segments.at(name, [SimpleNamespace(x=stop.x, output=output)])  # type: ignore[list-item]
            stop = engine.go_on(output)
        assert isinstance(stop, Stop) and stop.layer is None
        segments.end([{"sample": stop.x}])
    return reference, segments.results


@pytest.mark.torch
def test_passes_stop_at_attentions_in_the_order_of_computation(model: Any) -> None:
    reference, results = stops_of(model)
    assert max(row.error for row in results) < 1
    names = [row.layer for row in results if row.layer is not None and row.layer.endswith("(q)")]
    assert names == [f"{name} (q)" for name in reference.attentions] and len(names) == 2 * len(model_blocks(model))
    assert {numbers.scale for numbers in reference.attentions.values()} == {
        1 / math.sqrt(model.config["attention_head_dim"])
    }


def model_blocks(model: Any) -> Any:
    module = model.module
    return module.transformer_blocks if hasattr(module, "transformer_blocks") else module.blocks


@pytest.mark.torch
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_the_stretch_before_an_attention_is_judged(model: Any, part: str) -> None:
    def moved(name: str, probe: AttentionProbe) -> AttentionProbe:
        moves = name.endswith("1.attn1")
        return replace(probe, **{part: getattr(probe, part) * F32(1.0001)}) if moves else probe

    _, results = stops_of(model, moved)
    wrong = [row.layer for row in results if row.error > 1]
    assert len(wrong) == 1 and wrong[0].endswith(f"1.attn1 ({part})")


@pytest.mark.torch
def test_jittered_runs_move_what_attention_quantizes_and_end_with_their_context(model: Any) -> None:
    """Codes of q, k and v flip, and integers of exponentials with them."""
    import torch

    from export.formats.attention import AttentionFormats
    from export.models import load as models
    from pipeline.backends.reference import AttentionDenoiser, fake_quant
    from pipeline.verify.reference_hooks import jittered
    from pipeline.verify.walk import tensors_of
    from tests.support import tiny

    formats = AttentionFormats("INT8", "INT8")
    module = fake_quant(model, tiny.quantized(model, activation="INT8"), torch.float32, formats)
    assert isinstance(module, AttentionDenoiser)
    seen: list[torch.Tensor] = []
    inputs = tensors_of(models.sample_inputs(model, 1, 0), torch.float32)
    with torch.no_grad():
        with jittered(module, 0, 2.0):
            before = module.before
            assert before is not None
            module.before = lambda x: seen.append(x) or before(x)  # type: ignore[func-returns-value]
            module(**inputs)
            module.before = before
        assert module.before is None
    assert len(seen) == 6 * len(model_blocks(model))
    moved = (before(seen[0]) - seen[0]).abs()
    size = seen[0].abs() + seen[0].square().mean(-1, keepdim=True).sqrt()
    assert 0 < (moved / size).max() <= 4 * 2.0**-24  # two units, and the rounding of the sum


# --- masks ----------------------------------------------------------------------------------------------------------


def stop(mask: Any) -> AttentionStop:
    arrays = {name: array.astype(np.float64) for name, array in operands().items()}
    return AttentionStop("a", arrays["q"], arrays["k"], arrays["v"], mask, SCALE)


MASK = np.where(np.arange(2 * TOKENS).reshape(2, 1, 1, TOKENS) % 3 == 0, -10000.0, 0.0)
GONE = np.where(MASK < 0, -np.inf, 0.0)


@pytest.mark.parametrize(
    ("exact", "mask"),
    [
        (None, np.zeros((1, 1, 1, 1), F32)),
        (MASK, MASK.astype(F32)),
        (MASK, np.broadcast_to(MASK, (2, HEADS, TOKENS, TOKENS)).astype(F32)),
        (GONE, GONE.astype(F32)),
        (MASK, (MASK * (1 + 2.0**-23)).astype(F32)),
    ],
)
def test_a_right_mask_passes(exact: Any, mask: Any) -> None:
    result = judge_mask("cpu", "a call", stop(exact), mask)
    assert result.error <= 1 and result.diagnosis is None and result.layer == "a (mask)"


@pytest.mark.parametrize(
    ("exact", "mask", "text"),
    [
        (None, np.full((1, 1, 1, TOKENS), -1, F32), "9 of 9 numbers of the mask differ"),
        (MASK, MASK[::-1].astype(F32) + np.arange(2, dtype=F32).reshape(2, 1, 1, 1), "numbers of the mask differ"),
        (GONE, MASK.astype(F32), "6 of 18 numbers of the mask differ"),
        (MASK, np.zeros((1, 1, 1, 1), F32), "6 of 18 numbers of the mask differ"),
        (MASK, np.zeros((2, 1, 1, 5), F32), r"its shape is (2, 1, 1, 5), the module's (2, 1, 1, 9)"),
    ],
)
def test_a_wrong_mask_is_named(exact: Any, mask: Any, text: str) -> None:
    result = judge_mask("cpu", "a call", stop(exact), mask)
    assert result.error > 1 and result.diagnosis is not None and text in result.diagnosis
