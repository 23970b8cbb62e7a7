"""The CPU lowering of static and grouped scales, zero points, balance and branches: exact, and proven by the gates."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from export.checkpoint import QuantizedLinear
from export.dialect.graph import GraphBuilder
from export.dialect.reference import quantize_static
from export.formats.format import FORMATS, get_format, to_integers
from pipeline.backends.base import LoweredGraph
from pipeline.backends.cpu.engine import provided
from pipeline.backends.cpu.lower import FLOAT_PATH, LowerCpu
from pipeline.backends.cpu.quantizers import quantize_static as emit_static
from pipeline.backends.cpu.quantizers import static_integers, unsupported
from pipeline.passes import run_shared
from pipeline.verify.oracle import LinearCheck, activation_oracle, check_linear, joined
from pipeline.verify.probe import ProbedGraph
from tests.support import learned
from tests.support.portable import HEADER, activations, op_types, portable, random_linear, run

WIDE, NARROW = provided(("avx512_vnni",)), provided(("avx2",))
INPUTS = "float[batch,S,64] x, float[batch] timestep"
ONE = 'y = fpq.QuantizedLinear <layer="a"> (x)'
TIMES = np.float32([3, 500, 997])


def lowered(
    layers: list[QuantizedLinear], folder: Path, body: str = ONE, target: Any = WIDE
) -> tuple[ir.Model, LowerCpu, ProbedGraph]:
    model = portable(body, layers, INPUTS)
    run_shared(model)
    rewrite = LowerCpu(target)
    rewrite(model)
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
    graph = LoweredGraph(folder / "model.onnx", tuple(rewrite.probes), tuple(rewrite.choices))
    return model, rewrite, ProbedGraph(graph)


def inputs(seed: int = 0, calls: int = 2) -> list[dict[str, Any]]:
    """Calls of three samples of 9 tokens each; some tokens are zero, tiny, or far beyond a static range."""
    rng = np.random.default_rng(seed)
    samples = [np.concatenate([activations(rng, 9), rng.standard_normal((2, 9, 64))]) for _ in range(calls)]
    return [{"x": x.astype(np.float32), "timestep": TIMES} for x in samples]


def check(layer: QuantizedLinear, probed: ProbedGraph) -> LinearCheck:
    ((_, probes),) = probed.probes([layer.name], inputs())
    probe = joined(probes)
    return check_linear(layer, probe, activation_oracle(probe.x, layer))


def assert_proven(result: LinearCheck) -> None:
    assert result.gemm_max_abs_diff == 0
    assert (result.codes_inadmissible, result.nonfinite) == (0, 0)
    assert result.scale_error <= 1 and result.output_error <= 1


# --- static quantizers ---------------------------------------------------------------------------------------------

STATIC = [name for name, row in FORMATS.items() if not unsupported(row, static=True)]
ONE_LIMB = [n for n in STATIC if FORMATS[n].kmax < 128 or (not FORMATS[n].sign_bits and FORMATS[n].kmax < 256)]


def emitted(fill: Any) -> ir.Model:
    model = ir.from_onnx_text(f"{HEADER} g (float[B,K] x) => (float[B,K] unused) {{ unused = Identity(x) }}")
    outputs = fill(GraphBuilder(model.graph, model.graph[0], "q"), model.graph.inputs[0])
    model.graph.outputs[:] = outputs
    return model


def around_the_grid(name: str, scale: float, zero: float) -> Any:
    """[1, K]: where codes change, and the floats next to it; the ends of the range, numbers far beyond, zeros."""
    fmt = get_format(name)
    values = np.unique(fmt.values[np.isfinite(fmt.values) & (np.abs(fmt.values) <= fmt.max_value)])
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2])
    x = (points * scale + zero).astype(np.float32)
    near = [np.nextafter(x, np.float32(side)) for side in (-np.inf, np.inf)]
    return np.concatenate([x, *near, np.float32([0, -0.0, 1e30, -1e30, np.inf, -np.inf])])[None]


@pytest.mark.parametrize(("scale", "zero"), [(1.0, 0.0), (0.37, -0.1712), (2.0**-9, -0.5)])
@pytest.mark.parametrize("name", STATIC)
def test_static_codes_are_those_of_the_op_bit_for_bit(name: str, scale: float, zero: float) -> None:
    """The lowered quantizer subtracts and divides as the op does, so even codes at midpoints are equal."""
    fmt, scale = get_format(name), float(np.float32(scale))
    zero = 0.0 if fmt.sign_bits else float(np.float32(zero))
    x = around_the_grid(name, scale, zero)
    (codes,) = quantize_static(x, np.float32([scale]), np.float32([zero]), format=name)
    limbs = 1 if name in ONE_LIMB else 2
    if fmt.kmax >= 64 * 128:  # too wide for two limbs
        integers = run(emitted(lambda emit, value: [static_integers(emit, value, fmt, scale, zero)]), {"x": x})[0]
    else:
        operands = []
        model = emitted(lambda e, v: operands.append(emit_static(e, v, fmt, limbs, scale, zero)) or operands[0].codes)
        integers = sum(
            w * (code.astype(np.int64) - operands[0].zero)
            for w, code in zip(operands[0].weights, run(model, {"x": x}), strict=True)
        )
        assert operands[0].scale is None
    np.testing.assert_array_equal(integers, to_integers(fmt, codes))


def test_a_static_quantizer_reduces_nothing(tmp_path: Path) -> None:
    for scaling in ("per_tensor", "zero"):
        layer = learned.with_scaling(random_linear(), scaling)
        model, _, _ = lowered([layer], tmp_path)
        types = op_types(model)
        assert "ReduceMax" not in types and types[-2:] == ["MatMulIntegerToFloat", "Add"]  # no token scale behind it


def test_an_8_bit_uniform_quantizer_is_one_op(tmp_path: Path) -> None:
    """Its own saturation clips both ends."""
    layer = learned.with_scaling(random_linear(weight="INT4"), "zero")
    model, _, _ = lowered([replace(layer, activation_format="UE1M7")], tmp_path)
    assert op_types(model) == ["Sub", "QuantizeLinear", "MatMulIntegerToFloat", "Add"]


# --- every way through the lowering --------------------------------------------------------------------------------

WEIGHTS = [("E2M1", "per_channel", 0), ("E2M1", "exact_group", 16), ("INT4", "group", 16)]
SCALINGS = {
    "static": lambda one: learned.with_scaling(one, "per_tensor"),
    "zero": lambda one: learned.with_scaling(one, "zero"),
    "groups": lambda one: learned.with_scaling(one, "token_group", 16),
    "other groups": lambda one: learned.with_scaling(one, "token_group", 32),
}
AROUND = {
    "plain": lambda one: one,
    "balance": learned.with_balance,
    "branches": lambda one: learned.with_low_rank(one, learned.router()),
    "both": lambda one: learned.with_low_rank(learned.with_balance(one), learned.router(), half=True),
}


# Everything learned with everything else that is, and with each kind of weights.
COMBINED = list(zip(product(AROUND, [*SCALINGS, "token"]), cycle(WEIGHTS), strict=False))


@pytest.mark.parametrize(("learned_with", "weight"), COMBINED, ids=str)
def test_gates_prove_every_combination(learned_with: tuple[str, str], weight: Any, tmp_path: Path) -> None:
    (around, scaling), (name, granularity, group) = learned_with, weight
    one = random_linear(weight=name, activation="E2M3", granularity=granularity, group=group)
    layer = AROUND[around](SCALINGS.get(scaling, lambda one: one)(one))
    model, rewrite, probed = lowered([layer], tmp_path)
    assert not any(node.domain == "fpq" for node in model.graph) and not rewrite.refusals
    result = check(layer, probed)
    if granularity == "group" and scaling not in ("groups", "other groups"):
        assert np.isnan(result.gemm_max_abs_diff) and not rewrite.probes[0].exact  # float sums of scaled integer sums
        result = replace(result, gemm_max_abs_diff=0)
    assert_proven(result)
    outputs = run(model, inputs()[0])
    expected = learned.expected_output(layer, inputs()[0]["x"][1:], TIMES[1:])
    off = np.abs(outputs[0][1:] - expected) > 1e-4 * np.abs(expected).max()
    assert off.mean() < 0.05  # codes at midpoints


ACTIVATIONS = ["E2M1", "E1M2", "E3M0", "INT4", "INT6", "INT8", "E3M2", "E3M4"]
UNSIGNED = ["UE1M3", "UE2M2", "UE3M1", "UE1M5", "UE2M4", "UE3M3", "UE1M7"]


@pytest.mark.parametrize("target", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("scaling", ["static", "groups"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_signed_activation_is_exact(activation: str, scaling: str, target: Any, tmp_path: Path) -> None:
    layer = SCALINGS[scaling](random_linear(weight="INT4", activation=activation))
    _, rewrite, probed = lowered([layer], tmp_path, target=target)
    assert rewrite.probes[0].exact
    assert_proven(check(layer, probed))


@pytest.mark.parametrize("target", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("activation", UNSIGNED)
def test_every_unsigned_activation_is_exact(activation: str, target: Any, tmp_path: Path) -> None:
    zero = learned.with_scaling(random_linear(weight="INT4"), "zero")
    reach = 3.2 / get_format(activation).max_value
    layer = replace(zero, activation_format=activation, activation_scale=np.float32([reach]))
    _, rewrite, probed = lowered([layer], tmp_path, target=target)
    row = rewrite.probes[0]
    assert row.exact and (len(row.codes) == 2 or row.codes_offset == 0)
    assert_proven(check(layer, probed))


@pytest.mark.parametrize(("activation", "scaling"), [("E4M3", "static"), ("E4M3", "groups"), ("UE4M0", "zero")])
def test_what_does_not_embed_runs_in_float(activation: str, scaling: str, tmp_path: Path) -> None:
    layer = SCALINGS[scaling](random_linear(activation="E2M3" if scaling == "zero" else activation))
    layer = replace(layer, activation_format=activation)
    if scaling == "zero":
        layer = replace(layer, activation_scale=np.float32([3.2 / 256]))
    _, rewrite, probed = lowered([layer], tmp_path)
    assert rewrite.choices[0].path == FLOAT_PATH and "exceeds" in rewrite.choices[0].why
    result = check(layer, probed)
    assert np.isnan(result.gemm_max_abs_diff)
    assert_proven(replace(result, gemm_max_abs_diff=0))


def test_narrow_cpus_need_two_limbs_for_wide_codes() -> None:
    """255 * 127 * 2 exceeds int16; 124 * 7 * 2 does not."""
    from pipeline.backends.cpu.lower import choose_path
    from pipeline.passes.quantized_gemm import read_gemm

    paths = {}
    for weight in ("INT8", "INT4"):
        layer = replace(learned.with_scaling(random_linear(weight=weight), "zero"), activation_format="UE1M7")
        model = portable(ONE, [layer], INPUTS)
        run_shared(model)
        row, why = choose_path(read_gemm(next(n for n in model.graph if n.op_type == "PackedGemm")), NARROW)
        paths[weight] = (row.path if row else "", why)
    assert "a pair of products can reach 64770" in paths["INT8"][1]
    assert paths["INT4"][0] == "u8 x s8"


# --- sharing and fusing --------------------------------------------------------------------------------------------

QKV = """
  q = fpq.QuantizedLinear <layer="q"> (x)
  k = fpq.QuantizedLinear <layer="k"> (x)
  v = fpq.QuantizedLinear <layer="v"> (x)
  qk = Add(q, k)
  y = Add(qk, v)
