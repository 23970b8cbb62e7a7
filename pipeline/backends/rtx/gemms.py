"""Emits one quantized linear of the `rtx` graph: weight constant, a MatMul per limb, scales, bias."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.formats.format import get_format
from pipeline.backends.rtx.choose import Plan
from pipeline.backends.rtx.emit import STORED, RtxEmitter
from pipeline.backends.rtx.operands import decoding_lines
from pipeline.backends.rtx.quantizers import Token
from pipeline.backends.rtx.weights import PackedWeight


def emit_gemm(
    emit: RtxEmitter, weight: PackedWeight, plan: Plan, token: Token, limbs: tuple[ir.Value, ...], bias: ir.Value | None
) -> tuple[ir.Value, ir.Value]:
    """(output [..., N] float32, raw GEMM result)."""
    if plan.row.real_groups:
        gemm, channel = _emit_half(emit, weight, plan, limbs[0])
    else:
        gemm, channel = _emit_exact(emit, weight, plan, limbs), weight.scales[:, 0]
        gemm = _emit_unshifted(emit, weight, plan, gemm) if plan.operand.shift else gemm
    # image * 2^exponent stands for value * 2^(f + exponent) on both sides; powers of two leave the scale exact.
    unit = plan.operand.gain * weight_gain(weight, plan)
    channel = channel if weight.activation_scale is None else channel * weight.activation_scale
    scaled = emit.op("Mul", gemm, _vector(emit, "rtx_scale", (channel / unit).astype(np.float32)), name="channel_scale")
    scaled = scaled if token.scale is None else emit.op("Mul", scaled, token.scale, name="token_scale")
    if not weight.has_bias:
        return scaled, gemm
    return emit.op("Add", scaled, bias, name="bias"), gemm


def weight_gain(weight: PackedWeight, plan: Plan) -> float:
    """Weight operand per unit of value; those of a half-precision GEMM are values already."""
    return 1.0 if plan.row.real_groups else 2.0 ** (get_format(weight.format).fraction_bits + plan.weight_exponent)


def _vector(emit: RtxEmitter, name: str, array: NDArray[np.float32]) -> ir.Value:
    return emit.lazy(f"{emit.prefix}.{name}", ir.DataType.FLOAT, array.shape, lambda: array)


def matmul_names(layer: str, limbs: int) -> tuple[str, ...]:
    """Names of the MatMul nodes of a linear; the engine's plan shows them."""
    return (f"{layer}/matmul",) if limbs == 1 else (f"{layer}/matmul_high", f"{layer}/matmul_low")


def _emit_exact(emit: RtxEmitter, weight: PackedWeight, plan: Plan, limbs: tuple[ir.Value, ...]) -> ir.Value:
    operand = (_emit_decoded if plan.row.weight_type == "INT4" else _emit_stored)(emit, weight, plan)
    if len(limbs) == 1:
        return emit.op("MatMul", limbs[0], operand, name="matmul")
    names = zip(matmul_names("", 2), limbs, strict=True)
    high, low = (emit.op("MatMul", limb, operand, name=name[1:]) for name, limb in names)
    factor = plan.operand.limb_weights[0]
    high = emit.op("Mul", high, emit.constant(factor), name="high_weighted") if factor != 1 else high
    return emit.op("Add", high, low, name="limb_sum")


def _emit_unshifted(emit: RtxEmitter, weight: PackedWeight, plan: Plan, gemm: ir.Value) -> ir.Value:
    """The sum of whole images: shift * (sum of each channel's weight operands) added, exact as the sums are."""
    sums = weight.images().sum(axis=1, dtype=np.int64) * 2.0**plan.weight_exponent * plan.operand.shift
    return emit.op("Add", gemm, _vector(emit, "rtx_shift", sums.astype(np.float32)), name="unshifted")


def _emit_stored(emit: RtxEmitter, weight: PackedWeight, plan: Plan) -> ir.Value:
    """Weight operand [K, N] kept in the hardware type."""
    kind, shape = plan.row.weight_type, (weight.in_features, weight.out_features)
    make = partial(weight.stored, kind, plan.weight_exponent)
    stored = emit.lazy(f"{weight.layer}.rtx_weight", STORED[kind], shape, make)
    return emit.op("DequantizeLinear", stored, emit.constant(1.0), name="weight")


