"""NumPy reference of the `fpq` ops: the definition that function bodies, kernels and engines are compared with.

Written with the codec of `export.formats.format`, not as the bodies are, so the two check each other. Each reference
takes the op's inputs and its attributes by name and returns a tuple of outputs; attributes that are only tables are
ignored.
"""

from __future__ import annotations

from typing import TypedDict

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Unpack

from export.errors import ContractError
from export.formats.attention import MOST_CHANNELS, MOST_KEYS, WEIGHT_MAX
from export.formats.format import decode, get_format, pack, packed_size, quantize, unpack

F32 = np.float32
Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]
Array = Floats | NDArray[np.float64] | Codes
# Smallest absmax of a token: its scale stays a normal float32 for every format, and a row of zeros divides by no zero.
ABSMAX_FLOOR = 1e-30


def _groups(in_features: int, group_size: int) -> int:
    return in_features // group_size if group_size else 1


def _multipliers(multiplier_codes: Codes, table: tuple[int, ...], groups: int) -> Floats:
    """4-bit indices [N or 1, ceil(groups / 2)] -> float32 [N or 1, groups, 1]."""
    return np.asarray(table, F32)[unpack(multiplier_codes, 4, groups)][..., None]


class Grouping(TypedDict):
    """How channels of a packed weight share multipliers, as attributes of an op."""

    in_features: int
    group_size: int
    multipliers: tuple[int, ...]


def _unscaled_weight(
    codes: Codes,
    multiplier_codes: Codes,
    weight_format: str,
    *,
    in_features: int,
    group_size: int,
    multipliers: tuple[int, ...],
    **_tables: object,
) -> Floats:
    """packed codes -> float32 [N, groups, K / groups]: value times multiplier, exact."""
    fmt, groups = get_format(weight_format), _groups(in_features, group_size)
    value = decode(fmt, unpack(codes, fmt.bits, in_features)).astype(F32)
    return value.reshape(len(codes), groups, -1) * _multipliers(multiplier_codes, multipliers, groups)


def dequantize_weight(
    codes: Codes, scales: Floats, multiplier_codes: Codes, *, format: str, **grouping: Unpack[Grouping]
) -> tuple[Floats]:
    """W[k, n] = value(code[n, k]) * multiplier * scale, float32 [K, N]; only the last product rounds."""
    unscaled = _unscaled_weight(codes, multiplier_codes, format, **grouping)
    return ((unscaled * scales[..., None].astype(F32)).reshape(len(codes), -1).T,)


def quantize_weight(
    w: Floats,
    scales: Floats,
    multiplier_codes: Codes,
    *,
    format: str,
    in_features: int,
    group_size: int,
    multipliers: tuple[int, ...],
    **_tables: object,
) -> tuple[Codes]:
    """Nearest packed codes [N, packed] of w [K, N] under given scales."""
    fmt, groups = get_format(format), _groups(in_features, group_size)
    scale = scales[..., None].astype(F32) * _multipliers(multiplier_codes, multipliers, groups)
    rows = w.T.reshape(w.shape[1], groups, -1).astype(F32) / scale
    codes = quantize(fmt, rows.reshape(w.shape[1], in_features))
    return (pack(codes, fmt.bits),)


def quantize_activation(x: Floats, *, format: str, **_tables: object) -> tuple[Codes, Floats]:
    """Per token (last axis): scale = max(absmax, ABSMAX_FLOOR) / max_value, codes of x / scale. All in float32.

    A token with NaN or Inf has the scale NaN and zeros as codes, so that it cannot look healthy downstream.
    """
    finite = np.isfinite(x).all(axis=-1, keepdims=True)
    absmax = np.abs(np.where(finite, x, F32(0))).max(axis=-1, keepdims=True)
    scale = np.maximum(absmax, F32(ABSMAX_FLOOR)) / F32(get_format(format).max_value)
    codes = quantize(get_format(format), np.where(finite, x, F32(0)) / scale)
    return codes, np.where(finite, scale, F32(np.nan))


def dequantize_activation(codes: Codes, scale: Floats, *, format: str, **_tables: object) -> tuple[Floats]:
    """value(code) * scale, float32."""
    return (decode(get_format(format), codes).astype(F32) * scale,)


