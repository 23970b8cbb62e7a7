"""MSFP's search-based initialisation (arXiv 2505.21591): number format, clip and zero point of least squared error.

Tried are all splits of a bit width into exponent and mantissa that the format table has; uniform grids stand in it as
integers (INT6 is E1M4). Of E4M1, E5M0 and the unsigned formats with four and more exponent bits at 6 and 8 bits the
integer is far outside of INT8, and they are left out. The paper's search space was not seen; ours is that of a
third-party implementation: signed clips up to the largest magnitude, unsigned zero points in 7 steps from the smallest
value to 0 and spans in 25 steps up to the whole range. On a weight, clips of 0.5 to 1.5 times the absmax (scales.py)
were measured to be as good as that implementation's 0.8 to 2.0 (E2M1: 19.21 and 19.19 dB, E1M2: 18.51 and 18.22 dB on
zoo:pixart_mini), so weights use the search that all methods share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import ArrayLike

from export.checkpoint import QuantizedLinear
from export.dialect.ops import ABSMAX_FLOOR
from export.errors import RecipeError
from export.formats.format import FORMATS, Format, get_format
from export.formats.operands import UINT8_MAX, embeds
from pipeline.backends.reference import fake_quantize
from pipeline.calibrate.methods.rtn import float_weight, quantize_linear
from pipeline.calibrate.plan import LayerPlan, group_multipliers
from pipeline.calibrate.static_activations import Samples, StaticRange, best_range

# Clips of a signed activation format as shares of the largest magnitude.
CLIPS = tuple(float(share) for share in np.linspace(0.01, 1.0, 100))
# Of an unsigned one: how many zero points from the smallest value to 0, and spans as shares of the whole range.
ZEROS = 7
SPANS = tuple(float(share) for share in np.linspace(0.05, 1.0, 25))
UNSIGNED_EXPONENTS = 3


def splits(bits: int, signed: bool, embedded: bool = False) -> tuple[Format, ...]:
    """The formats of that many bits, each grid once; `embedded`: only those whose integers are one 8-bit operand.

    >>> [row.name for row in splits(4, signed=True)], [row.name for row in splits(4, signed=False, embedded=True)]
    (['E2M1', 'E1M2', 'E3M0'], ['UE1M3', 'UE2M2', 'UE3M1'])
    >>> [row.name for row in splits(6, signed=True, embedded=True)], [row.name for row in splits(6, signed=False)]
    (['E2M3', 'INT6'], ['UE1M5', 'UE2M4', 'UE3M3'])
    """
    rows = [row for row in FORMATS.values() if row.bits == bits and bool(row.sign_bits) == signed]
    wide = [row for row in rows if not signed and bits > 4 and row.exponent_bits > UNSIGNED_EXPONENTS]
    by_grid: dict[bytes, Format] = {}
    for row in rows:
        if row not in wide and (not embedded or _is_one_operand(row)):
            by_grid.setdefault(_grid(row), row)
    return tuple(by_grid.values())


def _is_one_operand(fmt: Format) -> bool:
    """Signed integers need INT8; unsigned ones have all 8 bits, since their zero is outside of the GEMM."""
    return embeds(fmt.name, "INT8") if fmt.sign_bits else fmt.kmax <= UINT8_MAX


def _grid(fmt: Format) -> bytes:
    """The format's grid as shares of its largest value."""
    values = fmt.values[np.isfinite(fmt.values)]
    return bytes(np.unique(np.abs(values[np.abs(values) <= fmt.max_value]) / fmt.max_value).tobytes())


# --- weights -------------------------------------------------------------------------------------------------------


def search_weight(plan: LayerPlan, search_format: bool = True) -> QuantizedLinear:
    """The layer in the signed format with the least squared error of the weight, clips searched channel by channel.

    Formats whose integers do not fit INT8 are left out. search_format False: the plan's own format. Group multipliers
    are those that stay exact beside the plan's activation format.
    """
    if not search_format:
        return quantize_linear(_with_format(plan, get_format(plan.weight_format)), "mse")
    bits = get_format(plan.weight_format).bits
    layers = [quantize_linear(_with_format(plan, fmt), "mse") for fmt in splits(bits, signed=True, embedded=True)]
    weight = float_weight(plan).astype(np.float64)
    errors = [float(np.square(layer.dequantized() - weight).sum()) for layer in layers]
    return layers[int(np.argmin(errors))]


def _with_format(plan: LayerPlan, fmt: Format) -> LayerPlan:
    """The plan with another weight format: group multipliers are the new format's, one scale if it has none."""
    if plan.granularity != "exact_group":
        return replace(plan, weight_format=fmt.name)
    multipliers = group_multipliers(fmt.name, plan.activation_format)
    if multipliers == (1,):
        return replace(plan, weight_format=fmt.name, granularity="per_channel", group_size=0, multipliers=(1,))
    return replace(plan, weight_format=fmt.name, multipliers=multipliers)


# --- activations ---------------------------------------------------------------------------------------------------


def search_range(parts: Iterable[ArrayLike], formats: Sequence[Format], name: str) -> tuple[StaticRange, float]:
    """The static quantizer of least squared error among `formats`, and that error; `parts` are arrays of any shape.

    Signed formats are tried with every clip, unsigned ones with every zero point and span. Raises ModelError naming
    the layer if a value is NaN or Inf.
    """
    if not formats:
        raise RecipeError(f"{name}: no number format is left to search; use formats of 4, 6 or 8 bits")
    samples = Samples.of(parts, name)
    return best_range(samples, [r for fmt in formats for r in (_signed if fmt.sign_bits else _unsigned)(samples, fmt)])


def _signed(samples: Samples, fmt: Format) -> Iterator[StaticRange]:
    absmax = max(abs(float(samples.values[0])), abs(float(samples.values[-1])), ABSMAX_FLOOR)
    for share in CLIPS:
        yield StaticRange(fmt, np.array([share * absmax / fmt.max_value], np.float32))


def _unsigned(samples: Samples, fmt: Format) -> Iterator[StaticRange]:
    """Q(x) = zero + F(clip(x, zero, zero + span) - zero), with zero <= 0."""
    low, high = min(float(samples.values[0]), 0.0), float(samples.values[-1])
    for zero in np.linspace(low, 0.0, ZEROS):
        for share in SPANS:
            span = max(share * (high - low), ABSMAX_FLOOR)
            scale = np.array([span / fmt.max_value], np.float32)
            yield StaticRange(fmt, scale, np.array([zero], np.float32) + np.float32(0))  # -0 + 0 is +0


def search_token_format(parts: Sequence[torch.Tensor], formats: Sequence[Format], name: str) -> tuple[Format, float]:
    """The signed format with the least squared error under dynamic scales per token, and that error.

    parts: [rows, K] each. It has no clip to search: a token's scale is its absmax.
    """
    if not formats:
        raise RecipeError(f"{name}: no number format is left to search; use formats of 4, 6 or 8 bits")
    errors = [sum(float((fake_quantize(fmt, x) - x).double().square().sum()) for x in parts) for fmt in formats]
    best = int(np.argmin(errors))
    return formats[best], errors[best]
