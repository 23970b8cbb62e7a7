"""Lowered for `ort_cuda`, a packed graph computes the same numbers by onnxruntime's CPU execution provider."""

from __future__ import annotations

from itertools import cycle

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from export.errors import ContractError
from export.formats.format import encode, fold_negative_zero, get_format, unpack
from pipeline.backends.ort_cuda.lower import GEMMS, LowerOrtCuda
from pipeline.passes.probes import ProbeRow
from tests.backends.rtx.test_rtx_lowering import ACTIVATIONS, oracle_images, probed, run, tokens, weight_images
from tests.support.rtx_models import Graph, Linear, block, single

WEIGHTS = [("E2M1", 0), ("E2M1", 16), ("E1M2", 16), ("INT4", 0), ("INT6", 0)]
PATHS = {
    **dict.fromkeys(("E2M3", "E2M1", "E1M2", "INT6", "INT8", "UE2M2"), "int8"),
    **dict.fromkeys(("E3M2", "E3M4"), "int8, 2 limbs"),
    "E4M3": "fp8 qdq",
    "UE3M3": "int8, 2 limbs",
}


def lowered(model: onnx.ModelProto) -> tuple[onnx.ModelProto, LowerOrtCuda]:
    converted, rewrite = ir.from_proto(model), LowerOrtCuda()
    rewrite(converted)
    return ir.to_proto(converted), rewrite


def with_codes_as_floats(model: onnx.ModelProto, row: ProbeRow) -> onnx.ModelProto:
    """The graph with its int8 codes under another name, and float32 ones under theirs."""
    changed = onnx.ModelProto.FromString(model.SerializeToString())
    if "int8" in row.path:
        for node in changed.graph.node:
            for names in (node.input, node.output):
                names[:] = [f"{name}/int8" if name in row.codes else name for name in names]
        casts = [
            onnx.helper.make_node("Cast", [f"{code}/int8"], [code], to=onnx.TensorProto.FLOAT) for code in row.codes
        ]
        changed.graph.node.extend(casts)
    return changed


@pytest.mark.parametrize(("activation", "of_weight"), list(zip(ACTIVATIONS, cycle(WEIGHTS), strict=False)), ids=str)
def test_codes_and_integer_sums_are_exact(activation: str, of_weight: tuple[str, int]) -> None:
    weight, group = of_weight
    linear = Linear("layer", activation=activation, weight=weight, group_size=group)
    source = single(linear)
    model, rewrite = lowered(source)
    row, x = rewrite.probes[0], tokens(linear.in_features)
    assert row.path == PATHS[activation]
    got = run(with_codes_as_floats(model, row), {"x": x}, (*row.codes, str(row.act_scale), row.gemm))
    images = oracle_images(x, activation)
    assert np.array_equal(probed(row, got), images)
    total = images.astype(np.int64) @ weight_images(linear).T.astype(np.int64)
    assert row.exact is (activation != "E4M3")
    if row.exact:
        assert np.array_equal(got[row.gemm], (total * row.gemm_unit).astype(np.float32))
        # The rest is the same float32 arithmetic as the portable op's: scales, then bias.
        assert np.array_equal(got["y"], run(source, {"x": x})["y"])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_static_scales_open_with_all_optimizers_and_give_the_same_codes(activation: str) -> None:
    """As the engine is opened: the gates prove the graph with basic optimizations alone."""
    linear, fmt, graph = Linear("layer", activation=activation), get_format(activation), Graph()
    signed, scale = bool(fmt.sign_bits or fmt.is_integer), np.float32(2.0 / fmt.max_value)
    zero = 0.0 if signed else -0.25
    graph.linear(graph.quantize_static("x", activation, "layer/quantize", float(scale), zero), linear, "y")
    source = graph.model(linear.in_features, {"y": linear.out_features})
    model, rewrite = lowered(source)
    row, x = rewrite.probes[0], np.random.default_rng(0).normal(size=(3, 5, linear.in_features)).astype(np.float32)
    x[0, 0] *= 100  # beyond the range
    got = run(with_codes_as_floats(model, row), {"x": x}, (*row.codes, row.gemm))
    quotient = ((x - np.float32(zero)) / scale).astype(np.float64)
    clipped = np.clip(quotient, -fmt.max_value if signed else 0.0, fmt.max_value)
    images = fmt.integers[fold_negative_zero(fmt, encode(fmt, clipped))]
    assert np.abs(images).max() == fmt.kmax and np.array_equal(probed(row, got), images)
    total = images.astype(np.int64) @ weight_images(linear).T.astype(np.int64)
    largest = np.abs(images).astype(np.int64) @ np.abs(weight_images(linear)).T.astype(np.int64)
    # E4M3 alone has sums beyond float32: each of its additions rounds once.
    bound = (0 if row.exact else linear.in_features * 2.0**-24) * largest
    assert (np.abs(got[row.gemm] / row.gemm_unit - total) <= bound).all()
    exact = run(source, {"x": x})["y"].astype(np.float64)
    unit = (
        linear.arrays()["scales"][:, 0] * float(scale) * 2.0 ** -(fmt.fraction_bits + get_format("E2M1").fraction_bits)
    )
    roundings = (
        4 * 2.0**-24 * (np.abs(exact) + np.abs(linear.arrays()["bias"]))
    )  # two scales and their product, the sum
    assert (np.abs(got["y"] - exact) <= roundings + 2 * bound * unit).all()