def quantize_static(x: Floats, scale: Floats, zero: Floats, *, format: str, **_tables: object) -> tuple[Codes]:
    """Codes of (x - zero) / scale with scale and zero of shape [1], in float32; NaN becomes the code 0.

    A constant scale cannot carry a NaN on as a token's scale does; the graph does it, see export/carry_nan.py.
    """
    shifted = x - zero
    return (quantize(get_format(format), np.where(np.isnan(shifted), F32(0), shifted) / scale),)


def dequantize_static(codes: Codes, scale: Floats, zero: Floats, *, format: str, **_tables: object) -> tuple[Floats]:
    """value(code) * scale + zero, float32."""
    return (decode(get_format(format), codes).astype(F32) * scale + zero,)


def quantize_groups(x: Floats, *, format: str, group_size: int, **_tables: object) -> tuple[Codes, Floats]:
    """QuantizeActivation of every group of `group_size` input channels as a token of its own: scale [..., K / g]."""
    codes, scale = quantize_activation(x.reshape(*x.shape[:-1], -1, group_size), format=format)
    return codes.reshape(x.shape), scale[..., 0]


def dequantize_groups(codes: Codes, scale: Floats, *, format: str, group_size: int, **_tables: object) -> tuple[Floats]:
    """value(code) * scale of its group, float32."""
    value = decode(get_format(format), codes).astype(F32)
    return ((value.reshape(*scale.shape, group_size) * scale[..., None]).reshape(codes.shape),)


def packed_gemm(
    a_codes: Codes,
    a_scale: Floats,
    w_codes: Codes,
    w_scales: Floats,
    multiplier_codes: Codes,
    bias: Floats,
    *,
    activation_format: str,
    weight_format: str,
    **grouping: Unpack[Grouping],
) -> tuple[Floats]:
    """y = (sum over scale groups of exact_sum * w_scale) * a_scale + bias, float32 [..., N].

    exact_sum is the sum of products of unscaled values, computed in float64 where it is exact, and rounded once.
    """
    w = _unscaled_weight(w_codes, multiplier_codes, weight_format, **grouping)
    a = decode(get_format(activation_format), a_codes)
    return (gemm_of_values(a, w.reshape(len(w_codes), -1), w_scales) * a_scale + bias,)


