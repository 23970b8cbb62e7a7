"""Standard ops that quantize activations into hardware operands.

The arithmetic is that of QuantizeActivation: scale = max(absmax, floor) / max_value, v = x / scale, both in float32, so
codes are the same; every further factor is a power of two and therefore exact. QuantizeStatic's v = (x - zero) / scale
likewise, with constants; what lies beyond the range is clipped, as hardware types reach further than the format.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from export.dialect.graph import GraphBuilder, attribute, inputs_of, is_constant
from export.dialect.ops import ABSMAX_FLOOR
from export.formats.format import get_format
from export.formats.operands import HardwareNumber
from pipeline.passes.quantized_gemm import STORED


@dataclass(frozen=True)
class Token:
    """x: the float32 tensor that is quantized, [..., K]. value: x / scale, within the format's range. scale: [..., 1];
    None for a constant, which belongs to the GEMM then. quotient: the value before it was clipped."""

    x: ir.Value
    value: ir.Value
    scale: ir.Value | None
    quotient: ir.Value


def emit_norm_modulate(build: GraphBuilder, node: ir.Node, width: int) -> ir.Value:
    """LayerNorm(x, no affine) * (1 + scale) + shift of a NormModulateQuantize node, [B, S, width] float32."""
    ports = inputs_of(node)
    ones = build.lazy(f"constant/ones/{width}", ir.DataType.FLOAT, (width,), lambda: np.ones(width, np.float32))
    epsilon = float(attribute(node, "epsilon"))
    normal = build.op("LayerNormalization", ports.x, ones, name="norm", axis=-1, epsilon=epsilon)
    gain = build.op("Add", ports.scale, build.constant(1.0), name="one_plus_scale")
    return build.op("Add", build.op("Mul", normal, gain, name="scaled"), ports.shift, name="modulated")


def emit_token(build: GraphBuilder, x: ir.Value, format_name: str) -> Token:
    """Per-token scale and scaled value of x."""
    absmax = build.op(
        "ReduceMax", build.op("Abs", x, name="abs"), build.constant([-1], np.int64), name="absmax", keepdims=1
    )
    bounded = build.op("Max", absmax, build.constant(ABSMAX_FLOOR), name="bounded")
    scale = build.op("Div", bounded, build.constant(get_format(format_name).max_value), name="scale")
    value = build.op("Div", x, scale, name="value")
    return Token(x, value, scale, value)


def emit_static(build: GraphBuilder, x: ir.Value, format_name: str, scale: float, zero: float) -> Token:
    """(x - zero) / scale within the range of the format."""
    fmt = get_format(format_name)
    shifted = build.op("Sub", x, build.constant(zero), name="above_zero") if zero else x
    value = build.op("Div", shifted, build.constant(scale), name="value")
    lowest = build.constant(-fmt.max_value if fmt.sign_bits else 0.0)
    within = build.op("Clip", value, lowest, build.constant(fmt.max_value), name="within")
    return Token(x, within, None, value)


def emit_limbs(build: GraphBuilder, token: Token, number: HardwareNumber) -> tuple[ir.Value, ...]:
    """Operands as float32, high limb first: sum(limb * weight) = (integer - shift) * 2^exponent. The GEMM casts those
    for FP16."""
    scaled = emit_scaled(build, token, number)
    if number.type == "FP16":
        return (scaled,)
    if number.limbs == 1:
        return (round_in(build, scaled, number.type, "operand"),)
    return _emit_two_limbs(build, scaled, number)


def emit_scaled(build: GraphBuilder, token: Token, number: HardwareNumber) -> ir.Value:
    """(integer - shift) * 2^exponent as float32; not yet rounded where the type's own rounding is the format's."""
    value, bounded = token.value, token.scale is None or _is_signed(number.format)
    value = value if bounded else build.op("Max", value, build.constant(0.0), name="positive")
    value = value if number.rounds_itself else emit_round(build, value, number.format)
    scaled = build.op("Mul", value, build.constant(number.gain), name="scaled_value") if number.gain != 1 else value
    if number.shift:
        scaled = build.op("Sub", scaled, build.constant(float(number.shift)), name="shifted")
    return scaled


def _is_signed(format_name: str) -> bool:
    fmt = get_format(format_name)
    return fmt.is_integer or bool(fmt.sign_bits)


def _emit_two_limbs(build: GraphBuilder, scaled: ir.Value, number: HardwareNumber) -> tuple[ir.Value, ...]:
    weight = number.limb_weights[0]
    coarse = build.op("Mul", scaled, build.constant(1 / weight), name="coarse") if weight != 1 else scaled
    high = round_in(build, coarse, number.type, "operand_high")
    taken = build.op("Mul", high, build.constant(weight), name="taken") if weight != 1 else high
    rest = build.op("Sub", scaled, taken, name="rest")
    return (high, round_in(build, rest, number.type, "operand_low"))


def round_in(build: GraphBuilder, x: ir.Value, kind: str, name: str) -> ir.Value:
    """x rounded to the type's nearest number, ties to even, saturating; float32 again. The engine builder turns this
    form into tensor-core operands."""
    one, zero = build.constant(1.0), build.constant(0, STORED[kind].numpy())
    codes = build.op("QuantizeLinear", x, one, zero, name=f"{name}_q")
    return build.op("DequantizeLinear", codes, one, name=name)


def emit_round(build: GraphBuilder, value: ir.Value, format_name: str) -> ir.Value:
    """value rounded to the format's grid, ties to even. No clip: |value| <= max_value (1 + 2^-23) rounds down to it."""
    fmt = get_format(format_name)
    first = 2.0 ** (-fmt.fraction_bits)
    if not len(fmt.binade_starts):
        return _round_to(build, value, build.constant(first))
    magnitude, step = build.op("Abs", value, name="magnitude"), build.constant(first)
    for index, start in enumerate(fmt.binade_starts):
        reached = build.op("GreaterOrEqual", magnitude, build.constant(float(start)), name=f"binade{index}")
        step = build.op("Where", reached, build.constant(first * 2.0 ** (index + 1)), step, name=f"step{index}")
    return _round_to(build, value, step)


def _round_to(build: GraphBuilder, value: ir.Value, step: ir.Value) -> ir.Value:
    """Nearest multiple of step (a power of two), ties to even."""
    if is_constant(step, 1.0):
        return build.op("Round", value, name="rounded")
    return build.op(
        "Mul", build.op("Round", build.op("Div", value, step, name="in_steps"), name="steps"), step, name="rounded"
    )
