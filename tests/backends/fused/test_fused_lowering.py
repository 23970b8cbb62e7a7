"""Lowering for `cuda`: what is fused, what is left alone and why, and that stock onnxruntime gives the same numbers."""

from __future__ import annotations

import re
from itertools import cycle

import numpy as np
import onnx_ir as ir
import pytest
import torch

from export.errors import ContractError
from pipeline.backends.cuda.module import LoweredModule
from pipeline.backends.fused.gate_residual import FuseGateResidual
from pipeline.backends.fused.lower import LowerFused, lower
from pipeline.backends.fused.ops import DOMAIN, OPS, add_functions, attention_node
from pipeline.passes import run_shared
from pipeline.passes.fuse_attention import FuseAttention
from tests.support.learned import with_scaling
from tests.support.portable import activations, op_types, portable, random_linear, run

SHAPES = {"inputs": "float[B,S,64] x, float[B,1,64] gate", "outputs": "float[B,S,64] y"}
LINEAR = 'h = fpq.QuantizedLinear <layer="a"> (x)\n'
HEADS = "float[B,2,S,8] q, float[B,2,T,8] k, float[B,2,T,8] v, float[B,1,1,T] mask"
TURN = "kt = Transpose <perm = [0, 1, 3, 2]> (k)\n"


def square(name: str = "a", **choices) -> list:
    """One linear of 64 channels to 64."""
    return [random_linear(name, n=64, k=64, **choices)]


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def both(model: ir.Model, feeds: dict[str, np.ndarray]) -> tuple[ir.Model, np.ndarray, np.ndarray]:
    """The lowered model, and the output before and after."""
    before = run(model, feeds)[0]
    run_shared(model)
    lower(model)
    return model, before, run(model, feeds)[0]


def assert_close(after: np.ndarray, before: np.ndarray, terms: int = 64) -> None:
    """Two orders of a float32 sum of so many terms: at most a rounding of the magnitudes' sum for each."""
    assert np.abs(after - before).max() <= 2 * terms * 2.0**-24 * np.abs(before).max() * terms**0.5


@pytest.mark.parametrize("granularity, group", [("per_channel", 0), ("exact_group", 16), ("group", 32)])
@pytest.mark.parametrize("weight", ["E2M1", "E1M2", "INT4"])
def test_a_linear_becomes_one_gemm_with_the_same_result(weight, granularity, group):
    model = portable(LINEAR + "y = Neg(h)", square(weight=weight, granularity=granularity, group=group), **SHAPES)
    model, before, after = both(model, {"x": activations(np.random.default_rng(0)), "gate": gates(0)})
    assert kinds(model) == ["Quantize", "Gemm", "Neg"]
    assert_close(after, before)


GROUPS = [("per_channel", 0), ("exact_group", 16), ("group", 32)]
PAIRS = [("E2M1", "E3M4"), ("E3M0", "E4M3"), ("E1M2", "INT8"), ("INT4", "E3M2")]


