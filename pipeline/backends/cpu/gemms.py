"""The GEMM forms of the CPU lowering: one function per path, each emits nodes and says where the proof looks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.dialect.graph import MICROSOFT, GraphBuilder
from pipeline.backends.cpu.quantizers import Operand
from pipeline.passes.quantized_gemm import QuantizedGemm

INT8, FLOAT, FLOAT16 = ir.DataType.INT8, ir.DataType.FLOAT, ir.DataType.FLOAT16


@dataclass(frozen=True)
class Product:
    """A GEMM's result [..., N]: with weight scales applied, before token scale and bias.

    probed: the tensor that equals float32(integer sum) * `scales`; scales: the initializer [N], None for none.
    token_scale: what is left to multiply with, [..., 1] or None.
    """

    value: ir.Value
    probed: ir.Value
    scales: ir.Value | None
    token_scale: ir.Value | None


def integer_gemm(build: GraphBuilder, gemm: QuantizedGemm, a: Operand) -> Product:
    """u8 x s8 -> float32(int32 sum) * scale. One limb is a single fused op of onnxruntime."""
    w, scales, zero = _constants(build, gemm, a)
    if len(a.codes) == 1:
        one = build.constant(1.0)
        y = build.op("MatMulIntegerToFloat", a.codes[0], w, one, scales, zero, name="product", domain=MICROSOFT)
        return Product(y, y, scales, a.scale)
    total = _limb_sum(build, a.codes, a.weights, w, zero)
    y = build.op("Mul", build.op("Cast", total, name="sum_f32", to=FLOAT), scales, name="product")
    return Product(y, y, scales, a.scale)


def _constants(build: GraphBuilder, gemm: QuantizedGemm, a: Operand) -> tuple[ir.Value, ir.Value, ir.Value]:
    """(weight int8 [K, N], scales [N], zero point of the activation)."""
    w = stored_integers(build, gemm)
    scales = build.lazy(f"{gemm.layer}.unit_scales", FLOAT, (gemm.out_features,), gemm.unit_scales)
    return w, scales, build.constant(a.zero, np.uint8)


def grouped_gemm(build: GraphBuilder, gemm: QuantizedGemm, a: Operand) -> Product:
    """S sums per output, each scaled by its group, then added in float32."""
    return _scaled_groups(build, gemm, a) if gemm.activation_group else _fused_groups(build, gemm, a)


def _scaled_groups(build: GraphBuilder, gemm: QuantizedGemm, a: Operand) -> Product:
    """Scales of tokens by group as well: [S, M, K/S] x [S, K/S, N] in int32, and the integer sums are probed."""
    w = stored_integers(build, gemm)
    groups, k, n = gemm.sum_groups, gemm.sum_length, gemm.out_features
    w = build.op("Reshape", w, build.constant([groups, k, n], np.int64), name="grouped_weight")
    scales = _channel_scales(build, gemm)
    shape = build.constant([-1, groups, k], np.int64)
    rows = [build.op("Reshape", code, shape, name=f"rows_{i}") for i, code in enumerate(a.codes)]
    turned = tuple(build.op("Transpose", row, name=f"grouped_{i}", perm=[1, 0, 2]) for i, row in enumerate(rows))
    total = _limb_sum(build, turned, a.weights, w, build.constant(a.zero, np.uint8))
    sums = build.op("Cast", total, name="sum_f32", to=FLOAT)
    scaled = build.op(
        "Mul", build.op("Mul", sums, scales, name="scaled"), _group_scales(build, gemm, a), name="scaled_groups"
    )
    flat = build.op("ReduceSum", scaled, build.constant([0], np.int64), name="flat", keepdims=0)
    y = build.op("Reshape", flat, _shape_like(build, a.x, n), name="product")
    return Product(y, sums, None, None)


def _fused_groups(build: GraphBuilder, gemm: QuantizedGemm, a: Operand) -> Product:
    """One fused op of onnxruntime for each group and limb: its integer sums never reach the memory."""
    w, groups, k = stored_integers(build, gemm), gemm.sum_groups, gemm.sum_length
    scales = build.lazy(f"{gemm.layer}.unit_scales", FLOAT, (groups, gemm.out_features), partial(_sum_scales, gemm))
    zero, parts = build.constant(a.zero, np.uint8), []
    for group in range(groups):
        weight = _slice(build, w, group * k, k, 0, f"weight_{group}")
        weight.shape = ir.Shape((k, gemm.out_features))
        scale = build.op("Gather", scales, build.constant(group, np.int64), name=f"scales_{group}", axis=0)
        for i, (code, limb) in enumerate(zip(a.codes, a.weights, strict=True)):
            rows = _slice(build, code, group * k, k, -1, f"rows_{group}_{i}")
            operands = (rows, weight, build.constant(float(limb)), scale, zero)
            parts.append(build.op("MatMulIntegerToFloat", *operands, name=f"product_{group}_{i}", domain=MICROSOFT))
    y = build.op("Sum", *parts, name="product")
    return Product(y, y, None, a.scale)


def _slice(build: GraphBuilder, value: ir.Value, start: int, length: int, axis: int, name: str) -> ir.Value:
    ends = (build.constant([place], np.int64) for place in (start, start + length, axis))
    return build.op("Slice", value, *ends, name=name)


def _channel_scales(build: GraphBuilder, gemm: QuantizedGemm) -> ir.Value:
    """Weight scales [S, 1, N], or [1, 1, N] where a channel has one for all sums."""
    rows, n = (gemm.sum_groups, gemm.out_features) if gemm.real_groups else (1, gemm.out_features)
    make = partial(_sum_scales, gemm) if gemm.real_groups else lambda: gemm.unit_scales()[None]
    scales = build.lazy(f"{gemm.layer}.unit_scales", FLOAT, (rows, n), make)
    return build.op("Reshape", scales, build.constant([rows, 1, n], np.int64), name="grouped_scales")


def _sum_scales(gemm: QuantizedGemm) -> NDArray[np.float32]:
    """[S, N]: scales of the weight's groups, each as often as it spans sums."""
    scales = gemm.unit_scales().reshape(gemm.scale_groups, -1)
    return np.repeat(scales, gemm.sum_groups // gemm.scale_groups, axis=0)


def _group_scales(build: GraphBuilder, gemm: QuantizedGemm, a: Operand) -> ir.Value:
    """Scales of tokens and groups [M, A, 1] as [S, M, 1], each as often as it spans sums."""
    scale, times = a.scale, gemm.sum_groups // gemm.activation_groups
    if times > 1:
        scale = build.op("Expand", scale, build.constant([1, 1, times], np.int64), name="spread_scales")
        scale = build.op("Reshape", scale, build.constant([-1, gemm.sum_groups, 1], np.int64), name="sum_scales")
    return build.op("Transpose", scale, name="turned_scales", perm=[1, 0, 2])


def float_gemm(build: GraphBuilder, gemm: QuantizedGemm, a: Operand) -> Product:
    """The activation's integers in float32 times the weight's integers or values."""
    integers, scale = a.codes[0], a.scale
    if gemm.activation_group:  # [M, groups, group] times [M, groups, 1], in the shape of x
        scaled = build.op("Mul", integers, scale, name="scaled_groups")
        integers = build.op("Reshape", scaled, build.op("Shape", a.x, name="like"), name="ungrouped")
        scale = None
    w, exponent = _stored_weight(build, gemm)
    shape = (gemm.weight_groups, 1, gemm.out_features) if gemm.real_groups else (gemm.out_features,)
    scales = build.lazy(f"{gemm.layer}.scales_f32", FLOAT, shape, partial(_float_scales, gemm, exponent))
    if gemm.real_groups:
        grouped = build.constant([gemm.weight_groups, gemm.group_size, gemm.out_features], np.int64)
        scaled = build.op("Mul", build.op("Reshape", w, grouped, name="grouped_weight"), scales, name="scaled_weight")
        w = build.op("Reshape", scaled, build.constant([-1, gemm.out_features], np.int64), name="weight")
        y = build.op("MatMul", integers, w, name="product")
    else:
        y = build.op("Mul", build.op("MatMul", integers, w, name="unscaled"), scales, name="product")
    return Product(y, y, None, scale)


def stored_integers(build: GraphBuilder, gemm: QuantizedGemm) -> ir.Value:
    """The weight's integers as int8 [K, N]."""
    shape = (gemm.in_features, gemm.out_features)
    return build.lazy(f"{gemm.layer}.image", INT8, shape, gemm.turned_integers)


def finish(build: GraphBuilder, product: Product, bias: ir.Value | None) -> ir.Value:
    """product (* token scale) (+ bias)."""
    y, scale = product.value, product.token_scale
    y = y if scale is None else build.op("Mul", y, scale, name="scaled_tokens")
    return build.op("Add", y, bias, name="output") if bias is not None else y


def _limb_sum(
    build: GraphBuilder, codes: tuple[ir.Value, ...], weights: tuple[int, ...], w: ir.Value, zero: ir.Value
) -> ir.Value:
    """sum_i weights[i] * (codes[i] - zero) @ w in int32."""
    total: ir.Value | None = None
    for i, (code, weight) in enumerate(zip(codes, weights, strict=True)):
        part = build.op("MatMulInteger", code, w, zero, name=f"sum_{i}")
        if weight != 1:
            part = build.op("Mul", part, build.constant(weight, np.int32), name=f"weighted_{i}")
        total = part if total is None else build.op("Add", total, part, name="sum")
    assert total is not None
    return total


def _shape_like(build: GraphBuilder, tensor: ir.Value, n: int) -> ir.Value:
    """Shape [..., n] for a tensor [..., any]."""
    leading = build.op("Shape", tensor, name="leading", end=-1)
    return build.op("Concat", leading, build.constant([n], np.int64), name="shape", axis=0)


def _stored_weight(build: GraphBuilder, gemm: QuantizedGemm) -> tuple[ir.Value, int]:
    """(float32 [K, N] = value * multiplier * 2^e, e): from int8 integers (e = f), else from float16 values (e = 0)."""
    if gemm.weight_kmax <= np.iinfo(np.int8).max:
        stored, exponent = stored_integers(build, gemm), gemm.weight.fraction_bits
    else:
        stored, exponent = _half_values(build, gemm), 0
    return build.op("Cast", stored, name="weight_f32", to=FLOAT), exponent


def _half_values(build: GraphBuilder, gemm: QuantizedGemm) -> ir.Value:
    """Weight values times multiplier as float16 [K, N]: exact, while integers of 8-bit floats leave float16's range."""
    unit = np.float32(2.0**-gemm.weight.fraction_bits)
    shape = (gemm.in_features, gemm.out_features)
    values = partial(_scaled_integers, gemm, unit)
    return build.lazy(f"{gemm.layer}.values", FLOAT16, shape, values)


def _scaled_integers(gemm: QuantizedGemm, unit: np.float32) -> NDArray[np.float16]:
    return (gemm.turned_integers(np.float32) * unit).astype(np.float16)


def _float_scales(gemm: QuantizedGemm, weight_exponent: int) -> NDArray[np.float32]:
    """Scales of the float path, [N] or [groups, 1, N], for a weight that is its values times 2^weight_exponent."""
    scales = gemm.unit_scales(gemm.weight.fraction_bits - weight_exponent)
    return scales[:, None] if gemm.real_groups else scales
