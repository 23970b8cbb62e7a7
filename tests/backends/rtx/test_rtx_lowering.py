"""Lowered for `rtx`, a packed graph computes the same numbers in stock onnxruntime: the proof that needs no GPU."""

from __future__ import annotations

import tracemalloc
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from export.dialect.reference import ABSMAX_FLOOR
from export.errors import ContractError
from export.formats.format import encode, fold_negative_zero, get_format, unpack
from export.formats.operands import exact_multipliers
from pipeline.backends.rtx.build import gemm_rows
from pipeline.backends.rtx.lower import LowerRtx
from pipeline.passes.probes import ProbeRow
from tests.support.rtx_models import Graph, Linear, block, single

WIDE = (89, 120)
ACTIVATIONS = ("E2M3", "E3M2", "E3M4", "E4M3", "E2M1", "E1M2", "INT6", "INT8", "UE2M2", "UE3M3")


def lowered(
    model: onnx.ModelProto, weights: str = "fp8", sms: tuple[int, ...] = WIDE
) -> tuple[onnx.ModelProto, LowerRtx]:
    converted = ir.from_proto(model)
    rewrite = LowerRtx(gemm_rows(weights, sms))
    rewrite(converted)
    return ir.to_proto(converted), rewrite


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray], extra: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Outputs and the `extra` tensors, without onnxruntime's own QDQ fusions."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    for name in dict.fromkeys(extra):
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def tokens(width: int, seed: int = 0) -> np.ndarray:
    """[2, 7, width]: tokens of very different size, one of zeros, one that is tiny."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, 7, width)) * 10.0 ** rng.uniform(-3, 3, (2, 7, 1))
    x[0, 0], x[0, 1] = 0, x[0, 1] * 1e-30
    return x.astype(np.float32)


def oracle_images(x: np.ndarray, name: str) -> np.ndarray:
    """Integer images of the codes of x in float64; float32 scale as the op defines it."""
    fmt = get_format(name)
    scale = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(ABSMAX_FLOOR)) / np.float32(fmt.max_value)
    quotient = (x / scale).astype(np.float64)
    codes = encode(fmt, np.clip(quotient, -fmt.max_value, fmt.max_value))
    return fmt.integers[fold_negative_zero(fmt, codes)]


def weight_images(linear: Linear) -> np.ndarray:
    """[N, K] integer images with multipliers."""
    arrays, fmt = linear.arrays(), get_format(linear.weight)
    images = fmt.integers[unpack(arrays["codes"], fmt.bits, linear.in_features)]
    groups = linear.in_features // (linear.group_size or linear.in_features)
    factors = np.array(linear.multipliers)[unpack(arrays["multipliers"], 4, groups)]
    return images * np.repeat(factors, linear.in_features // groups, axis=1)


def probed(row: ProbeRow, tensors: dict[str, np.ndarray]) -> np.ndarray:
    limbs = [
        w * (tensors[c].astype(np.float64) * row.codes_unit) for c, w in zip(row.codes, row.limb_weights, strict=True)
    ]
    return np.sum(limbs, axis=0) - row.codes_offset


OPTIONS = [("fp8", WIDE), ("int8", WIDE), ("int4", WIDE), ("fp8", (86, 89)), ("int4", (86,))]
WEIGHTS = [("E2M1", 0), ("E2M1", 16), ("E1M2", 16), ("E3M0", 16), ("INT4", 0), ("INT6", 0)]
# Every activation and every weight with every option, and most of them with each other.
EXACT = list(zip(product(OPTIONS, ACTIVATIONS), cycle(WEIGHTS), strict=False))


@pytest.mark.parametrize(("choice", "of_weight"), EXACT, ids=str)
def test_codes_and_integer_sums_are_exact(choice: Any, of_weight: tuple[str, int]) -> None:
    ((weights, sms), activation), (weight, group) = choice, of_weight
    linear = Linear("layer", activation=activation, weight=weight, group_size=group)
    source = single(linear)
    model, rewrite = lowered(source, weights, sms)
    row = rewrite.probes[0]
    x = tokens(linear.in_features)
    got = run(model, {"x": x}, (*row.codes, row.act_scale, row.gemm))
    images = oracle_images(x, activation)
    assert np.array_equal(probed(row, got), images)
    total = images.astype(np.int64) @ weight_images(linear).T.astype(np.int64)
    if row.exact:
        assert np.array_equal(got[row.gemm], (total * row.gemm_unit).astype(np.float32))
        # The rest is the same float32 arithmetic as the portable op's: scales, then bias.
        assert np.array_equal(got["y"], run(source, {"x": x})["y"])
    assert row.exact or activation == "E4M3" or "fp16" in row.path


def test_e2m3_in_e4m3_takes_no_rounding_ops() -> None:
    model, rewrite = lowered(single(Linear("layer")))
    assert not {"Round", "Where"} & {node.op_type for node in model.graph.node}
    assert "its own rounding" in rewrite.choices[0].why


REAL_GROUPS = [
    ("E2M1", 16, WIDE, "fp16"),
    ("E2M1", 32, WIDE, "fp16, fp8 weights"),
    ("E2M1", 32, (86,), "fp16"),
    ("E1M2", 32, WIDE, "fp16, int4 weights"),
    ("INT4", 32, (86,), "fp16, int4 weights"),
    ("INT8", 32, WIDE, "fp16"),
]


@pytest.mark.parametrize(("activation", "case"), list(zip(ACTIVATIONS, cycle(REAL_GROUPS), strict=False)), ids=str)
def test_real_group_scales_round_in_half_precision(activation: str, case: tuple[str, int, Any, str]) -> None:
    weight, group, sms, path = case
    linear = Linear("layer", activation=activation, weight=weight, group_size=group, real_groups=True)
    source = single(linear)
    model, rewrite = lowered(source, "fp8", sms)
    x = tokens(linear.in_features)
    got, exact = run(model, {"x": x})["y"].astype(np.float64), run(source, {"x": x})["y"]
    assert rewrite.choices[0].path == path and not rewrite.probes[0].exact
    # Rounded to 11 bits, 2^-11 relative at most: the group scale, its product with the value, and the sum. A subnormal
    # half is off by 2^-25 of the largest weight times the largest activation at most, for each of K products.
    fmt, arrays = get_format(linear.weight), linear.arrays()
    size = np.abs(fmt.values[unpack(arrays["codes"], fmt.bits, linear.in_features)])
    size = size * np.repeat(arrays["scales"].astype(np.float64), group, axis=1)
    bound = 3 * 2.0**-11 * 1.01 * (np.abs(x.astype(np.float64)) @ size.T)
    subnormal = 2.0**-24 * linear.in_features * np.abs(x).max(axis=-1, keepdims=True) * 2 * size.max()
    # The activation itself is quantized, to at most twice its size (just above half of the smallest value).
    assert (np.abs(got - exact) <= 2 * bound + subnormal + 1e-6 * np.abs(arrays["bias"])).all()


@pytest.mark.parametrize(("weights", "sms"), [("fp8", WIDE), ("int8", WIDE), ("int4", WIDE), ("fp8", (86,))])
def test_block_equals_the_portable_ops(weights: str, sms: tuple[int, ...]) -> None:
    source = block(64, group_size=16)
    model, rewrite = lowered(source, weights, sms)
    rng = np.random.default_rng(1)
    inputs = {name: rng.normal(size=(2, 1, 64)).astype(np.float32) for name in ("shift", "scale")}
    inputs["x"] = rng.normal(size=(2, 5, 64)).astype(np.float32)
    expected, got = run(source, inputs)["y"], run(model, inputs)["y"]
    assert len(rewrite.probes) == 6 and all(row.exact for row in rewrite.probes)
    # Same operations in the same order outside of the GEMMs, which are exact: no rounding can differ.
    assert np.array_equal(got, expected)


def test_linears_that_share_a_quantizer_share_its_operand() -> None:
    model, rewrite = lowered(block(64))
    assert len({rewrite.probes[i].codes for i in range(3)}) == 1
    quantizers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantizers) == 4  # q, k and v share one


def test_same_graph_gives_the_same_bytes() -> None:
    first, second = (lowered(block(64, group_size=16))[0].SerializeToString() for _ in range(2))
    assert first == second


def test_weights_are_converted_only_when_written() -> None:
    model = ir.from_proto(single(Linear("layer")))
    LowerRtx(gemm_rows("fp8", WIDE))(model)
    assert isinstance(model.graph.initializers["layer.rtx_weight"].const_value, ir.LazyTensor)


def test_writing_holds_one_weight_at_a_time(tmp_path: Path) -> None:
    width, count = 256, 16
    graph = Graph()
    quantized = graph.quantize("x", "E2M3", "shared")
    for index in range(count):
        graph.linear(quantized, Linear(f"layer{index}", width, width, group_size=64, seed=index), f"y{index}")
    portable = tmp_path / "portable.onnx"
    source = graph.model(width, {f"y{i}": width for i in range(count)})
    onnx.save(source, portable, save_as_external_data=True, location="portable.data")
    tracemalloc.start()
    model = ir.load(portable)
    LowerRtx(gemm_rows("fp8", WIDE))(model)
    ir.save(model, tmp_path / "model.onnx", external_data="model.data", size_threshold_bytes=1024)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Converting one weight takes below 20 bytes per element (codes, two int16 images, a 64-bit index, the result);
    # the graph itself is a few kB per layer. All weights at once would be 16 times the first term.
    assert peak < 20 * width**2 + count * 60_000 < 20 * width**2 * count / 3


def test_nothing_of_the_dialect_and_no_packed_weight_is_left() -> None:
    model, _ = lowered(block(64, group_size=16))
    assert not model.functions and {node.domain for node in model.graph.node} == {""}
    assert not [t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.UINT8]


def test_an_op_that_was_not_packed_is_an_error_that_names_it() -> None:
    graph = Graph()
    quantized = graph.quantize("x", "E2M3", "stray")
    graph.linear(graph.quantize("x", "E2M3", "layer/quantize"), Linear("layer"), "y")
    graph.nodes.append(onnx.helper.make_node("Identity", [quantized[1]], ["scale_out"]))
    model = graph.model(64, {"y": 48, "scale_out": 1})
    with pytest.raises(ContractError, match=r"1 nodes.*stray \(QuantizeActivation\)"):
        lowered(model)


def test_a_format_without_any_path_is_refused_with_every_reason() -> None:
    rows = gemm_rows("fp8", (86,))[:2]
    with pytest.raises(ContractError, match=r"layer: no way to run E4M3 x E2M1; int8: E4M3 does not embed.*2 limbs"):
        LowerRtx(rows)(ir.from_proto(single(Linear("layer", activation="E4M3"))))


def test_four_bit_storage_falls_back_where_it_has_no_decoder() -> None:
    _, rewrite = lowered(single(Linear("layer", weight="E2M3")), "int4")
    assert rewrite.choices[0].path == "fp8" and "not a signed 4-bit format" in rewrite.choices[0].why


def test_the_choice_says_when_a_sum_may_round() -> None:
    _, rewrite = lowered(single(Linear("layer", activation="E4M3")))
    assert "not every float32 sum is exact" in rewrite.choices[0].why and not rewrite.probes[0].exact


def test_multipliers_of_the_models_are_those_of_the_format() -> None:
    assert Linear("layer", group_size=16).multipliers == exact_multipliers("E2M1")
