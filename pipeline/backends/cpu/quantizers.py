"""Activation quantizers in standard ONNX ops, as cheap as onnxruntime's CPU kernels allow.

Rounding to a float format without any loop over binades ("magic add"): with v the activation in units of the format's
integers and c = max(|v| F, 1.5 * 2^23), F = 2^(23-M) - MARGIN, the float32 sum v + c has just the precision of the
format's step at |v|, so (v + c) - c is v rounded to nearest even on the format's grid, subnormals included. Let |v| lie
in the binade that starts at 2^e; c and v + c should then lie in the binade of 2^n, n = e + 23 - M.
- At the binade's end the margin keeps v + c out of the next one: against 16 |v| stand v itself and the rounding of c.
- At its start c falls below 2^n for |v| < 2^e (1 + 17 * 2^(M-23)). If v + c does, too, it is rounded to half a step,
  which still gives 2^e. If v + c does not, c must be a multiple of the step, since it is taken off again: |v| is
  2^e + k 2^(e-23) with k <= 17 * 2^M, so |v| F = k 2^(e-M) + 2^n - 16 * 2^e up to 16 k 2^(e-23), which is less than
  half a unit of c as long as 2 M < 13. So c is the multiple of 2^(e-M), the step, that stands there; but only as the
  product of the rounded |v|: |x| times a factor with the inverse scale in it has another last bit.
A uniform grid needs no such sum: QuantizeLinear itself rounds.

A scale per token is found first; one per group of input channels likewise, the groups taken for tokens. A static scale
is a constant, so that nothing is reduced, but what lies beyond its range is clipped: on float grids before the sum, on
uniform ones by QuantizeLinear's own saturation, and in uint8 where that reaches too far.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from export.dialect.graph import GraphBuilder
from export.dialect.ops import ABSMAX_FLOOR
from export.formats.format import Format
from export.formats.operands import SMALL_ZERO, UINT8_MAX, limb_base, zero_point

FLOAT_DIGITS = 23
MARGIN = 16.0


@dataclass(frozen=True)
class Operand:
    """A quantized activation in a graph: integer = sum_i weights[i] * (codes[i] - zero); value = integer 2^-f scale.

    scale: [..., 1]; of groups [M, groups, 1] with codes [M, groups, group_size]; None for a static one.
    """

    x: ir.Value
    codes: tuple[ir.Value, ...]
    weights: tuple[int, ...]
    zero: int
    scale: ir.Value | None


def unsupported(fmt: Format, static: bool = False) -> str | None:
    """Why this format has no quantizer here, None if it has one."""
    if not (fmt.sign_bits or static):
        return f"{fmt.name} has no sign"
    if len(fmt.binade_starts) and fmt.kmax.bit_length() > FLOAT_DIGITS - 1 - fmt.mantissa_bits:
        return f"the range of {fmt.name} is too wide for rounding by one float32 sum"
    return None


def quantize(build: GraphBuilder, x: ir.Value, fmt: Format, limbs: int) -> Operand:
    """x f32 [..., K] -> u8 operands [..., K] and scale [..., 1]."""
    magnitude, absmax, scale = token_scale(build, x, fmt)
    integers = _scaled_integers(build, x, magnitude, absmax, fmt)
    if limbs == 1:
        zero = zero_point(fmt.kmax)
        return Operand(x, (_to_u8(build, integers, 1.0, zero, "codes"),), (1,), zero, scale)
    return _two_limbs(build, x, integers, fmt, limbs, scale)


def _two_limbs(
    build: GraphBuilder, x: ir.Value, integers: ir.Value, fmt: Format, limbs: int, scale: ir.Value | None
) -> Operand:
    if not len(fmt.binade_starts):
        integers = build.op("Round", integers, name="image")
    base = limb_base(fmt.kmax, limbs)
    unit, offset = build.constant(float(base)), build.constant(SMALL_ZERO, np.uint8)
    high = _to_u8(build, integers, float(base), SMALL_ZERO, "high")
    back = build.op("DequantizeLinear", high, unit, offset, name="high_image")
    rest = build.op("Sub", integers, back, name="low_image")
    return Operand(x, (high, _to_u8(build, rest, 1.0, SMALL_ZERO, "low")), (base, 1), SMALL_ZERO, scale)


def in_groups(build: GraphBuilder, x: ir.Value, group: int, groups: int) -> ir.Value:
    """[..., K] -> [M, groups, group]."""
    return build.op("Reshape", x, build.constant([-1, groups, group], np.int64), name="in_groups")


def quantize_static(build: GraphBuilder, x: ir.Value, fmt: Format, limbs: int, scale: float, zero: float) -> Operand:
    """x f32 [..., K] -> u8 operands [..., K] of (x - zero) / scale; their scale is left to the GEMM."""
    if limbs > 1:
        integers = static_integers(build, x, fmt, scale, zero, rounded=False)
        return _two_limbs(build, x, integers, fmt, limbs, None)
    offset = zero_point(fmt.kmax) if fmt.sign_bits else 0
    if len(fmt.binade_starts):
        integers = static_integers(build, x, fmt, scale, zero)
        return Operand(x, (_to_u8(build, integers, 1.0, offset, "codes"),), (1,), offset, None)
    codes = _to_u8(build, _above_zero(build, x, zero), _integer_unit(fmt, scale), offset, "all_codes")
    lowest = offset - fmt.kmax if fmt.sign_bits else 0
    if lowest > 0 or offset + fmt.kmax < UINT8_MAX:
        bounds = (build.constant(bound, np.uint8) for bound in (lowest, offset + fmt.kmax))
        codes = build.op("Clip", codes, *bounds, name="codes")
    return Operand(x, (codes,), (1,), offset, None)


def static_integers(
    build: GraphBuilder, x: ir.Value, fmt: Format, scale: float, zero: float, rounded: bool = True
) -> ir.Value:
    """(x - zero) / scale in units of the integers, within the format's range and on its grid (uniform: if
    `rounded`)."""
    integers = build.op("Div", _above_zero(build, x, zero), build.constant(_integer_unit(fmt, scale)), name="scaled")
    lowest = build.constant(-float(fmt.kmax) if fmt.sign_bits else 0.0)
    integers = build.op("Clip", integers, lowest, build.constant(float(fmt.kmax)), name="within")
    if len(fmt.binade_starts):
        return _on_grid(build, integers, build.op("Abs", integers, name="size") if fmt.sign_bits else integers, fmt)
    return build.op("Round", integers, name="image") if rounded else integers


def _above_zero(build: GraphBuilder, x: ir.Value, zero: float) -> ir.Value:
    return build.op("Sub", x, build.constant(zero), name="above_zero") if zero else x


def _integer_unit(fmt: Format, scale: float) -> float:
    """Value of an integer's unit; a power of two times the scale, so exact in float32."""
    return scale * 2.0**-fmt.fraction_bits