"""


@pytest.mark.parametrize("scaling", [*SCALINGS, "token"])
def test_equal_balance_and_scales_are_shared(scaling: str, tmp_path: Path) -> None:
    layers = [
        learned.with_balance(SCALINGS.get(scaling, lambda one: one)(random_linear(name, seed=i)))
        for i, name in enumerate("qkv")
    ]
    model, rewrite, probed = lowered(layers, tmp_path, QKV)
    assert op_types(model).count("QuantizeLinear") == 1
    balance = [node.name for node in model.graph if node.name in ("q/multiply", "q/offset", "k/multiply", "v/offset")]
    assert balance == ["q/multiply", "q/offset"]
    assert len({row.codes for row in rewrite.probes}) == 1 and {row.x for row in rewrite.probes} == {"x"}
    for layer in layers:
        assert_proven(check(layer, probed))


def test_other_balance_or_scale_is_not_shared_and_says_so(tmp_path: Path) -> None:
    q, k, v = (learned.with_scaling(random_linear(name, seed=i), "per_tensor") for i, name in enumerate("qkv"))
    k = replace(k, activation_scale=k.activation_scale * np.float32(1.5))
    model = portable(QKV, [q, k, learned.with_balance(v)], INPUTS)
    share = run_shared(model)[0]
    assert op_types(model).count("QuantizeStatic") == 3
    (refusal,) = share.refusals[:1]
    assert refusal.culprit == "k/quantize" and "E2M3 at scale 0.4" in refusal.reason and "differs" in refusal.reason


NORM = """
  n = LayerNormalization <axis = -1, epsilon = 1e-6> (x, ones)
  p = Add(scale, one)
  m = Mul(n, p)
  h = Add(m, shift)
  y = fpq.QuantizedLinear <layer="a"> (h)