@pytest.mark.parametrize("weights", ["packed", "expanded"])
@pytest.mark.parametrize("pair, groups", list(zip(PAIRS, cycle(GROUPS), strict=False)), ids=str)
def test_the_executor_gives_what_onnxruntime_gives(pair, groups, weights):
    (weight, activation), (granularity, group) = pair, groups
    layer = square(weight=weight, activation=activation, granularity=granularity, group=group)
    model = portable(LINEAR + "y = Neg(h)", layer, **SHAPES)
    feeds = {"x": activations(np.random.default_rng(4)), "gate": gates(4)}
    model, _, expected = both(model, feeds)
    module = LoweredModule(model, weights=weights)
    result = module({name: torch.from_numpy(array) for name, array in feeds.items()})["y"].numpy()
    # Exact sums rounded to float32, a product for each group of scales, two products and a sum: in one order.
    rows = np.abs(expected).max(axis=-1, keepdims=True) + np.abs(layer[0].bias).max()
    assert (np.abs(result - expected) <= (64 // (group or 64) + 4) * 2.0**-24 * rows).all()


@pytest.mark.parametrize("weights", ["packed", "expanded"])
@pytest.mark.parametrize("granularity, group", [("per_channel", 0), ("exact_group", 16), ("group", 32)])
def test_int8_operands_change_no_number(granularity, group, weights):
    """Codes of one quantizer for two GEMMs; their sums are exact in FP8's place or INT8's."""
    layers = [*square("a", granularity=granularity, group=group), *square("b", weight="E1M2", seed=1)]
    body = LINEAR + 'k = fpq.QuantizedLinear <layer="b"> (x)\ny = Add(h, k)'
    feeds = {"x": activations(np.random.default_rng(4)), "gate": gates(4)}
    results, paths = {}, {}
    for operands in ("fp8", "int8"):
        model = portable(body, layers, **SHAPES)
        run_shared(model)
        paths[operands] = {choice.path for choice in lower(model, operands).choices}
        module = LoweredModule(model, weights=weights)
        results[operands] = module({name: torch.from_numpy(array) for name, array in feeds.items()})["y"]
        assert {gemm.operands["integers"] for gemm in module.gemms} == {operands == "int8"}
        assert module.expanded == (2 if weights == "expanded" else 0)
    assert paths == {"fp8": {"fp8 operands"}, "int8": {"int8 operands"}}
    assert torch.equal(results["int8"], results["fp8"])


SECOND = 'k = fpq.QuantizedLinear <layer="b"> (x)\n'


def executed(body: str, layers: list, **choices: str) -> tuple[list[int], LoweredModule]:
    """Channels of each GEMM of the executor, and the executor, whose result is compared with the graph's."""
    shapes = SHAPES | {"outputs": "float[B,S,192] y"}
    model = portable(LINEAR + SECOND + body, layers, inner="float[B,S,64] h", **shapes)
    feeds = {"x": activations(np.random.default_rng(4)), "gate": gates(4)[:1]}
    model, _, expected = both(model, feeds)
    module = LoweredModule(model, **choices)
    result = module({name: torch.from_numpy(array) for name, array in feeds.items()})["y"].numpy()
    assert_close(result, expected)
    return [len(gemm.bias) for gemm in module.gemms], module


@pytest.mark.parametrize("weights", ["packed", "expanded"])
@pytest.mark.parametrize("granularity, group", [("per_channel", 0), ("exact_group", 16), ("group", 32)])
@pytest.mark.parametrize("activation", ["E2M3", "INT8"])
def test_linears_of_the_same_codes_are_one_gemm(activation, granularity, group, weights):
    """Of unequal widths, each result from its own columns; codes are freed once."""
    chosen = {"activation": activation, "granularity": granularity, "group": group}
    layers = [*square("a", **chosen), random_linear("b", n=128, k=64, seed=1, **chosen)]
    channels, module = executed("y = Concat <axis = -1> (k, h)", layers, weights=weights)
    assert channels == [64 + 128]
    assert module.expanded == (1 if weights == "expanded" else 0)
    (step,) = (step for step in module.steps if step.run is module.gemms[0])
    assert step.name == "a+b"


@pytest.mark.parametrize(
    "body, other",
    [
        ("y = Concat <axis = -1> (k, h)", {"weight": "E1M2"}),
        ("y = Concat <axis = -1> (k, h)", {"granularity": "exact_group", "group": 16}),
        ("y = Concat <axis = -1> (k, h)", {"activation": "E3M2"}),
        ("g = Mul(gate, h)\ns = Add(x, g)\ny = Concat <axis = -1> (k, s)", {}),
    ],
    ids=["weight formats", "groups", "activation formats", "an epilogue"],
)
def test_other_linears_stay_alone(body, other):
    channels, _ = executed(body, [*square("a"), random_linear("b", n=128, k=64, seed=1, **other)])
    assert sorted(channels) == [64, 128]


def test_a_graph_of_an_earlier_release_is_merged_when_it_is_read():
    """Its linears stand apart, as `lower` left them."""
    model = portable(LINEAR + SECOND + "y = Concat <axis = -1> (k, h)", [*square("a"), *square("b", seed=1)], **SHAPES)
    run_shared(model)
    apart = LowerFused()
    apart(model)
    assert [node.op_type for node in model.graph].count("Gemm") == 2
    assert len(LoweredModule(model).gemms) == 1


def test_gemms_are_merged_up_to_a_width(monkeypatch):
    monkeypatch.setattr("pipeline.backends.fused.merge_gemms.MERGED_COLUMNS", 64 + 127)
    channels, _ = executed("y = Concat <axis = -1> (k, h)", [*square("a"), random_linear("b", n=128, k=64, seed=1)])
    assert channels == [64, 128]


@pytest.mark.parametrize(
    "other", [{"weight": "UE3M1"}, {"weight": "E3M0", "activation": "E3M2"}], ids=["weights", "activations"]
)
def test_codes_that_one_reader_cannot_take_as_int8_stay_fp8(other):
    """Weights up to 192 beside a GEMM that would fit; an activation format that does not embed."""
    layers = [*square("a", **{"activation": other.get("activation", "E2M3")}), *square("b", seed=1, **other)]
    model = portable(LINEAR + 'k = fpq.QuantizedLinear <layer="b"> (x)\ny = Add(h, k)', layers, **SHAPES)
    run_shared(model)
    assert [choice.path for choice in lower(model, "int8").choices] == ["fp8 operands"] * 2
    LoweredModule(model)


@pytest.mark.parametrize("sm, integers", [(0, False), (86, True), (89, True), (90, False), (120, True)])
def test_left_to_the_gpu_it_decides_at_load(sm, integers, monkeypatch):
    monkeypatch.setattr("pipeline.backends.cuda.module.visible_sm", lambda: sm)
    model = portable(LINEAR + "y = Neg(h)", square(), **SHAPES)
    run_shared(model)
    (choice,) = lower(model, "auto").choices
    (gemm,) = LoweredModule(model).gemms
    assert choice.path == "int8 or fp8 operands" and gemm.operands["integers"] == integers


@pytest.mark.parametrize("operands", ["fp8", "auto", "int8"])
def test_integer_formats_are_int8_operands_by_themselves(operands):
    model = portable(LINEAR + "y = Neg(h)", square(weight="INT4", activation="INT8"), **SHAPES)
    run_shared(model)
    (choice,) = lower(model, operands).choices
    assert choice.path == "int8 operands" and "their sums in INT32" in choice.why


def gates(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, 1, 64)).astype(np.float32)


def gated(body: str) -> tuple[ir.Model, FuseGateResidual]:
    model = portable(LINEAR + body, square(), inner="float[B,S,64] h, float[B,S,64] g", **SHAPES)
    run_shared(model)
    LowerFused()(model)
    rewrite = FuseGateResidual()
    rewrite(model)
    return model, rewrite


@pytest.mark.parametrize(
    "body",
    [
        "g = Mul(gate, h)\n y = Add(x, g)",
        "g = Mul(h, gate)\n y = Add(g, x)",
        "y = Add(h, x)",
        "one = Constant <value_float = 1.0> ()\n g = Div(h, one)\n y = Add(x, g)",
    ],
)
def test_gate_and_residual_join_the_gemm(body):
    model = portable(LINEAR + body, square(), inner="float[B,S,64] h, float[B,S,64] g", **SHAPES)
    x = activations(np.random.default_rng(1))
    model, before, after = both(model, {"x": x, "gate": gates(1)[: len(x)]})
    assert op_types(model) == ["Quantize", "GemmGateResidual"]
    assert_close(after, before)


@pytest.mark.parametrize(
    "body, reason",
    [
        ("g = Mul(gate, h)\n z = Add(x, g)\n y = Add(z, h)", ""),  # the linear has another reader
        ("s = ReduceSum(x)\n y = Add(h, s)", "not that of"),
        ("g = Mul(x, h)\n y = Add(x, g)", r"gate x has shape .*, not \[batch, 1, channels\]"),
        ("y = Neg(h)", ""),
    ],
)
def test_what_is_no_epilogue_stays(body, reason):
    model, rewrite = gated(body)
    assert "GemmGateResidual" not in kinds(model) and rewrite.fired == 0
    assert [bool(re.search(reason, refusal.reason)) for refusal in rewrite.refusals] == [True] * bool(reason)


def test_a_gelu_joins_its_quantizer():
    layers = [random_linear("a", n=64), random_linear("b", n=64, seed=1)]
    body = LINEAR + 'g = Gelu <approximate = "tanh"> (h)\n y = fpq.QuantizedLinear <layer="b"> (g)'
    model = portable(body, layers, **SHAPES)
    model, before, after = both(model, {"x": activations(np.random.default_rng(2)), "gate": gates(2)})
    assert kinds(model)[:4] == ["Quantize", "Gemm", "GeluQuantize", "Gemm"]
    assert np.linalg.norm(after - before) <= 1e-2 * np.linalg.norm(before)  # one code may flip


def test_a_gelu_joins_a_static_quantizer():
    """Codes and all that follows are those of both apart; the executor gives what onnxruntime gives."""
    layers = [random_linear("a", n=64), with_scaling(random_linear("b", n=64, seed=1), "zero")]
    body = LINEAR + 'g = Gelu <approximate = "tanh"> (h)\n y = fpq.QuantizedLinear <layer="b"> (g)'
    feeds = {"x": activations(np.random.default_rng(2)), "gate": gates(2)}
    model, before, after = both(portable(body, layers, **SHAPES), feeds)
    assert [kind for kind in kinds(model) if kind in OPS] == ["Quantize", "Gemm", "GeluQuantizeStatic", "Gemm"]
    assert np.linalg.norm(after - before) <= 1e-2 * np.linalg.norm(before)  # one code may flip
    module = LoweredModule(model)
    result = module({name: torch.from_numpy(array) for name, array in feeds.items()})["y"].numpy()
    assert np.linalg.norm(result - after) <= 1e-2 * np.linalg.norm(after)


@pytest.mark.parametrize(
    "gelu, reason", [('Gelu <approximate = "none"> (h)', "not the tanh form"), ("Gelu(h)", "not the tanh form")]
)
def test_another_gelu_stays(gelu, reason):
    layers = [random_linear("a", n=64), random_linear("b", n=64, seed=1)]
    model = portable(LINEAR + f'g = {gelu}\n y = fpq.QuantizedLinear <layer="b"> (g)', layers, **SHAPES)
    run_shared(model)
    rewrite = LowerFused()
    rewrite(model)
    assert "Gelu" in kinds(model) and reason in rewrite.refusals[0].reason


def attention(body: str) -> ir.Model:
    return ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : 21]>\ng ({HEADS}) => (float[B,2,S,8] y) '
        f"<float half = {{0.5}}, float third = {{0.25}}> {{\n{body}\n}}"
    )


