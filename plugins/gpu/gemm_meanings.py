"""NumPy meanings of the GEMM kernels: the ops' meanings (export/op_meanings.py) with operand bytes for codes."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export import op_meanings
from export.formats import decode, encode, get_format, unpack
from export.formats import pack as pack_codes
from plugins.gpu.gemm_constants import weight_exponent
from plugins.gpu.operands import operand_bytes
from plugins.gpu.specs import GemmSpec, PackSpec

Array = NDArray[Any]


def packed_gemm(
    spec: GemmSpec,
    a: Array,
    a_scale: Array,
    w: Array,
    w_scales: Array,
    bias: Array,
    multiplier_codes: Array | None = None,
    **others: Any,
) -> tuple[Array]:
    """y float32 [M, N] as GemmSpec says, before it is rounded to the output type."""
    (expanded,) = expand(spec, w, multiplier_codes)
    return expanded_gemm(spec, a, a_scale, expanded, w_scales, bias, **others)


def expanded_gemm(
    spec: GemmSpec,
    a: Array,
    a_scale: Array,
    w: Array,
    w_scales: Array,
    bias: Array,
    a_zero: Array | None = None,
    w_sums: Array | None = None,
    gate: Array | None = None,
    residual: Array | None = None,
    tokens: int = 0,
    **_sizes: int,
) -> tuple[Array]:
    """As `packed_gemm`, with w u8 [N, K] from `expand`."""
    values = decode(get_format("E4M3"), w) * 2.0 ** -weight_exponent(spec)
    y = op_meanings.gemm_of_values(byte_values(spec.activation)[a], values, w_scales) * a_scale[:, None]
    if a_zero is not None and w_sums is not None:
        y = y + a_zero[:, None] * w_sums
    return (op_meanings.gemm_epilogue(y + bias, gate, residual, epilogue=spec.epilogue, tokens=tokens),)


@cache
def byte_values(name: str) -> Array:
    """Operand byte of format `name` -> the value it stands for, float64 [256]; NaN for bytes that no code has."""
    values = np.full(256, np.nan)
    values[operand_bytes(name)] = get_format(name).values
    return values


def pack(spec: PackSpec, codes: Array, **_sizes: int) -> tuple[Array]:
    """codes u8 [N, K] -> u8 [N, K / 2]."""
    return (pack_codes(codes, 4),)


def expand(spec: GemmSpec, w: Array, multiplier_codes: Array | None = None, **_sizes: int) -> tuple[Array]:
    """w u8 [N, K / 2] -> u8 [N, K]: E4M3 bytes of value * multiplier * 2^weight_exponent(spec)."""
    fmt, table = spec.weight_format, np.asarray(spec.multipliers, np.float64)
    value = decode(fmt, unpack(w, 4, spec.in_features)).reshape(len(w), spec.groups, -1)
    if multiplier_codes is not None:
        value = value * table[unpack(multiplier_codes, 4, spec.groups)][..., None]
    return (encode(get_format("E4M3"), value.reshape(len(w), -1) * 2.0 ** weight_exponent(spec)),)
