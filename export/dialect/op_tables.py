"""Attributes of the `fpq` ops: what a user chooses, checked, plus the tables that the function bodies read.

One function per op, named like its meaning; the tables follow from the rows of the formats.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from export.errors import ContractError
from export.formats.format import Format, get_format


def _values(fmt: Format) -> list[float]:
    return [float(v) for v in fmt.values]


def _quantizer(fmt: Format) -> dict[str, Any]:
    """Tables of the encoder: binade starts, the step in each binade, and the code of minus each non-negative code."""
    starts = [float(v) for v in fmt.binade_starts]
    first = 1.0 if fmt.is_integer else float(np.ldexp(1.0, fmt.min_exponent - fmt.mantissa_bits))
    positive = np.arange(fmt.max_code + 1)
    return {
        "max_value": fmt.max_value,
        "thresholds": starts or [float("inf")],
        "steps": [first * 2**i for i in range(len(starts) + 1)],
        "binade_codes": 2**fmt.mantissa_bits,
        "max_code": fmt.max_code,
        "negative_codes": [int(c) for c in _negatives(fmt, positive)],
    }


def _negatives(fmt: Format, positive: Any) -> Any:
    if fmt.is_integer:
        return -positive % 2**fmt.bits
    if not fmt.sign_bits:
        return np.zeros_like(positive)
    return np.where(positive > 0, positive + 2 ** (fmt.bits - 1), 0)


def _grouping(in_features: int, group_size: int, multipliers: tuple[int, ...]) -> dict[str, Any]:
    if group_size and in_features % group_size:
        raise ContractError(
            f"in_features {in_features} is not a multiple of group_size {group_size}; use a divisor or 0"
        )
    if not 1 <= len(multipliers) <= 16:
        raise ContractError(f"{len(multipliers)} multipliers; a 4-bit index reaches 1 to 16 of them")
    return {
        "in_features": in_features,
        "group_size": group_size,
        "multipliers": [int(m) for m in multipliers],
        "groups": in_features // group_size if group_size else 1,
    }


def _weight_tables(*, format: str, in_features: int, group_size: int, multipliers: tuple[int, ...] = (1,)) -> dict:
    fmt = get_format(format)
    return {"format": format, "bits": fmt.bits, **_grouping(in_features, group_size, multipliers)}


def dequantize_weight(*, format: str, **grouping: Any) -> dict:
    return {**_weight_tables(format=format, **grouping), "values": _values(get_format(format))}


def quantize_weight(*, format: str, **grouping: Any) -> dict:
    return {**_weight_tables(format=format, **grouping), **_quantizer(get_format(format))}


def quantize_activation(*, format: str) -> dict:
    return {"format": format, **_quantizer(get_format(format))}


def gelu_quantize(*, format: str) -> dict:
    return quantize_activation(format=format)


def dequantize_activation(*, format: str) -> dict:
    return {"format": format, "values": _values(get_format(format))}


def quantize_static(*, format: str) -> dict:
    return quantize_activation(format=format)


def dequantize_static(*, format: str) -> dict:
    return dequantize_activation(format=format)


def quantize_groups(*, format: str, in_features: int, group_size: int) -> dict:
    return {**quantize_activation(format=format), **_activation_groups(in_features, group_size)}


def dequantize_groups(*, format: str, in_features: int, group_size: int) -> dict:
    return {**dequantize_activation(format=format), **_activation_groups(in_features, group_size)}


def _activation_groups(in_features: int, group_size: int) -> dict:
    found = _grouping(in_features, group_size, (1,))
    return {key: found[key] for key in ("group_size", "groups")}


def packed_gemm(
    *,
    layer: str,
    activation_format: str,
    weight_format: str,
    in_features: int,
    group_size: int,
    multipliers: tuple[int, ...] = (1,),
) -> dict:
    return {
        "layer": layer,
        "activation_format": activation_format,
        "weight_format": weight_format,
        **_grouping(in_features, group_size, multipliers),
        "activation_values": _values(get_format(activation_format)),
        "weight_values": _values(get_format(weight_format)),
        "weight_bits": get_format(weight_format).bits,
    }


def packed_group_gemm(*, activation_group: int, in_features: int, scale_groups: int, **choices: Any) -> dict:
    """scale_groups: real scales of a weight row, K / group_size or 1."""
    of_activation = _activation_groups(in_features, activation_group)["groups"]
    return {
        **packed_gemm(in_features=in_features, **choices),
        "activation_group": activation_group,
        "scale_groups": scale_groups,
        "sum_groups": math.lcm(of_activation, scale_groups),
    }


def norm_modulate_quantize(*, format: str, epsilon: float) -> dict:
    return {**quantize_activation(format=format), "epsilon": epsilon}