@pytest.mark.parametrize(
    "body, name, scale",
    [
        (TURN + "s = MatMul(q, kt)\n p = Softmax(s)\n y = MatMul(p, v)", "Attention", 1.0),
        (
            TURN + "a = Mul(q, half)\n b = Mul(third, kt)\n s = MatMul(a, b)\n m = Add(s, mask)\n"
            "p = Softmax <axis = 3> (m)\n y = MatMul(p, v)",
            "MaskedAttention",
            0.125,
        ),
    ],
)
def test_attention_is_recognized(body, name, scale):
    model, rng = attention(body), np.random.default_rng(3)
    shapes = {"q": (2, 2, 5, 8), "k": (2, 2, 6, 8), "v": (2, 2, 6, 8), "mask": (2, 1, 1, 6)}
    feeds = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    shape_kt(model)
    before = run(model, feeds)[0]
    rewrite = FuseAttention(attention_node)
    rewrite(model)
    assert rewrite.fired == 1 and kinds(model) == [name]
    assert model.graph[0].attributes["scale"].as_float() == pytest.approx(scale)
    add_functions(model)
    assert_close(run(model, feeds)[0], before)


def shape_kt(model: ir.Model) -> None:
    """Shapes of inner values, as the exporter gives them."""
    for node in model.graph:
        node.outputs[0].shape = ir.Shape(["B", 2, "S", "T"])


