"""NumPy reference of the `fpq` ops: the definition that function bodies, kernels and engines are compared with.

Written with the codec of `export.formats.format`, not as the bodies are, so the two check each other. Each reference
takes the op's inputs and its attributes by name and returns a tuple of outputs; attributes that are only tables are
ignored.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.formats.format import decode, get_format, pack, packed_size, quantize, unpack

Array = NDArray[Any]
F32 = np.float32
# Smallest absmax of a token: its scale stays a normal float32 for every format, and a row of zeros divides by no zero.
ABSMAX_FLOOR = 1e-30


def _groups(in_features: int, group_size: int) -> int:
    return in_features // group_size if group_size else 1


def _multipliers(multiplier_codes: Array, table: tuple[int, ...], groups: int) -> Array:
    """4-bit indices [N or 1, ceil(groups / 2)] -> float32 [N or 1, groups, 1]."""
    return np.asarray(table, F32)[unpack(multiplier_codes, 4, groups)][..., None]


def _unscaled_weight(
    codes: Array, multiplier_codes: Array, weight_format: str, in_features: int, group_size: int, table: tuple[int, ...]
) -> Array:
    """packed codes -> float32 [N, groups, K / groups]: value times multiplier, exact."""
    fmt, groups = get_format(weight_format), _groups(in_features, group_size)
    value = decode(fmt, unpack(codes, fmt.bits, in_features)).astype(F32)
    return value.reshape(len(codes), groups, -1) * _multipliers(multiplier_codes, table, groups)


def dequantize_weight(
    codes: Array,
    scales: Array,
    multiplier_codes: Array,
    *,
    format: str,
    in_features: int,
    group_size: int,
    multipliers: tuple[int, ...],
    **_tables: Any,
) -> tuple[Array]:
    """W[k, n] = value(code[n, k]) * multiplier * scale, float32 [K, N]; only the last product rounds."""
    unscaled = _unscaled_weight(codes, multiplier_codes, format, in_features, group_size, multipliers)
    return ((unscaled * scales[..., None].astype(F32)).reshape(len(codes), in_features).T,)


def quantize_weight(
    w: Array,
    scales: Array,
    multiplier_codes: Array,
    *,
    format: str,
    in_features: int,
    group_size: int,
    multipliers: tuple[int, ...],
    **_tables: Any,
) -> tuple[Array]:
    """Nearest packed codes [N, packed] of w [K, N] under given scales."""
    fmt, groups = get_format(format), _groups(in_features, group_size)
    scale = scales[..., None].astype(F32) * _multipliers(multiplier_codes, multipliers, groups)
    rows = w.T.reshape(w.shape[1], groups, -1).astype(F32) / scale
    codes = quantize(fmt, rows.reshape(w.shape[1], in_features))
    return (pack(codes, fmt.bits),)


def quantize_activation(x: Array, *, format: str, **_tables: Any) -> tuple[Array, Array]:
    """Per token (last axis): scale = max(absmax, ABSMAX_FLOOR) / max_value, codes of x / scale. All in float32.

    A token with NaN or Inf has the scale NaN and zeros as codes, so that it cannot look healthy downstream.
    """
    finite = np.isfinite(x).all(axis=-1, keepdims=True)
    absmax = np.abs(np.where(finite, x, F32(0))).max(axis=-1, keepdims=True)
    scale = np.maximum(absmax, F32(ABSMAX_FLOOR)) / F32(get_format(format).max_value)
    codes = quantize(get_format(format), np.where(finite, x, F32(0)) / scale)
    return codes, np.where(finite, scale, F32(np.nan))


def dequantize_activation(codes: Array, scale: Array, *, format: str, **_tables: Any) -> tuple[Array]:
    """value(code) * scale, float32."""
    return (decode(get_format(format), codes).astype(F32) * scale,)


def quantize_static(x: Array, scale: Array, zero: Array, *, format: str, **_tables: Any) -> tuple[Array]:
    """Codes of (x - zero) / scale with scale and zero of shape [1], in float32; NaN becomes the code 0.

    A constant scale cannot carry a NaN on as a token's scale does; the graph does it, see export/carry_nan.py.
    """
    shifted = x - zero
    return (quantize(get_format(format), np.where(np.isnan(shifted), F32(0), shifted) / scale),)


def dequantize_static(codes: Array, scale: Array, zero: Array, *, format: str, **_tables: Any) -> tuple[Array]:
    """value(code) * scale + zero, float32."""
    return (decode(get_format(format), codes).astype(F32) * scale + zero,)


def quantize_groups(x: Array, *, format: str, group_size: int, **_tables: Any) -> tuple[Array, Array]:
    """QuantizeActivation of every group of `group_size` input channels as a token of its own: scale [..., K / g]."""
    codes, scale = quantize_activation(x.reshape(*x.shape[:-1], -1, group_size), format=format)
    return codes.reshape(x.shape), scale[..., 0]


def dequantize_groups(codes: Array, scale: Array, *, format: str, group_size: int, **_tables: Any) -> tuple[Array]:
    """value(code) * scale of its group, float32."""
    value = decode(get_format(format), codes).astype(F32)
    return ((value.reshape(*scale.shape, group_size) * scale[..., None]).reshape(codes.shape),)


def packed_gemm(
    a_codes: Array,
    a_scale: Array,
    w_codes: Array,
    w_scales: Array,
    multiplier_codes: Array,
    bias: Array,
    *,
    activation_format: str,
    weight_format: str,
    in_features: int,
    group_size: int,
    multipliers: tuple[int, ...],
    **_tables: Any,
) -> tuple[Array]:
    """y = (sum over scale groups of exact_sum * w_scale) * a_scale + bias, float32 [..., N].

    exact_sum is the sum of products of unscaled values, computed in float64 where it is exact, and rounded once.
    """
    w = _unscaled_weight(w_codes, multiplier_codes, weight_format, in_features, group_size, multipliers)
    a = decode(get_format(activation_format), a_codes)
    return (gemm_of_values(a, w.reshape(len(w_codes), -1), w_scales) * a_scale + bias,)


def gemm_of_values(a: Array, w: Array, w_scales: Array) -> Array:
    """a [..., K], w [N, K], w_scales f32 [N, scale groups] -> float32 [..., N]: scaled exact sums, added."""
    n, scale_groups = w_scales.shape
    rows = a.reshape(-1, scale_groups, a.shape[-1] // scale_groups).astype(np.float64)
    columns = w.reshape(n, scale_groups, -1).astype(np.float64)
    partial = (rows.transpose(1, 0, 2) @ columns.transpose(1, 2, 0)).astype(F32)
    total = (partial * w_scales.T[:, None, :]).sum(axis=0, dtype=F32)
    return np.asarray(total.reshape(*a.shape[:-1], n))


def gelu_tanh(x: Array) -> Array:
    """GELU in its tanh form, in float64, rounded to float32 once.

    (1 + tanh(u)) / 2 is written as 1 / (1 + exp(-2 u)), which loses no digits where tanh(u) is near -1.
    """
    wide = x.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # exp(-2 u) is Inf for x below -21, and GELU(x) is then -0
        return (wide / (1.0 + np.exp(-2.0 * np.sqrt(2.0 / np.pi) * (wide + 0.044715 * wide**3)))).astype(F32)


def packed_group_gemm(
    a_codes: Array,
    a_scale: Array,
    w_codes: Array,
    w_scales: Array,
    multiplier_codes: Array,
    bias: Array,
    *,
    activation_format: str,
    weight_format: str,
    in_features: int,
    group_size: int,
    multipliers: tuple[int, ...],
    sum_groups: int,
    **_tables: Any,
) -> tuple[Array]:
    """y = sum over sum_groups of exact_sum * a_scale of its group * w_scale of its group, + bias, float32 [..., N].

    exact_sum as in packed_gemm, over K / sum_groups input channels, within which neither scale changes.
    """
    n = len(w_codes)
    w = _unscaled_weight(w_codes, multiplier_codes, weight_format, in_features, group_size, multipliers)
    w = w.reshape(n, sum_groups, -1).astype(np.float64)
    a = decode(get_format(activation_format), a_codes).reshape(-1, sum_groups, in_features // sum_groups)
    partial = (a.transpose(1, 0, 2) @ w.transpose(1, 2, 0)).astype(F32)
    of_token = np.repeat(a_scale.reshape(-1, a_scale.shape[-1]), sum_groups // a_scale.shape[-1], axis=1)
    of_channel = np.repeat(w_scales, sum_groups // w_scales.shape[1], axis=1)
    total = (partial * of_token.T[..., None] * of_channel.T[:, None, :]).sum(axis=0, dtype=F32)
    return (total.reshape(*a_codes.shape[:-1], n) + bias,)


def norm_modulate_quantize(
    x: Array, shift: Array, scale: Array, *, format: str, epsilon: float, **_tables: Any
) -> tuple[Array, Array]:
    """QuantizeActivation of LayerNorm(x) * (1 + scale) + shift; the norm in float64, rounded to float32 once."""
    wide = x.astype(np.float64)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + epsilon)
    return quantize_activation((normal * (1.0 + scale) + shift).astype(F32), format=format)


def gelu_quantize(x: Array, *, format: str, **_tables: Any) -> tuple[Array, Array]:
    """QuantizeActivation of GELU(x) in its tanh form."""
    with np.errstate(invalid="ignore"):
        return quantize_activation(gelu_tanh(x), format=format)


def no_multipliers(in_features: int, group_size: int) -> NDArray[np.uint8]:
    """The `multiplier_codes` of a weight without multipliers (table (1,)): zeros [1, ceil(groups / 2)]."""
    return np.zeros((1, packed_size(4, _groups(in_features, group_size))), np.uint8)