def packed_group_gemm(
    a_codes: Codes,
    a_scale: Floats,
    w_codes: Codes,
    w_scales: Floats,
    multiplier_codes: Codes,
    bias: Floats,
    *,
    activation_format: str,
    weight_format: str,
    sum_groups: int,
    **grouping: Unpack[Grouping],
) -> tuple[Floats]:
    """y = sum over sum_groups of exact_sum * a_scale of its group * w_scale of its group, + bias, float32 [..., N].

    exact_sum as in packed_gemm, over K / sum_groups input channels, within which neither scale changes.
    """
    w = _unscaled_weight(w_codes, multiplier_codes, weight_format, **grouping)
    partial = _exact_sums(decode(get_format(activation_format), a_codes), w.reshape(len(w_codes), -1), sum_groups)
    of_token = np.repeat(a_scale.reshape(-1, a_scale.shape[-1]), sum_groups // a_scale.shape[-1], axis=1)
    of_channel = np.repeat(w_scales, sum_groups // w_scales.shape[1], axis=1)
    total = (partial * of_token.T[..., None] * of_channel.T[:, None, :]).sum(axis=0, dtype=F32)
    return (total.reshape(*a_codes.shape[:-1], len(w_codes)) + bias,)


def gemm_of_values(a: Array, w: Array, w_scales: Floats) -> Floats:
    """a [..., K], w [N, K], w_scales f32 [N, scale groups] -> float32 [..., N]: scaled exact sums, added."""
    partial = _exact_sums(a, w, w_scales.shape[1])
    total = (partial * w_scales.T[:, None, :]).sum(axis=0, dtype=F32)
    return np.asarray(total.reshape(*a.shape[:-1], len(w)))


def _exact_sums(a: Array, w: Array, groups: int) -> Floats:
    """a [..., K], w [N, K] -> float32 [groups, M, N]: products of K / groups channels each, added in float64."""
    rows = a.reshape(-1, groups, a.shape[-1] // groups).astype(np.float64)
    columns = w.reshape(len(w), groups, -1).astype(np.float64)
    return (rows.transpose(1, 0, 2) @ columns.transpose(1, 2, 0)).astype(F32)


def norm_modulate_quantize(
    x: Floats, shift: Floats, scale: Floats, *, format: str, epsilon: float, **_tables: object
) -> tuple[Codes, Floats]:
    """QuantizeActivation of LayerNorm(x) * (1 + scale) + shift; the norm in float64, rounded to float32 once."""
    wide = x.astype(np.float64)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + epsilon)
    return quantize_activation((normal * (1.0 + scale) + shift).astype(F32), format=format)


def quantized_attention(
    q: Floats,
    k: Floats,
    v: Floats,
    mask: Floats,
    *,
    layer: str,
    qk_format: str,
    pv_format: str,
    scale: float,
    **_tables: object,
) -> tuple[Floats]:
    """out = (sum over keys of weight * value of v's code) * v_scale / sum of weights, float32 [B, H, Tq, D].

    weight = round(255 * exp(score - largest score of the row)), ties to even: codes of the exponentials and not of the
    softmax, so that the largest is 255 however many keys there are; they are divided by the sum of themselves, so that
    they add up to one. score = exact sum * (q_scale * scale) * k_scale + mask, of the codes of q and of k less its mean
    over the tokens: a number for each channel adds the same to all scores of a query, which changes no softmax. It is
    added up in float64, so that it has the error of one float32 rounding however many keys there are.

    NaN or Inf in a token of q makes its row NaN, in k all rows of its head, in v that channel of all rows; so do a row
    of scores that are all -inf, and a NaN among scores. Raises ContractError where sums would not be exact.
    """
    check_attention_shapes(layer, k.shape[-2], k.shape[-1])
    with np.errstate(invalid="ignore"):  # Inf less Inf, and what follows from NaN
        centred = k - k.mean(axis=-2, keepdims=True, dtype=np.float64).astype(F32)
        (q_value, q_scale), (k_value, k_scale) = (_values_and_scale(x, qk_format) for x in (q, centred))
        v_value, v_scale = (part.swapaxes(-1, -2) for part in _values_and_scale(v.swapaxes(-1, -2), pv_format))
        total = (q_value @ k_value.swapaxes(-1, -2)).astype(F32)
        score = total * (q_scale * F32(scale)) * k_scale.swapaxes(-1, -2) + mask
        weight = np.rint(F32(WEIGHT_MAX) * np.exp(score - score.max(axis=-1, keepdims=True)))
        mixed = (weight.astype(np.float64) @ v_value).astype(F32)
        return (mixed * v_scale / weight.sum(axis=-1, keepdims=True, dtype=np.float64).astype(F32),)


def check_attention_shapes(layer: str, keys: int, channels: int) -> None:
    """Raise ContractError for an attention of no keys, or of so many keys or channels that sums would not be exact."""
    for size, least, most, name in ((keys, 1, MOST_KEYS, "keys"), (channels, 1, MOST_CHANNELS, "channels")):
        if not least <= size <= most:
            raise ContractError(
                f"{layer}: quantized attention over {size} {name}, but {least} to {most} add up exactly; "
                "leave attention.qk and attention.pv out of the recipe"
            )


def _values_and_scale(x: Floats, name: str) -> tuple[NDArray[np.float64], Floats]:
    """x [..., K] -> the unscaled values of its codes, [..., K], and a scale for each row, [..., 1]."""
    codes, scale = quantize_activation(x, format=name)
    return decode(get_format(name), codes), scale


def no_multipliers(in_features: int, group_size: int) -> NDArray[np.uint8]:
    """The `multiplier_codes` of a weight without multipliers (table (1,)): zeros [1, ceil(groups / 2)]."""
    return np.zeros((1, packed_size(4, _groups(in_features, group_size))), np.uint8)
