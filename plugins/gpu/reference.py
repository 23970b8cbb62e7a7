"""NumPy reference of every GPU kernel: the ops' (export/dialect/reference.py) with operand bytes for codes.

A function takes the spec and its kernel's arguments by the names of the kernel table and gives the outputs as a tuple.
Sizes may be given too; arrays have them. Floats come out as float32: the caller rounds to the output type.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Unpack

from export.dialect import reference as op_reference
from export.formats.format import decode, encode, get_format, unpack
from export.formats.format import pack as pack_codes
from plugins.gpu.spec import GemmSpec, PackSpec, QuantizeSpec, operand_bytes

Array = NDArray[Any]


class AfterSum(TypedDict):
    """Operands of what follows a GEMM's sum, by the ports of the kernel table; `tokens` and M are sizes."""

    a_scale: Array
    bias: Array
    a_zero: NotRequired[Array | None]
    w_sums: NotRequired[Array | None]
    gate: NotRequired[Array | None]
    residual: NotRequired[Array | None]
    tokens: NotRequired[int]
    M: NotRequired[int]


class StaticScale(TypedDict, total=False):
    """Of a quantizer whose scale is a constant; M is a size."""

    static_scale: Array | None
    static_zero: Array | None
    M: int


# --- GEMMs -----------------------------------------------------------------------------------------------------------


def packed_gemm(
    spec: GemmSpec,
    a: Array,
    w: Array,
    w_scales: Array,
    multiplier_codes: Array | None = None,
    **operands: Unpack[AfterSum],
) -> tuple[Array]:
    """y float32 [M, N] as GemmSpec says, before it is rounded to the output type."""
    (expanded,) = expand(spec, w, multiplier_codes)
    return expanded_gemm(spec, a, expanded, w_scales, **operands)


def expanded_gemm(spec: GemmSpec, a: Array, w: Array, w_scales: Array, **operands: Unpack[AfterSum]) -> tuple[Array]:
    """As `packed_gemm`, with w u8 [N, K] from `expand`."""
    values = byte_values(spec.activation, spec.integers)[a]
    total = op_reference.gemm_of_values(values, expanded_values(spec, w), w_scales)
    return (_after_sum(spec, total, **operands),)


def reduce_splits(spec: GemmSpec, parts: Array, w_scales: Array, **operands: Unpack[AfterSum]) -> tuple[Array]:
    """parts f32 [splits, M, N] added in their order -> y float32 [M, N]; with real groups they are scaled already."""
    total = np.add.reduce(parts, axis=0, dtype=np.float32)
    return (_after_sum(spec, total if spec.real_groups else total * w_scales[:, 0], **operands),)


def _after_sum(
    spec: GemmSpec,
    total: Array,
    *,
    a_scale: Array,
    bias: Array,
    a_zero: Array | None = None,
    w_sums: Array | None = None,
    gate: Array | None = None,
    residual: Array | None = None,
    tokens: int = 0,
    M: int = 0,
) -> Array:
    """What follows a sum f32 [M, N] with the scales of its channels."""
    y = total * a_scale[:, None]
    if a_zero is not None and w_sums is not None:
        y = y + a_zero[:, None] * w_sums
    y = y + bias
    if spec.epilogue == "gate_residual":
        assert gate is not None and residual is not None
        y = residual.astype(np.float32) + np.repeat(gate.astype(np.float32), tokens, axis=0) * y
    return y


def expanded_values(spec: GemmSpec, w: Array) -> Array:
    """What `expand` gives -> value times multiplier, float64 [N, K]."""
    numbers = w.view(np.int8).astype(np.float64) if spec.multiplies_integers else decode(get_format("E4M3"), w)
    return numbers * 2.0**-spec.byte_exponent


@cache
def byte_values(name: str, integers: bool = False) -> Array:
    """Operand byte of format `name` -> the value it stands for, float64 [256]; NaN for bytes that no code has."""
    values = np.full(256, np.nan)
    values[operand_bytes(name, integers)] = get_format(name).values
    return values


def pack(spec: PackSpec, codes: Array, rows: int = 0) -> tuple[Array]:
    """codes u8 [N, K] -> u8 [N, K / 2]."""
    return (pack_codes(codes, 4),)


def expand(spec: GemmSpec, w: Array, multiplier_codes: Array | None = None, rows: int = 0) -> tuple[Array]:
    """w u8 [N, K / 2] -> u8 [N, K]: INT8 or E4M3 bytes of value * multiplier * 2^spec.byte_exponent."""
    multipliers = np.asarray(spec.multipliers, np.float64)
    value = decode(spec.weight_format, unpack(w, 4, spec.in_features)).reshape(len(w), spec.groups, -1)
    if multiplier_codes is not None:
        value = value * multipliers[unpack(multiplier_codes, 4, spec.groups)][..., None]
    numbers = value.reshape(len(w), -1) * 2.0**spec.byte_exponent
    if spec.multiplies_integers:
        return (numbers.astype(np.int8).view(np.uint8),)
    return (encode(get_format("E4M3"), numbers),)


# --- quantizers ------------------------------------------------------------------------------------------------------


def quantize(
    spec: QuantizeSpec, x: Array, static_scale: Array | None = None, static_zero: Array | None = None, M: int = 0
) -> tuple[Array, ...]:
    """x [M, C] -> operand bytes u8 [M, C], scale f32 [M]: QuantizeActivation; with a static scale QuantizeStatic, which
    has no second output."""
    if static_scale is not None and static_zero is not None:
        (codes,) = op_reference.quantize_static(x.astype(np.float32), static_scale, static_zero, format=spec.format)
        return (operand_bytes(spec.format, spec.integers)[codes],)
    codes, scale = op_reference.quantize_activation(x.astype(np.float32), format=spec.format)
    return operand_bytes(spec.format, spec.integers)[codes], scale[:, 0]


def gelu_quantize(spec: QuantizeSpec, x: Array, **static: Unpack[StaticScale]) -> tuple[Array, ...]:
    """As `quantize`, of the GELU (tanh form) of x."""
    return quantize(spec, gelu_tanh(x.astype(np.float32)), **static)


def gelu_tanh(x: Array) -> Array:
    """GELU in its tanh form, in float64, rounded to float32 once.

    (1 + tanh(u)) / 2 is written as 1 / (1 + exp(-2 u)), which loses no digits where tanh(u) is near -1.
    """
    wide = x.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # exp(-2 u) is Inf for x below -21, and GELU(x) is then -0
        return (wide / (1.0 + np.exp(-2.0 * np.sqrt(2.0 / np.pi) * (wide + 0.044715 * wide**3)))).astype(np.float32)


def norm_modulate_quantize(
    spec: QuantizeSpec, x: Array, shift: Array, scale: Array, tokens: int, M: int = 0
) -> tuple[Array, Array]:
    """x [M, C], shift and scale [M / tokens, C] -> operand bytes u8 [M, C], scale f32 [M]: NormModulateQuantize."""
    x, shift, scale = (a.astype(np.float32) for a in (x, shift, scale))
    codes, a_scale = op_reference.norm_modulate_quantize(
        x.reshape(len(shift), tokens, spec.channels),
        shift[:, None],
        scale[:, None],
        format=spec.format,
        epsilon=spec.epsilon,
    )
    return operand_bytes(spec.format, spec.integers)[codes].reshape(x.shape), a_scale.reshape(-1)
