"""The computed tables are NumPy's, but for its own roundings: its stream of raw numbers gives its normal ones."""

from __future__ import annotations

import math

import numpy as np

from pipeline.web.ziggurat import LAYERS, tables

COUNT = 40_000  # of which some ten lie in the tail, and hundreds at the edges of layers


def normals(seed: int, count: int) -> tuple[list[float], int]:
    """Normal numbers by the tables, and how many of them lie in the tail."""
    rows, drawn, in_tail = tables(), list[float](), 0
    raw = iter(np.random.PCG64(seed).random_raw(2 * count).tolist())

    def uniform() -> float:
        return (next(raw) >> 11) * 2.0**-53

    while len(drawn) < count:
        bits = next(raw)
        layer, sign, whole = bits & 0xFF, bits >> 8 & 1, bits >> 9 & 0xFFFFFFFFFFFFF
        x = whole * rows["wi"][layer] * (-1 if sign else 1)
        if whole < rows["ki"][layer]:
            drawn.append(x)
        elif layer == 0:
            in_tail += 1
            while True:
                beyond, height = -rows["inv_r"] * math.log1p(-uniform()), -math.log1p(-uniform())
                if 2 * height > beyond * beyond:
                    break
            drawn.append((rows["r"] + beyond) * (-1 if whole >> 8 & 1 else 1))
        else:
            low, high = rows["fi"][layer], rows["fi"][layer - 1]
            if (high - low) * uniform() + low < math.exp(-0.5 * x * x):
                drawn.append(x)
    return drawn, in_tail


def test_the_stream_is_numpy_s() -> None:
    drawn, in_tail = normals(5, COUNT)
    expected = np.random.default_rng(5).standard_normal(COUNT)
    np.testing.assert_allclose(drawn, expected, rtol=2e-14, atol=0)  # 90 last places, as 254 steps add them up
    np.testing.assert_array_equal(np.float32(drawn), np.float32(expected))
    assert in_tail > 3


def test_the_layers_close() -> None:
    """The lowest edge follows from 255 others, each from the one before: an error of R would grow."""
    rows = tables()
    assert len(rows["ki"]) == len(rows["wi"]) == len(rows["fi"]) == LAYERS and rows["fi"][0] == 1
    top = rows["wi"][1] * 2**52 * (1 - rows["fi"][1])
    bottom = rows["wi"][0] * 2**52 * rows["fi"][-1]
    assert abs(top / bottom - 1) < 1e-12  # the same area, of rounded numbers
