"""Every GEMM path of the CPU lowering is exact against int64, and every refusal has its reason."""

from dataclasses import replace
from itertools import cycle

import numpy as np
import onnx_ir as ir
import pytest

from export.dialect.reference import quantize_activation
from export.formats.format import get_format, to_integers
from pipeline import machine
from pipeline.backends.cpu.engine import provided
from pipeline.backends.cpu.lower import FLOAT_PATH, FUNCTION_PATH, GEMMS, PACKED, LowerCpu, choose_path, refusal
from pipeline.passes import run_shared
from pipeline.passes.probes import WIDE_SUM
from pipeline.passes.quantized_gemm import read_gemm
from tests.support.portable import activations, op_types, portable, random_linear, run

BODY = 'y = fpq.QuantizedLinear <layer="a"> (x)'
WIDE, NARROW = provided(("avx512_vnni",)), provided(("avx2",))
ROUNDING = 2.0**-24

INTEGER_CASES = [
    ("E2M1", "E2M3", "per_channel", 0),
    ("E2M1", "E2M3", "exact_group", 16),
    ("E1M2", "E2M3", "exact_group", 32),
    ("E3M0", "E2M3", "per_channel", 0),
    ("INT4", "INT8", "exact_group", 16),
    ("INT6", "INT8", "per_channel", 0),
    ("E2M3", "INT6", "per_channel", 0),
    ("INT4", "E2M1", "exact_group", 16),
    ("E2M1", "E1M2", "per_channel", 0),
    ("E2M1", "E3M0", "per_channel", 0),
    ("E2M1", "E3M2", "exact_group", 16),
    ("E2M1", "E3M4", "exact_group", 16),
    ("E3M0", "E3M4", "per_channel", 0),
]
SHAPES = [(16, 64), (7, 32), (33, 96), (1, 160)]


HERE = provided(machine.cpu_flags())


def lowered(layer, capabilities=WIDE):
    """(model, pass) of a graph with one linear, x [B, S, K] -> y."""
    n, k = layer.out_features, layer.in_features
    model = portable(BODY, [layer], f"float[B,S,{k}] x", f"float[B,S,{n}] y")
    run_shared(model)
    rewrite = LowerCpu(capabilities)
    rewrite(model)
    return model, rewrite


def skip_where_sums_saturate(layer):
    """The lowering asks for a CPU that sums byte products in 32 bits; others saturate pairs of large ones in 16."""
    largest = 255 if layer.activation_format == "INT8" else 0
    if WIDE_SUM not in HERE and 2 * largest * int(np.abs(layer.integers()).max()) > 32767:
        pytest.skip("this CPU sums pairs of byte products in saturating 16 bits")


def oracle(layer, x):
    """(integer sums int64 [.., N], token scale) from the op's own reference."""
    codes, scale = quantize_activation(x, format=layer.activation_format)
    image = to_integers(get_format(layer.activation_format), codes).astype(np.int64)
    return image @ layer.integers().T.astype(np.int64), scale


def probe(model, names, x):
    """Inner tensors of a lowered graph by name."""
    present = {value.name for value in model.graph.outputs}
    for node in model.graph:
        model.graph.outputs.extend(v for v in node.outputs if v.name in names and v.name not in present)
    return dict(zip(names, run(model, {"x": x}, list(names)), strict=True))


def initializer(model, name):
    return model.graph.initializers[name].const_value.numpy()


@pytest.mark.parametrize("case, shape", list(zip(INTEGER_CASES * 2, cycle(SHAPES), strict=False)), ids=str)
def test_integer_paths_give_the_exact_sum_for_their_own_codes(case, shape):
    (weight, activation, granularity, group), (n, k) = case, shape
    layer = random_linear(n=n, k=k, weight=weight, activation=activation, granularity=granularity, group=group)
    skip_where_sums_saturate(layer)
    model, rewrite = lowered(layer)
    (row,), (choice,) = rewrite.probes, rewrite.choices
    assert row.exact and choice.path == row.path and "exact" in choice.why
    x = activations(np.random.default_rng(n), tokens=9, k=k)
    tensors = probe(model, [*row.codes, row.act_scale, row.gemm, row.output], x)
    image = sum(
        int(w) * (tensors[name].astype(np.int64) - int(row.codes_offset))
        for w, name in zip(row.limb_weights, row.codes, strict=True)
    )
    total = image @ layer.integers().T.astype(np.int64)
    expected = total.astype(np.float32) * initializer(model, row.gemm_scale)
    np.testing.assert_array_equal(tensors[row.gemm], expected)
    product = expected * tensors[row.act_scale]
    # Against float32 product and sum: two roundings.
    np.testing.assert_allclose(tensors[row.output], product + layer.bias, rtol=2 * ROUNDING, atol=1e-37)