@pytest.mark.parametrize(
    "body, reason",
    [
        (TURN + "s = MatMul(q, kt)\n p = Softmax <axis = 2> (s)\n y = MatMul(p, v)", "axis 2 is not the last"),
        (TURN + "s = MatMul(q, kt)\n p = Softmax(s)\n z = MatMul(p, v)\n w = MatMul(s, v)\n y = Add(z, w)", "reader"),
        ("p = Softmax(q)\n y = MatMul(p, v)", "scores are no MatMul"),
        ("p = Softmax(q)\n y = Neg(p)", "no MatMul with values"),
    ],
)
def test_what_is_no_attention_stays(body, reason):
    model, rewrite = attention(body), FuseAttention(attention_node)
    shape_kt(model)
    rewrite(model)
    assert rewrite.fired == 0 and reason in rewrite.refusals[0].reason


@pytest.mark.parametrize("weight, activation", [("INT8", "E2M3"), ("E2M3", "E4M3")])
def test_weights_that_no_kernel_takes_are_refused_by_layer(weight, activation):
    model = portable(LINEAR + "y = Neg(h)", square(weight=weight, activation=activation), **SHAPES)
    run_shared(model)
    with pytest.raises(ContractError, match=f"a cannot be lowered to the GPU kernels: weights in {weight}:"):
        lower(model)


def test_a_float_activation_is_refused():
    model = portable(LINEAR + "y = Neg(h)", square(), **SHAPES)
    matmul = next(node for node in model.graph if node.op_type == "MatMul")
    matmul.replace_input_with(0, model.graph.inputs[0])
    run_shared(model)
    with pytest.raises(
        ContractError, match=r"were not packed and cannot be lowered: .*, a/weight \(DequantizeWeight\)"
    ):
        lower(model)


def test_the_table_names_every_output_that_is_only_a_proof():
    for row in OPS.values():
        assert row.proof < set(row.outputs), row.name
        assert row.function().domain == DOMAIN and list(row.function().output) == list(row.outputs)