def rounded_integers(build: GraphBuilder, x: ir.Value, fmt: Format) -> tuple[ir.Value, ir.Value]:
    """x f32 [..., K] -> (integers as f32 [..., K], scale [..., 1]), for formats too wide for integer operands."""
    magnitude, absmax, scale = token_scale(build, x, fmt)
    integers = _scaled_integers(build, x, magnitude, absmax, fmt)
    return (integers if len(fmt.binade_starts) else build.op("Round", integers, name="image")), scale


def token_scale(build: GraphBuilder, x: ir.Value, fmt: Format) -> tuple[ir.Value, ir.Value, ir.Value]:
    """(|x|, max(absmax, floor) [..., 1], scale [..., 1])."""
    magnitude = build.op("Abs", x, name="magnitude")
    last = build.constant([-1], np.int64)
    peak = build.op("ReduceMax", magnitude, last, name="peak", keepdims=1)
    absmax = build.op("Clip", peak, build.constant(ABSMAX_FLOOR), name="absmax")
    return magnitude, absmax, build.op("Div", absmax, build.constant(fmt.max_value), name="scale")


def _scaled_integers(build: GraphBuilder, x: ir.Value, magnitude: ir.Value, absmax: ir.Value, fmt: Format) -> ir.Value:
    """x scaled so that absmax becomes kmax, rounded to the format's grid (uniform grids: not yet rounded)."""
    inverse = build.op("Div", build.constant(float(fmt.kmax)), absmax, name="inverse")
    scaled = build.op("Mul", x, inverse, name="scaled")
    if not len(fmt.binade_starts):
        return scaled
    return _on_grid(build, scaled, build.op("Mul", magnitude, inverse, name="size"), fmt)


def _on_grid(build: GraphBuilder, scaled: ir.Value, size: ir.Value, fmt: Format) -> ir.Value:
    """`scaled`, with the magnitudes `size`, rounded to a float format's grid by one sum."""
    wide = build.op("Mul", size, build.constant(rounding_factor(fmt)), name="wide")
    c = build.op("Clip", wide, build.constant(1.5 * 2.0**FLOAT_DIGITS), name="magic")
    return build.op("Sub", build.op("Add", scaled, c, name="rounding"), c, name="rounded")


def rounding_factor(fmt: Format) -> float:
    """F of the rounding by one sum, for a float format."""
    return 2.0 ** (FLOAT_DIGITS - fmt.mantissa_bits) - MARGIN


def _to_u8(build: GraphBuilder, integers: ir.Value, unit: float, zero: int, name: str) -> ir.Value:
    return build.op("QuantizeLinear", integers, build.constant(unit), build.constant(zero, np.uint8), name=name)