@pytest.mark.parametrize("weight, activation, granularity, group", INTEGER_CASES)
def test_integer_paths_agree_with_the_oracle_of_the_whole_linear(weight, activation, granularity, group):
    layer = random_linear(weight=weight, activation=activation, granularity=granularity, group=group)
    # Powers of two as largest values make every quotient exact, so that no code can differ.
    fmt = get_format(activation)
    x = np.random.default_rng(0).uniform(-1, 1, (2, 5, 64)) * fmt.max_value
    x[..., 0] = fmt.max_value
    x = x.astype(np.float32)
    total, scale = oracle(layer, x)
    unit = 2.0 ** -(fmt.fraction_bits + get_format(weight).fraction_bits)
    expected = total * (layer.scales[:, 0].astype(np.float64) * unit) * scale + layer.bias
    magnitude = np.abs(total * layer.scales[:, 0] * unit * scale) + np.abs(layer.bias)
    skip_where_sums_saturate(layer)
    model, _ = lowered(layer)
    # Sum to float32, times channel scale, times token scale (itself one rounding), plus bias.
    assert (np.abs(run(model, {"x": x})[0] - expected) <= 5.01 * ROUNDING * magnitude).all()


@pytest.mark.parametrize("activation", ["E2M3", "INT8", "E3M4"])
@pytest.mark.parametrize("weight", ["E2M1", "INT4"])
def test_real_groups_add_exact_partial_sums(activation, weight):
    layer = random_linear(k=96, weight=weight, activation=activation, granularity="group", group=32)
    model, rewrite = lowered(layer)
    assert "per group" in rewrite.choices[0].path and not rewrite.probes[0].exact
    x = activations(np.random.default_rng(5), tokens=7, k=96)
    codes, scale = quantize_activation(x, format=activation)
    value = get_format(activation).values[codes]
    expected = value @ layer.dequantized().T * scale + layer.bias
    magnitude = np.abs(value) @ np.abs(layer.dequantized()).T * scale + np.abs(layer.bias)
    # Three partial sums, each rounded and scaled, then added, scaled and added to the bias.
    assert (np.abs(run(model, {"x": x})[0] - expected) <= 10 * ROUNDING * magnitude + 1e-37).all()


FLOAT_CASES = [("E2M1", "E4M3", "per_channel", 0), ("E2M1", "E4M3", "group", 32), ("E4M3", "E4M3", "per_channel", 0),
               ("E3M2", "E2M3", "per_channel", 0), ("E3M4", "INT8", "group", 32)]  # fmt: skip


@pytest.mark.parametrize("weight, activation, granularity, group", FLOAT_CASES)
def test_what_does_not_embed_runs_in_float_with_the_reason(weight, activation, granularity, group):
    layer = random_linear(k=96, weight=weight, activation=activation, granularity=granularity, group=group)
    model, rewrite = lowered(layer)
    assert rewrite.choices[0].path == FLOAT_PATH and "exceeds" in rewrite.choices[0].why
    assert not rewrite.probes[0].exact
    assert not any(node.domain == "fpq" for node in model.graph)
    x = activations(np.random.default_rng(5), tokens=7, k=96)
    codes, scale = quantize_activation(x, format=activation)
    value = get_format(activation).values[codes]
    expected = value @ layer.dequantized().T * scale + layer.bias
    magnitude = np.abs(value) @ np.abs(layer.dequantized()).T * scale + np.abs(layer.bias)
    # A float32 sum of 96 products in any order, and the scales.
    assert (np.abs(run(model, {"x": x})[0] - expected) <= (96 + 5) * ROUNDING * magnitude + 1e-37).all()


def test_the_image_of_a_float_path_is_probed_as_well():
    layer = random_linear(k=96, weight="E2M1", activation="E4M3")
    model, rewrite = lowered(layer)
    row = rewrite.probes[0]
    x = activations(np.random.default_rng(6), tokens=7, k=96)
    (image,) = probe(model, row.codes, x).values()
    codes, _ = quantize_activation(x, format="E4M3")
    np.testing.assert_array_equal(image * row.codes_unit - row.codes_offset, to_integers(get_format("E4M3"), codes))


def test_an_activation_without_sign_keeps_its_function():
    model, rewrite = lowered(random_linear(activation="UE2M2"))
    assert rewrite.choices[0].path == FUNCTION_PATH and "no sign" in rewrite.choices[0].why
    assert op_types(model) == ["QuantizeActivation", "PackedGemm"] and rewrite.refusals
    assert np.isfinite(run(model, {"x": activations(np.random.default_rng(0))})[0]).all()


def test_a_linear_without_bias_has_no_add():
    model, _ = lowered(random_linear(bias=False))
    assert op_types(model)[-1] == "Mul"


def test_readers_of_one_tensor_share_the_lowered_quantizer():
    body = """
      q = fpq.QuantizedLinear <layer="q"> (x)
      k = fpq.QuantizedLinear <layer="k"> (x)
      y = Add(q, k)
    """
    model = portable(body, [random_linear("q"), random_linear("k", seed=1)])
    run_shared(model)
    rewrite = LowerCpu(WIDE)
    assert rewrite(model).modified
    assert op_types(model).count("QuantizeLinear") == 1
    assert {row.codes for row in rewrite.probes} == {("q/quantize/codes",)}


