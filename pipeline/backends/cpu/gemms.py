"""The GEMM forms of the CPU lowering: one function per path, each emits nodes and says where the proof looks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from pipeline.backends.cpu.quantizers import Operand
from pipeline.passes.emit import MICROSOFT, Emitter
from pipeline.passes.quantized_gemm import GemmSpec, unit_scales, weight_image

INT8, FLOAT, FLOAT16 = ir.DataType.INT8, ir.DataType.FLOAT, ir.DataType.FLOAT16


@dataclass(frozen=True)
class Product:
    """A GEMM's result [..., N]: with weight scales applied, before token scale and bias.

    probed: the tensor that equals float32(integer sum) * `scales`; scales: the initializer [N], or '' for none.
    token_scale: what is left to multiply with, [..., 1] or None.
    """

    value: ir.Value
    probed: ir.Value
    scales: str
    token_scale: ir.Value | None


def integer_gemm(emit: Emitter, spec: GemmSpec, a: Operand) -> Product:
    """u8 x s8 -> float32(int32 sum) * scale. One limb is a single fused op of onnxruntime."""
    w = image_initializer(emit, spec)
    scales = emit.lazy(f"{spec.layer}.unit_scales", FLOAT, (spec.out_features,), partial(unit_scales, spec))
    zero = emit.constant(a.zero, np.uint8)
    if len(a.codes) == 1:
        one = emit.constant(1.0)
        y = emit.op("MatMulIntegerToFloat", a.codes[0], w, one, scales, zero, name="product", domain=MICROSOFT)
        return Product(y, y, str(scales.name), a.scale)
    total = _limb_sum(emit, a.codes, a.weights, w, zero)
    y = emit.op("Mul", emit.op("Cast", total, name="sum_f32", to=FLOAT), scales, name="product")
    return Product(y, y, str(scales.name), a.scale)


def grouped_gemm(emit: Emitter, spec: GemmSpec, a: Operand) -> Product:
    """S sums per output, each scaled by its group, then added in float32."""
    return _scaled_groups(emit, spec, a) if spec.activation_group else _fused_groups(emit, spec, a)


def _scaled_groups(emit: Emitter, spec: GemmSpec, a: Operand) -> Product:
    """Scales of tokens by group as well: [S, M, K/S] x [S, K/S, N] in int32, and the integer sums are probed."""
    w = image_initializer(emit, spec)
    groups, k, n = spec.sum_groups, spec.sum_length, spec.out_features
    w = emit.op("Reshape", w, emit.constant([groups, k, n], np.int64), name="grouped_weight")
    scales = _channel_scales(emit, spec)
    shape = emit.constant([-1, groups, k], np.int64)
    rows = [emit.op("Reshape", code, shape, name=f"rows_{i}") for i, code in enumerate(a.codes)]
    turned = tuple(emit.op("Transpose", row, name=f"grouped_{i}", perm=[1, 0, 2]) for i, row in enumerate(rows))
    total = _limb_sum(emit, turned, a.weights, w, emit.constant(a.zero, np.uint8))
    sums = emit.op("Cast", total, name="sum_f32", to=FLOAT)
    scaled = emit.op(
        "Mul", emit.op("Mul", sums, scales, name="scaled"), _group_scales(emit, spec, a), name="scaled_groups"
    )
    flat = emit.op("ReduceSum", scaled, emit.constant([0], np.int64), name="flat", keepdims=0)
    y = emit.op("Reshape", flat, _shape_like(emit, a.x, n), name="product")
    return Product(y, sums, "", None)


def _fused_groups(emit: Emitter, spec: GemmSpec, a: Operand) -> Product:
    """One fused op of onnxruntime for each group and limb: its integer sums never reach the memory."""
    w, groups, k = image_initializer(emit, spec), spec.sum_groups, spec.sum_length
    scales = emit.lazy(f"{spec.layer}.unit_scales", FLOAT, (groups, spec.out_features), partial(_sum_scales, spec))
    zero, parts = emit.constant(a.zero, np.uint8), []
    for group in range(groups):
        weight = _slice(emit, w, group * k, k, 0, f"weight_{group}")
        weight.shape = ir.Shape((k, spec.out_features))
        scale = emit.op("Gather", scales, emit.constant(group, np.int64), name=f"scales_{group}", axis=0)
        for i, (code, limb) in enumerate(zip(a.codes, a.weights, strict=True)):
            rows = _slice(emit, code, group * k, k, -1, f"rows_{group}_{i}")
            given = (rows, weight, emit.constant(float(limb)), scale, zero)
            parts.append(emit.op("MatMulIntegerToFloat", *given, name=f"product_{group}_{i}", domain=MICROSOFT))
    y = emit.op("Sum", *parts, name="product")
    return Product(y, y, "", a.scale)


def _slice(emit: Emitter, value: ir.Value, start: int, length: int, axis: int, name: str) -> ir.Value:
    ends = (emit.constant([place], np.int64) for place in (start, start + length, axis))
    return emit.op("Slice", value, *ends, name=name)


def _channel_scales(emit: Emitter, spec: GemmSpec) -> ir.Value:
    """Weight scales [S, 1, N], or [1, 1, N] where a channel has one for all sums."""
    rows, n = (spec.sum_groups, spec.out_features) if spec.real_groups else (1, spec.out_features)
    made = partial(_sum_scales, spec) if spec.real_groups else lambda: unit_scales(spec)[None]
    scales = emit.lazy(f"{spec.layer}.unit_scales", FLOAT, (rows, n), made)
    return emit.op("Reshape", scales, emit.constant([rows, 1, n], np.int64), name="grouped_scales")


def _sum_scales(spec: GemmSpec) -> NDArray[np.float32]:
    """[S, N]: scales of the weight's groups, each as often as it spans sums."""
    found = unit_scales(spec).reshape(spec.scale_groups, -1)
    return np.repeat(found, spec.sum_groups // spec.scale_groups, axis=0)


def _group_scales(emit: Emitter, spec: GemmSpec, a: Operand) -> ir.Value:
    """Scales of tokens and groups [M, A, 1] as [S, M, 1], each as often as it spans sums."""
    scale, times = a.scale, spec.sum_groups // spec.activation_groups
    if times > 1:
        scale = emit.op("Expand", scale, emit.constant([1, 1, times], np.int64), name="spread_scales")
        scale = emit.op("Reshape", scale, emit.constant([-1, spec.sum_groups, 1], np.int64), name="sum_scales")
    return emit.op("Transpose", scale, name="turned_scales", perm=[1, 0, 2])


def float_gemm(emit: Emitter, spec: GemmSpec, image: ir.Value, scale: ir.Value | None) -> Product:
    """image f32 (integers, of an activation) times the weight's image or values, in float32; then times `scale`."""
    w, exponent = _stored_weight(emit, spec)
    shape = (spec.groups, 1, spec.out_features) if spec.real_groups else (spec.out_features,)
    scales = emit.lazy(f"{spec.layer}.scales_f32", FLOAT, shape, partial(_float_scales, spec, exponent))
    if spec.real_groups:
        grouped = emit.constant([spec.groups, spec.group_size, spec.out_features], np.int64)
        scaled = emit.op("Mul", emit.op("Reshape", w, grouped, name="grouped_weight"), scales, name="scaled_weight")
        w = emit.op("Reshape", scaled, emit.constant([-1, spec.out_features], np.int64), name="weight")
        y = emit.op("MatMul", image, w, name="product")
    else:
        y = emit.op("Mul", emit.op("MatMul", image, w, name="unscaled"), scales, name="product")
    return Product(y, y, "", scale)


def ungrouped(emit: Emitter, image: ir.Value, scale: ir.Value | None, x: ir.Value) -> ir.Value:
    """image [M, groups, group] times scale [M, groups, 1], in the shape of x [..., K]."""
    scaled = emit.op("Mul", image, scale, name="scaled_groups")
    return emit.op("Reshape", scaled, emit.op("Shape", x, name="like"), name="ungrouped")


def image_initializer(emit: Emitter, spec: GemmSpec) -> ir.Value:
    """The weight's integer image as int8 [K, N]."""
    shape = (spec.in_features, spec.out_features)
    return emit.lazy(f"{spec.layer}.image", INT8, shape, partial(weight_image, spec))


def finish(emit: Emitter, product: Product, bias: ir.Value | None) -> ir.Value:
    """product (* token scale) (+ bias)."""
    y, scale = product.value, product.token_scale
    y = y if scale is None else emit.op("Mul", y, scale, name="scaled_tokens")
    return emit.op("Add", y, bias, name="output") if bias is not None else y


def _limb_sum(
    emit: Emitter, codes: tuple[ir.Value, ...], weights: tuple[int, ...], w: ir.Value, zero: ir.Value
) -> ir.Value:
    """sum_i weights[i] * (codes[i] - zero) @ w in int32."""
    total: ir.Value | None = None
    for i, (code, weight) in enumerate(zip(codes, weights, strict=True)):
        part = emit.op("MatMulInteger", code, w, zero, name=f"sum_{i}")
        if weight != 1:
            part = emit.op("Mul", part, emit.constant(weight, np.int32), name=f"weighted_{i}")
        total = part if total is None else emit.op("Add", total, part, name="sum")
    assert total is not None
    return total


def _shape_like(emit: Emitter, tensor: ir.Value, n: int) -> ir.Value:
    """Shape [..., n] for a tensor [..., any]."""
    leading = emit.op("Shape", tensor, name="leading", end=-1)
    return emit.op("Concat", leading, emit.constant([n], np.int64), name="shape", axis=0)


def _stored_weight(emit: Emitter, spec: GemmSpec) -> tuple[ir.Value, int]:
    """(float32 [K, N] = value * multiplier * 2^e, e): from the int8 image (e = f), else from float16 values (e = 0)."""
    if spec.weight_kmax <= np.iinfo(np.int8).max:
        stored, exponent = image_initializer(emit, spec), spec.weight.fraction_bits
    else:
        stored, exponent = _half_values(emit, spec), 0
    return emit.op("Cast", stored, name="weight_f32", to=FLOAT), exponent


def _half_values(emit: Emitter, spec: GemmSpec) -> ir.Value:
    """Weight values times multiplier as float16 [K, N]: exact, while images of 8-bit floats leave float16's range."""
    unit = np.float32(2.0**-spec.weight.fraction_bits)
    shape = (spec.in_features, spec.out_features)
    values = partial(_scaled_image, spec, unit)
    return emit.lazy(f"{spec.layer}.values", FLOAT16, shape, values)


def _scaled_image(spec: GemmSpec, unit: np.float32) -> NDArray[np.float16]:
    return (weight_image(spec, np.float32) * unit).astype(np.float16)


def _float_scales(spec: GemmSpec, weight_exponent: int) -> NDArray[np.float32]:
    """Scales of the float path, [N] or [groups, 1, N], for a weight that is its values times 2^weight_exponent."""
    scales = unit_scales(spec, spec.weight.fraction_bits - weight_exponent)
    return scales[:, None] if spec.real_groups else scales
