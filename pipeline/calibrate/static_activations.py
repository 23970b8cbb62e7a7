"""Static activation ranges: one scale for a whole tensor and all timesteps, settled from calibration data.

Three ways to choose the range (q-diffusion's and its descendants' family, arXiv 2302.04304): what was seen ("minmax"),
its inner share ("percentile"), or the clip of least squared error ("mse"). Signed formats lie symmetrically around
zero. Asymmetric integers are an unsigned uniform format (UE1M7 has the values 0 to 255) with a zero outside,
x ~ zero + value * scale, where -zero is one of the values times the scale, so that x = 0 is exact, as an integer zero
point has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from export.dialect.ops import ABSMAX_FLOOR
from export.errors import ModelError, RecipeError
from export.formats.format import Format, decode, encode, get_format
from pipeline.calibrate.plan import Activation

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
# Shares of the seen range that the MSE search tries: 100 steps of 1 %, those of PTQ4DM's and Q-Diffusion's code.
SHARES = tuple(float(share) for share in np.linspace(1.0, 0.01, 100))
# Outside share of the values that "percentile" tries to leave out; the least squared error decides, as in RepQ-ViT.
TAILS = (1e-3, 1e-4, 1e-5)


@dataclass(frozen=True)
class StaticRange:
    """A static quantizer: x ~ value(code) * scale, plus zero for an unsigned format. scale, zero: [1] float32."""

    format: Format
    scale: F32
    zero: F32 | None = None

    @property
    def fields(self) -> Activation:
        """What a `QuantizedLinear` says of it."""
        return {
            "activation_format": self.format.name,
            "activation_scaling": "per_tensor",
            "activation_scale": self.scale,
            "activation_zero": self.zero,
        }


def find_range(values: Iterable[ArrayLike], fmt: Format, method: str, name: str) -> StaticRange:
    """The static quantizer of a tensor seen as `values` (arrays or tensors of any shape), `method` a key of `METHODS`.

    An unsigned format gets a zero. Raises ModelError naming the layer if a value is NaN or Inf, or there is none.
    """
    if method not in METHODS:
        raise RecipeError(f"range search {method!r} is unknown; use one of {', '.join(METHODS)}")
    return METHODS[method](Samples.of(values, name), fmt)


def unsigned_format(name: str) -> Format:
    """The unsigned uniform format with as many codes as the signed one has: asymmetric integers.

    >>> unsigned_format("INT8").name, unsigned_format("INT4").name
    ('UE1M7', 'UE1M3')
    """
    fmt = get_format(name)
    if not fmt.is_integer:
        raise RecipeError(
            f"asymmetric activations of {name}: only integers have a uniform grid; use INT4, INT6 or INT8"
        )
    return get_format(f"UE1M{fmt.bits - 1}")


@dataclass(frozen=True)
class Samples:
    """Sorted float64 values [count], and the sums of the first 0, 1, ... count values and squares."""

    values: F64
    sums: F64
    squares: F64

    @classmethod
    def of(cls, parts: Iterable[ArrayLike], name: str) -> Samples:
        values = np.concatenate([np.zeros(0), *(np.asarray(part, np.float64).reshape(-1) for part in parts)])
        broken = values.size - int(np.isfinite(values).sum())
        if broken or not values.size:
            fault = f"{broken} of {values.size} calibration values are NaN or Inf" if broken else "no calibration value"
            raise ModelError(f"{name}: {fault}; calibrate with inputs that reach this layer and are finite")
        values.sort()
        first = np.zeros(1)
        sums, squares = (np.concatenate([first, np.cumsum(part)]) for part in (values, values**2))
        return cls(values, sums, squares)

    def squared_error(self, levels: F64) -> float:
        """sum (x - nearest level)^2 over all values, for rising `levels`: exact, a sum over each level's cell."""
        bounds = np.searchsorted(self.values, (levels[1:] + levels[:-1]) / 2)
        edges = np.concatenate([[0], bounds, [self.values.size]])
        count, total, square = np.diff(edges), np.diff(self.sums[edges]), np.diff(self.squares[edges])
        return float((square - 2 * levels * total + levels**2 * count).sum())

    def inner(self, tail: float) -> tuple[float, float]:
        """The values that all but a share `tail` at either end lie between."""
        low, high = np.quantile(self.values, (tail, 1 - tail))
        return float(low), float(high)


def _reaching(fmt: Format, low: float, high: float) -> StaticRange:
    """The quantizer that reaches from `low` to `high`; 0 is always inside."""
    if fmt.sign_bits:
        bound = max(-low, high, ABSMAX_FLOOR)
        return StaticRange(fmt, np.array([bound / fmt.max_value], np.float32))
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32(max(high - low, ABSMAX_FLOOR) / fmt.max_value)
    zero = -np.float32(decode(fmt, encode(fmt, -low / scale))) * scale + np.float32(0)  # -0 + 0 is +0
    return StaticRange(fmt, np.array([scale], np.float32), np.array([zero], np.float32))


def levels(static: StaticRange) -> F64:
    """What the codes stand for, rising and each once."""
    values = np.unique(static.format.values[np.isfinite(static.format.values)])
    values = values[np.abs(values) <= static.format.max_value]
    return values * float(static.scale[0]) + (0.0 if static.zero is None else float(static.zero[0]))


def best_range(samples: Samples, ranges: Sequence[StaticRange]) -> tuple[StaticRange, float]:
    """The one with the least squared error, and that error; the first of equals."""
    errors = [samples.squared_error(levels(one)) for one in ranges]
    best = int(np.argmin(errors))
    return ranges[best], errors[best]


def minmax_range(samples: Samples, fmt: Format) -> StaticRange:
    """Nothing that was seen is clipped."""
    return _reaching(fmt, float(samples.values[0]), float(samples.values[-1]))


def percentile_range(samples: Samples, fmt: Format) -> StaticRange:
    """The best of clipping a share `TAILS` at either end."""
    return best_range(samples, [_reaching(fmt, *samples.inner(tail)) for tail in TAILS])[0]


def mse_range(samples: Samples, fmt: Format) -> StaticRange:
    """The best of the shares `SHARES` of what was seen, both ends shrunk alike."""
    low, high = float(samples.values[0]), float(samples.values[-1])
    return best_range(samples, [_reaching(fmt, low * share, high * share) for share in SHARES])[0]


METHODS: dict[str, Callable[[Samples, Format], StaticRange]] = {
    "minmax": minmax_range,
    "percentile": percentile_range,
    "mse": mse_range,
}