def test_a_tensor_that_needs_two_forms_gets_both():
    body = """
      q = fpq.QuantizedLinear <layer="q"> (x)
      k = fpq.QuantizedLinear <layer="k"> (x)
      y = Add(q, k)
    """
    layers = [random_linear("q", activation="INT8"), random_linear("k", weight="INT8", activation="INT8", seed=1)]
    model = portable(body, layers)
    run_shared(model)
    rewrite = LowerCpu(NARROW)
    rewrite(model)
    assert [choice.path for choice in rewrite.choices] == ["u8 x s8", "u8 x s8, 2 limbs"]
    names = [node.name for node in model.graph]
    assert len(names) == len(set(names))
    assert np.isfinite(run(model, {"x": activations(np.random.default_rng(0))})[0]).all()


def spec_of(**changes):
    model = portable(BODY, [random_linear(**changes)], f"float[B,S,{changes.get('k', 64)}] x")
    run_shared(model)
    return read_gemm(next(node for node in model.graph if node.op_type == "PackedGemm"))


def test_a_cpu_that_sums_pairs_in_16_bits_gets_narrow_operands():
    # INT8 x INT8: 2 * 255 * 127 = 64770 > 32767, so one limb would saturate.
    spec = spec_of(weight="INT8", activation="INT8")
    assert choose_path(spec, WIDE)[0].limbs == 1
    row, why = choose_path(spec, NARROW)
    assert row.limbs == 2 and "a pair of products can reach 64770" in why
    # E2M1 with multipliers up to 10 against E2M3: 2 * 124 * 120 = 29760 fits.
    assert choose_path(spec_of(granularity="exact_group", group=16), NARROW)[0].limbs == 1


@pytest.mark.parametrize(
    "changes, row, reason",
    [
        ({"granularity": "exact_group", "group": 16}, "u8 x packed s4", ""),
        ({"activation": "E3M4"}, "u8 x packed s4, 2 limbs", "exceeds 1 operand of 8 bits"),
        ({"weight": "E2M3"}, "u8 x s8 panels", "not u8 x packed s4: E2M3 has 6 bits, not 4"),
        ({"granularity": "exact_group", "group": 4}, "u8 x s8 panels", "groups of 4 are no multiple of 8"),
        ({"granularity": "group", "group": 16}, "u8 x packed s4 per group", "it has no scale per group"),
        ({"granularity": "group", "group": 4}, "u8 x s8 per group", "groups of 4 are no multiple of 8"),
    ],
)
def test_4_bit_weights_stay_packed_where_the_kernel_library_is_used(changes, row, reason):
    chosen, why = choose_path(spec_of(**changes), NARROW, PACKED)
    assert chosen.path == row and reason in why
    assert choose_path(spec_of(**changes), NARROW)[0] not in PACKED


def test_packed_weights_need_no_sums_in_32_bits():
    """E3M0 x INT8: 2 * 255 * 64 = 32640, the largest pair there is."""
    spec = spec_of(weight="E3M0", activation="INT8")
    assert choose_path(spec, NARROW, PACKED)[0].path == "u8 x packed s4"
    assert refusal(spec, PACKED[0], wide_sum=False) is None


def test_a_sum_beyond_int32_is_refused():
    spec = spec_of(weight="INT8", activation="E3M4", k=64)
    wide = [row for row in GEMMS if row.limbs == 2 and not row.real_groups]
    longest = (2**31 - 1) // (1984 * 127)
    assert not refusal(replace(spec, in_features=longest), wide[0], True)
    assert "more than int32 holds" in refusal(replace(spec, in_features=longest + 1), wide[0], True)


def test_capabilities_follow_the_instruction_set():
    assert WIDE_SUM in WIDE and WIDE_SUM not in NARROW
    assert WIDE_SUM in provided(("asimddp",))


@pytest.mark.parametrize("weight", ["E2M1", "INT6", "INT8"])
def test_weight_integers_equal_the_checkpoint(weight):
    granularity = ("exact_group", 16) if weight == "E2M1" else ("per_channel", 0)
    layer = random_linear(n=9, k=96, weight=weight, granularity=granularity[0], group=granularity[1])
    model = portable(BODY, [layer], "float[B,S,96] x", "float[B,S,9] y")
    run_shared(model)
    gemm = read_gemm(next(node for node in model.graph if node.op_type == "PackedGemm"))
    np.testing.assert_array_equal(gemm.turned_integers(), layer.integers().T)
    assert gemm.turned_integers().dtype == np.int8


def test_lowered_weights_are_lazy():
    model, _ = lowered(random_linear())
    assert isinstance(model.graph.initializers["a.image"].const_value, ir.LazyTensor)