"""
NORM_INPUTS = "float[batch,S,64] x, float[batch,1,64] scale, float[batch,1,64] shift, float[batch] timestep"


def norm_model(layer: QuantizedLinear) -> ir.Model:
    signature = f"{NORM_INPUTS}, float[64] ones, float one"
    model = portable(NORM, [layer], signature, inner="float[batch,S,64] h")
    for name, array in (("ones", np.ones(64, np.float32)), ("one", np.float32(1))):
        value = next(value for value in model.graph.inputs if value.name == name)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=name)
        model.graph.register_initializer(value)
    return model


REASONS = {
    "static": (SCALINGS["static"], "QuantizeStatic of a norm; only one scale per token is fused with it"),
    "groups": (SCALINGS["groups"], "QuantizeGroups of a norm; only one scale per token is fused with it"),
    "balance": (learned.with_balance, "its norm is balanced channel by channel before it is quantized"),
    "branches": (AROUND["branches"], "h has another reader than a/quantize"),
}


def test_a_plain_quantizer_behind_a_norm_is_fused() -> None:
    assert run_shared(norm_model(random_linear()))[1].fired == 1


@pytest.mark.parametrize("what", REASONS)
def test_a_norm_is_not_fused_with_what_the_fused_op_does_not_do(what: str) -> None:
    change, reason = REASONS[what]
    fuse = run_shared(norm_model(change(random_linear())))[1]
    assert fuse.fired == 0 and [refusal.reason for refusal in fuse.refusals] == [reason]


# --- the zero point ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", WEIGHTS, ids=lambda row: row[1])
@pytest.mark.parametrize("bias", [True, False])
def test_the_zero_is_folded_into_the_bias_exactly(weight: Any, bias: bool) -> None:
    """bias + zero * (exact integer sums of the weight's image times scales), rounded to float32 once."""
    name, granularity, group = weight
    layer = random_linear(weight=name, granularity=granularity, group=group, bias=bias)
    layer = learned.with_scaling(layer, "zero")
    model = portable(ONE, [layer], INPUTS)
    run_shared(model)
    folded = model.graph.initializers["a.bias_with_zero"].const_value.numpy()
    rows, unit = layer.integers().astype(np.int64), 2.0 ** -get_format(name).fraction_bits
    columns = layer.scales.shape[1]
    expected = [0.0 if layer.bias is None else float(layer.bias[n]) for n in range(layer.out_features)]
    for n in range(layer.out_features):
        for j, part in enumerate(np.split(rows[n], columns)):
            expected[n] += float(layer.activation_zero[0]) * int(part.sum()) * unit * float(layer.scales[n, j])
    np.testing.assert_allclose(folded, expected, rtol=2.0**-24, atol=0)
    assert "a.activation_zero" in model.graph.initializers  # the quantizer's


def test_without_a_zero_the_bias_stays() -> None:
    model = portable(ONE, [learned.with_scaling(random_linear(), "per_tensor")], INPUTS)
    run_shared(model)
    assert "a.bias_with_zero" not in model.graph.initializers and "a.bias" in model.graph.initializers
