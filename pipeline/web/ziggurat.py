"""The tables by which NumPy draws normal numbers, computed: a ziggurat of 256 layers (Marsaglia and Tsang, 2000).

Each layer has the same area V under exp(-x^2 / 2); x_255 = R is where the tail begins, and x_i follows from x_(i+1) by
f(x_i) = f(x_(i+1)) + V / x_(i+1). Here this is computed with 40 digits and rounded once. NumPy's own tables come from
arithmetic in double precision, and differ by some 1e-14: rounded to float32, as noise is, one number in millions may be
another, by its last place.
"""

from __future__ import annotations

from decimal import Decimal, localcontext
from functools import cache

from typing_extensions import TypedDict

LAYERS, FRACTION = 256, Decimal(2) ** 52
DIGITS = 40
# The tail's edge at which the layers add up to the whole.
EDGE = Decimal("3.6541528853610087963519472518")


class Tables(TypedDict):
    """r, inv_r: the tail's edge and its inverse. ki: whole numbers below which a draw is within its layer; wi: width of
    a layer over 2^52; fi: height of its edge."""

    r: float
    inv_r: float
    ki: list[int]
    wi: list[float]
    fi: list[float]


@cache
def tables() -> Tables:
    """Of all layers."""
    with localcontext() as context:
        context.prec = DIGITS
        edges = [Decimal(0)] * LAYERS
        edges[-1] = EDGE
        area = EDGE * _height(EDGE) + _tail(EDGE)
        for i in range(LAYERS - 2, 0, -1):
            edges[i] = (-2 * (area / edges[i + 1] + _height(edges[i + 1])).ln()).sqrt()
        base = area / _height(EDGE)  # the lowest layer, as wide as a rectangle of its area would be
        limits = [EDGE / base, Decimal(0), *(edges[i - 1] / edges[i] for i in range(2, LAYERS))]
        return {
            "r": float(EDGE),
            "inv_r": float(1 / EDGE),
            "ki": [int(limit * FRACTION) for limit in limits],
            "wi": [float(width / FRACTION) for width in (base, *edges[1:])],
            "fi": [float(_height(edge)) for edge in edges],
        }


def _height(x: Decimal) -> Decimal:
    return (-x * x / 2).exp()


def _tail(x: Decimal) -> Decimal:
    """The integral of exp(-t^2 / 2) from x on: exp(-x^2 / 2) / (x + 1 / (x + 2 / (x + 3 / ...)))."""
    fraction = x
    for k in range(400, 0, -1):
        fraction = x + k / fraction
    return _height(x) / fraction
