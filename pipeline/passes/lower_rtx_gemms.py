"""Emits one quantized linear of the `rtx` graph: weight constant, a MatMul per limb, scales, bias."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.formats import get_format
from pipeline.passes.lower_rtx_activations import Token
from pipeline.passes.lower_rtx_choice import Plan
from pipeline.passes.lower_rtx_emit import STORED, RtxEmitter
from pipeline.passes.lower_rtx_weights import PackedWeight


def emit_gemm(
    emit: RtxEmitter, weight: PackedWeight, plan: Plan, token: Token, limbs: tuple[ir.Value, ...], bias: ir.Value | None
) -> tuple[ir.Value, ir.Value]:
    """(output [..., N] float32, raw GEMM result)."""
    if plan.row.real_groups:
        gemm, channel = _emit_half(emit, weight, limbs[0])
    else:
        gemm, channel = _emit_exact(emit, weight, plan, limbs), weight.scales[:, 0]
    # image * 2^exponent stands for value * 2^(f + exponent) on both sides; powers of two leave the scale exact.
    unit = np.float32(plan.operand.gain * 2.0 ** (weight_fraction(weight, plan) + plan.weight_exponent))
    scaled = emit.op("Mul", gemm, _vector(emit, "rtx_scale", channel / unit), name="channel_scale")
    scaled = emit.op("Mul", scaled, token.scale, name="token_scale")
    if not weight.has_bias:
        return scaled, gemm
    return emit.op("Add", scaled, bias, name="bias"), gemm


def weight_fraction(weight: PackedWeight, plan: Plan) -> int:
    """f of the weight's image; weights of a half-precision GEMM are values already."""
    return 0 if plan.row.real_groups else get_format(weight.format).fraction_bits


def _vector(emit: RtxEmitter, name: str, array: NDArray[np.float32]) -> ir.Value:
    return emit.lazy(f"{emit.prefix}.{name}", ir.DataType.FLOAT, array.shape, lambda: array)


def _emit_exact(emit: RtxEmitter, weight: PackedWeight, plan: Plan, limbs: tuple[ir.Value, ...]) -> ir.Value:
    kind, shape = plan.row.weight_type, (weight.in_features, weight.out_features)
    stored = emit.lazy(
        f"{weight.layer}.rtx_weight", STORED[kind], shape, partial(weight.stored, kind, plan.weight_exponent)
    )
    operand = emit.op("DequantizeLinear", stored, emit.constant(1.0), name="weight")
    if len(limbs) == 1:
        return emit.op("MatMul", limbs[0], operand, name="matmul")
    high, low = (
        emit.op("MatMul", limb, operand, name=f"matmul_{part}")
        for part, limb in zip(("high", "low"), limbs, strict=True)
    )
    factor = plan.operand.limb_weights[0]
    high = emit.op("Mul", high, emit.constant(factor), name="high_weighted") if factor != 1 else high
    return emit.op("Add", high, low, name="limb_sum")


def _emit_half(emit: RtxEmitter, weight: PackedWeight, activation: ir.Value) -> tuple[ir.Value, NDArray[np.float32]]:
    """Half-precision GEMM of weights with their group scales, normalized per channel so that nothing overflows."""
    channel = weight.channel_units()
    shape = (weight.in_features, weight.out_features)
    stored = emit.lazy(f"{weight.layer}.rtx_weight", STORED["FP16"], shape, partial(weight.dequantized_half, channel))
    operand = emit.cast(activation, ir.DataType.FLOAT16, "operand")
    half = emit.op("MatMul", operand, stored, name="matmul")
    return emit.cast(half, ir.DataType.FLOAT, "gemm"), channel
