"""Operand bytes: how the GPU kernels hold activation codes, one byte for each value.

An FP8 tensor core multiplies E4M3 bytes. A format that embeds in E4M3 is therefore stored as the E4M3 byte of value *
2^shift, and no kernel decodes it; an integer format, and on request any that embeds in INT8, as its integer image,
which an INT8 tensor core multiplies; the rest (E3M4) as its own code, which becomes FP16 by moving bits. A GPU without
FP8 decodes E4M3 bytes to FP16, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from export.errors import RecipeError
from export.formats.format import Format, encode, fold_negative_zero, get_format
from export.formats.operands import embeds

E4M3, INT8 = "E4M3", "INT8"


@dataclass(frozen=True)
class Operand:
    """How one format is stored. kind: "E4M3", "INT8", or the format's own name where codes are stored as they are.

    shift: the stored byte stands for value * 2^shift.
    """

    kind: str
    shift: int = 0


@cache
def operand_of(name: str, integers: bool = False) -> Operand:
    """The operand bytes of format `name`; integers: as an INT8 image. Raises RecipeError for one that no kernel takes.

    >>> operand_of("E2M3"), operand_of("INT6"), operand_of("E3M4")
    (Operand(kind='E4M3', shift=0), Operand(kind='INT8', shift=0), Operand(kind='E3M4', shift=0))
    >>> operand_of("E2M3", integers=True)
    Operand(kind='INT8', shift=3)
    """
    fmt = get_format(name)
    if integers and not embeds(name, INT8):
        raise RecipeError(f"format {name} does not embed in INT8 (its largest image is {fmt.kmax}); use FP8 operands")
    if not (fmt.is_integer or integers) and embeds(name, E4M3):
        return Operand(E4M3, _e4m3_shift(fmt))
    if embeds(name, INT8):
        return Operand(INT8, fmt.fraction_bits)
    if embeds(name, "FP16") and fmt.bits <= 8:
        return Operand(name)
    raise RecipeError(f"format {name} fits neither E4M3 nor FP16 exactly; the GPU kernels take formats that do")


def _e4m3_shift(fmt: Format) -> int:
    """The power of two of least magnitude that puts every value on E4M3's numbers; 0 wherever possible."""
    target = get_format(E4M3)
    shifts = sorted(range(-16, 17), key=lambda shift: (abs(shift), shift))
    values = fmt.values[np.isfinite(fmt.values)]
    return next(s for s in shifts if set(np.abs(values) * 2.0**s) <= set(np.abs(target.values)))


@cache
def operand_bytes(name: str, integers: bool = False) -> NDArray[np.uint8]:
    """Code of format `name` -> its operand byte, [2^bits]; minus zero becomes zero."""
    fmt, operand = get_format(name), operand_of(name, integers)
    codes = fold_negative_zero(fmt, np.arange(2**fmt.bits, dtype=np.uint8))
    if operand.kind == INT8:
        return fmt.integers[codes].astype(np.int8).view(np.uint8)
    if operand.kind != E4M3:
        return codes
    return encode(get_format(E4M3), fmt.values[codes] * 2.0**operand.shift)
