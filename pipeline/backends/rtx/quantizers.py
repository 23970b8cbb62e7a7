"""Standard ops that quantize activations into hardware operands (`rtx` lowering).

The arithmetic is that of QuantizeActivation: scale = max(absmax, floor) / max_value, v = x / scale, both in float32, so
codes are the same; every further factor is a power of two and therefore exact. QuantizeStatic's v = (x - zero) / scale
likewise, with constants; what lies beyond the range is clipped, as hardware types reach further than the format.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from export.dialect.ops import ABSMAX_FLOOR
from export.formats.format import get_format
from pipeline.backends.rtx.emit import RtxEmitter
from pipeline.backends.rtx.operands import Operand


@dataclass(frozen=True)
class Token:
    """x: the float32 tensor that is quantized, [..., K]. value: x / scale. scale: [..., 1]; None for a constant, which
    belongs to the GEMM then."""

    x: ir.Value
    value: ir.Value
    scale: ir.Value | None


def emit_norm_modulate(emit: RtxEmitter, node: ir.Node, width: int) -> ir.Value:
    """LayerNorm(x, no affine) * (1 + scale) + shift of a NormModulateQuantize node, [B, S, width] float32."""
    x, shift, scale = node.inputs
    gamma = emit.ones(width)
    epsilon = node.attributes["epsilon"].as_float()
    normal = emit.op("LayerNormalization", x, gamma, name="norm", axis=-1, epsilon=epsilon)
    gain = emit.op("Add", scale, emit.constant(1.0), name="one_plus_scale")
    return emit.op("Add", emit.op("Mul", normal, gain, name="scaled"), shift, name="modulated")


def emit_token(emit: RtxEmitter, x: ir.Value, format_name: str) -> Token:
    """Per-token scale and scaled value of x."""
    absmax = emit.op(
        "ReduceMax", emit.op("Abs", x, name="abs"), emit.constant([-1], np.int64), name="absmax", keepdims=1
    )
    bounded = emit.op("Max", absmax, emit.constant(ABSMAX_FLOOR), name="bounded")
    scale = emit.op("Div", bounded, emit.constant(get_format(format_name).max_value), name="scale")
    return Token(x, emit.op("Div", x, scale, name="value"), scale)


def emit_static(emit: RtxEmitter, x: ir.Value, format_name: str, scale: float, zero: float) -> Token:
    """(x - zero) / scale within the range of the format."""
    fmt = get_format(format_name)
    shifted = emit.op("Sub", x, emit.constant(zero), name="above_zero") if zero else x
    value = emit.op("Div", shifted, emit.constant(scale), name="value")
    lowest = emit.constant(-fmt.max_value if fmt.sign_bits else 0.0)
    within = emit.op("Clip", value, lowest, emit.constant(fmt.max_value), name="within")
    return Token(x, within, None)


def emit_limbs(emit: RtxEmitter, token: Token, operand: Operand) -> tuple[ir.Value, ...]:
    """Operands as float32, high limb first: sum(limb * weight) = (image - shift) * 2^exponent. The GEMM casts those for
    FP16."""
    value, bounded = token.value, token.scale is None or _is_signed(operand.format)
    value = value if bounded else emit.op("Max", value, emit.constant(0.0), name="positive")
    value = value if operand.native else emit_round(emit, value, operand.format)
    scaled = emit.op("Mul", value, emit.constant(operand.gain), name="scaled_value") if operand.gain != 1 else value
    if operand.shift:
        scaled = emit.op("Sub", scaled, emit.constant(float(operand.shift)), name="shifted")
    if operand.type == "FP16":
        return (scaled,)
    if operand.limbs == 1:
        return (emit.quantize_dequantize(scaled, operand.type, "operand"),)
    return _emit_two_limbs(emit, scaled, operand)


def _is_signed(format_name: str) -> bool:
    fmt = get_format(format_name)
    return fmt.is_integer or bool(fmt.sign_bits)


def _emit_two_limbs(emit: RtxEmitter, scaled: ir.Value, operand: Operand) -> tuple[ir.Value, ...]:
    weight = operand.limb_weights[0]
    coarse = emit.op("Mul", scaled, emit.constant(1 / weight), name="coarse") if weight != 1 else scaled
    high = emit.quantize_dequantize(coarse, operand.type, "operand_high")
    taken = emit.op("Mul", high, emit.constant(weight), name="taken") if weight != 1 else high
    rest = emit.op("Sub", scaled, taken, name="rest")
    return (high, emit.quantize_dequantize(rest, operand.type, "operand_low"))


def emit_round(emit: RtxEmitter, value: ir.Value, format_name: str) -> ir.Value:
    """value rounded to the format's grid, ties to even. No clip: |value| <= max_value (1 + 2^-23) rounds down to it."""
    fmt = get_format(format_name)
    first = 2.0 ** (-fmt.fraction_bits)
    if not len(fmt.binade_starts):
        return _round_to(emit, value, emit.constant(first))
    magnitude, step = emit.op("Abs", value, name="magnitude"), emit.constant(first)
    for index, start in enumerate(fmt.binade_starts):
        reached = emit.op("GreaterOrEqual", magnitude, emit.constant(float(start)), name=f"binade{index}")
        step = emit.op("Where", reached, emit.constant(first * 2.0 ** (index + 1)), step, name=f"step{index}")
    return _round_to(emit, value, step)


def _round_to(emit: RtxEmitter, value: ir.Value, step: ir.Value) -> ir.Value:
    """Nearest multiple of step (a power of two), ties to even."""
    if step.const_value is not None and float(np.asarray(step.const_value.numpy())) == 1.0:
        return emit.op("Round", value, name="rounded")
    return emit.op(
        "Mul", emit.op("Round", emit.op("Div", value, step, name="in_steps"), name="steps"), step, name="rounded"
    )
