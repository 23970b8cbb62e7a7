"""What plugins/gpu/rounding.py must know of a number format, as constants of a kernel."""

from __future__ import annotations

from typing import Any

from export.dialect.reference import ABSMAX_FLOOR
from export.formats.format import get_format
from plugins.gpu.operands import E4M3, INT8, operand_of

FP32_MANTISSA_BITS = 23
FP32_MIN_EXPONENT = -126
HAS_E4M3_CONVERSION = 89  # first compute capability with cvt.e4m3x2 (PTX ISA, cvt)


def rounding_constants(name: str, sm: int, integers: bool = False) -> dict[str, Any]:
    """Constexpr arguments of plugins/gpu/rounding.py for format `name` on compute capability `sm`.

    MAX_VALUE and ABSMAX_FLOOR of the scale; SIGNED; the grid: ANCHOR = 1.5 * 2^(23 - mantissa bits) and LOWEST, the
    start of the lowest binade, for integers 1.5 * 2^23 and 0; KIND of byte "int8", "bits" or "e4m3" (converted by the
    hardware); UP = the power of two that takes a value to the byte's number; MOVE, SIGN: where the byte lies in the
    float32.
    """
    fmt, operand = get_format(name), operand_of(name, integers)
    base = {
        "MAX_VALUE": fmt.max_value,
        "ABSMAX_FLOOR": ABSMAX_FLOOR,
        "SIGNED": bool(fmt.sign_bits),
        "ANCHOR": 1.5 * 2.0 ** (FP32_MANTISSA_BITS - fmt.mantissa_bits * (not fmt.is_integer)),
        "LOWEST": 0.0 if fmt.is_integer else 2.0**fmt.min_exponent,
    }
    if operand.kind == INT8:
        return {**base, "KIND": "int8", "UP": 2.0**operand.shift, "MOVE": 0, "SIGN": 0}
    if operand.kind == E4M3 and sm >= HAS_E4M3_CONVERSION:
        return {**base, "KIND": "e4m3", "UP": 2.0**operand.shift, "MOVE": 0, "SIGN": 0}
    byte = get_format(operand.kind)
    return {
        **base,
        "KIND": "bits",
        "UP": 2.0 ** (operand.shift + FP32_MIN_EXPONENT - byte.min_exponent),
        "MOVE": FP32_MANTISSA_BITS - byte.mantissa_bits,
        "SIGN": byte.exponent_bits + byte.mantissa_bits if fmt.sign_bits else 0,
    }
