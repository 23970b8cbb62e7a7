"""Between which midpoints of a format a number lies, as the oracle looks it up."""

from __future__ import annotations

import numpy as np
import pytest

from export.formats.format import FORMATS, get_format
from pipeline.verify.oracle import _grid, _places


@pytest.mark.parametrize("name", FORMATS)
def test_the_table_agrees_with_a_search(name: str) -> None:
    fmt = get_format(name)
    _, midpoints = _grid(fmt)
    random = np.random.default_rng(0).standard_normal(20000) * fmt.max_value / 3
    beside = [np.nextafter(midpoints, side) for side in (-np.inf, np.inf)]
    x = np.concatenate([random, *beside, [0.0, -0.0, 1e-310, -1e-310, 1e300, -1e300, np.inf, -np.inf]])
    np.testing.assert_array_equal(_places(fmt, x), np.searchsorted(midpoints, x))
    on_either_side = np.stack([np.searchsorted(midpoints, midpoints, side) for side in ("left", "right")])
    assert (_places(fmt, midpoints) == on_either_side).any(axis=0).all()