@pytest.mark.parametrize("broken", [np.nan, np.inf])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_token_with_nan_or_inf_cannot_go_unseen(activation: str, broken: float) -> None:
    linear = Linear("layer", activation=activation)
    model, _ = lowered(single(linear))
    x = np.random.default_rng(0).normal(size=(1, 3, linear.in_features)).astype(np.float32)
    healthy = run(model, {"x": x})["y"]
    x[0, 1, 5] = broken
    got = run(model, {"x": x})["y"]
    assert not np.isfinite(got[0, 1]).any() and np.array_equal(got[0, ::2], healthy[0, ::2])


def test_sums_beyond_float32_are_exact_in_int32() -> None:
    linear = Linear("layer", in_features=4096, activation="INT8", weight="INT8")
    model, rewrite = lowered(single(linear))
    row, x = rewrite.probes[0], np.ones((1, 1, 4096), np.float32)
    x[..., weight_images(linear)[0] < 0] *= -1
    total = oracle_images(x, "INT8").astype(np.int64) @ weight_images(linear).T.astype(np.int64)
    assert np.abs(total).max() > 2**24 and row.exact and "every int32 sum is exact" in rewrite.choices[0].why
    assert np.array_equal(run(model, {"x": x}, (row.gemm,))[row.gemm], (total * row.gemm_unit).astype(np.float32))


@pytest.mark.parametrize(
    ("weight", "group", "path"),
    [
        ("E1M2", 32, "fp16, int4 weights"),
        ("INT4", 64, "fp16, int4 weights"),
        ("INT4", 16, "fp16"),
        ("E2M1", 32, "fp16"),
    ],
)
def test_real_group_scales_round_in_half_precision(weight: str, group: int, path: str) -> None:
    linear = Linear("layer", in_features=128, weight=weight, group_size=group, real_groups=True)
    source = single(linear)
    model, rewrite = lowered(source)
    nbits = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    assert rewrite.choices[0].path == path and len(nbits) == ("int4" in path) and not rewrite.probes[0].exact
    x = np.random.default_rng(0).normal(size=(2, 7, linear.in_features)).astype(np.float32)
    got, exact = run(model, {"x": x})["y"].astype(np.float64), run(source, {"x": x})["y"]
    # Each product has the roundings of three halves: the group scale, the weight, the sum; 2 for what E2M3 adds to |x|.
    fmt, arrays = get_format(weight), linear.arrays()
    size = np.abs(fmt.values[unpack(arrays["codes"], fmt.bits, linear.in_features)])
    size = size * np.repeat(arrays["scales"].astype(np.float64), group, axis=1)
    bound = 3 * 2.0**-11 * 1.01 * (np.abs(x.astype(np.float64)) @ size.T)
    subnormal = 2.0**-24 * linear.in_features * np.abs(x).max(axis=-1, keepdims=True) * 2 * size.max()
    assert (np.abs(got - exact) <= 2 * bound + subnormal + 1e-6 * np.abs(arrays["bias"])).all()


def test_a_block_equals_the_portable_ops() -> None:
    source = block(64, group_size=16)
    model, rewrite = lowered(source)
    rng = np.random.default_rng(1)
    inputs = {name: rng.normal(size=(2, 1, 64)).astype(np.float32) for name in ("shift", "scale")}
    inputs["x"] = rng.normal(size=(2, 5, 64)).astype(np.float32)
    assert np.array_equal(run(model, inputs)["y"], run(source, inputs)["y"])
    assert len(rewrite.probes) == 6 and all(row.exact for row in rewrite.probes)
    assert len({rewrite.probes[i].codes for i in range(3)}) == 1, "q, k and v share their codes"
    assert not [opset.domain for opset in model.opset_import if opset.domain], "nothing beside ONNX's own ops"


def test_a_sum_that_int32_does_not_hold_is_refused_by_its_bound() -> None:
    linear = Linear("layer", in_features=2**19, out_features=1, activation="INT8", weight="INT8")
    _, rewrite = lowered(single(linear))
    assert rewrite.choices[0].path != "int8" and "more than int32 holds" in rewrite.choices[0].why


def test_no_way_to_run_a_linear_names_every_reason() -> None:
    rewrite = LowerOrtCuda()
    rewrite.rows = GEMMS[:2]
    with pytest.raises(ContractError, match=r"layer: no way to run E4M3 x E2M1; int8: E4M3 does not embed.*2 limbs"):
        rewrite(ir.from_proto(single(Linear("layer", activation="E4M3"))))