def _emit_decoded(emit: RtxEmitter, weight: PackedWeight, plan: Plan) -> ir.Value:
    """Weight operand [K, N] kept as 4-bit indices, decoded in every inference: sign * max(lines) * multiplier."""
    shape = (weight.in_features, weight.out_features)
    stored = emit.lazy(f"{weight.layer}.rtx_weight", STORED["INT4"], shape, weight.signed_indices)
    index = emit.op("DequantizeLinear", stored, emit.constant(1.0), name="index")
    value = _emit_lines(emit, index, decoding_lines(weight.format), 2.0**plan.weight_exponent)
    if len(weight.table) > 1:
        value = _emit_multiplied(emit, weight, value)
    return emit.quantize_dequantize(value, plan.row.activation_type, "weight")


def _emit_lines(emit: RtxEmitter, index: ir.Value, lines: tuple[tuple[float, float], ...], unit: float) -> ir.Value:
    """image(|index|) * sign * unit."""
    if len(lines) == 1:
        slope = lines[0][0] * unit
        return emit.op("Mul", index, emit.constant(slope), name="decoded") if slope != 1 else index
    size, values = emit.op("Abs", index, name="index_size"), []
    for number, (slope, intercept) in enumerate(lines):
        line = emit.op("Mul", size, emit.constant(slope * unit), name=f"line{number}")
        values.append(
            emit.op("Add", line, emit.constant(intercept * unit), name=f"line{number}_at") if intercept else line
        )
    return emit.op("Mul", emit.op("Sign", index, name="sign"), emit.op("Max", *values, name="image"), name="decoded")


def _emit_multiplied(emit: RtxEmitter, weight: PackedWeight, value: ir.Value) -> ir.Value:
    groups, n = weight.groups, weight.out_features
    stored = emit.lazy(f"{weight.layer}.rtx_multipliers", STORED["INT8"], (groups, 1, n), weight.multiplier_rows)
    factor = emit.op("DequantizeLinear", stored, emit.constant(1.0), name="multipliers")
    grouped = emit.op("Reshape", value, emit.constant([groups, -1, n], np.int64), name="grouped")
    product = emit.op("Mul", grouped, factor, name="multiplied")
    return emit.op("Reshape", product, emit.constant([-1, n], np.int64), name="ungrouped")


def _emit_half(emit: RtxEmitter, weight: PackedWeight, plan: Plan, activation: ir.Value) -> tuple[ir.Value, NDArray]:
    """Half-precision GEMM of weights with their group scales, normalized per channel so that nothing overflows."""
    channel = weight.channel_units()
    operand = emit.cast(activation, ir.DataType.FLOAT16, "operand")
    half = emit.op("MatMul", operand, _HALF_WEIGHTS[plan.row.weight_type](emit, weight, plan, channel), name="matmul")
    return emit.cast(half, ir.DataType.FLOAT, "gemm"), channel


def _emit_half_stored(emit: RtxEmitter, weight: PackedWeight, plan: Plan, channel: NDArray[np.float32]) -> ir.Value:
    shape = (weight.in_features, weight.out_features)
    return emit.lazy(f"{weight.layer}.rtx_weight", STORED["FP16"], shape, partial(weight.dequantized_half, channel))


def _emit_half_blocks(emit: RtxEmitter, weight: PackedWeight, plan: Plan, channel: NDArray[np.float32]) -> ir.Value:
    """Weight kept in 8 or 4 bits with an FP16 scale per group, expanded to FP16 in every inference."""
    kind, shape = plan.row.weight_type, (weight.in_features, weight.out_features)
    make = weight.signed_indices if kind == "INT4" else partial(weight.stored, kind, plan.weight_exponent)
    stored = emit.lazy(f"{weight.layer}.rtx_weight", STORED[kind], shape, make)
    unit = 2.0 ** -(get_format(weight.format).fraction_bits + plan.weight_exponent)
    scales_shape, scales = (weight.groups, weight.out_features), partial(weight.group_scales_half, channel, unit)
    scale = emit.lazy(f"{weight.layer}.rtx_group_scale", STORED["FP16"], scales_shape, scales)
    return emit.op("DequantizeLinear", stored, scale, name="weight", axis=0, block_size=weight.group_size)


_HALF_WEIGHTS = {"FP16": _emit_half_stored, "E4M3": _emit_half_blocks, "INT4": _emit_half_blocks}
