"""Rotary positions are diffusers'."""

from __future__ import annotations

import numpy as np
import pytest

from export.models.rotary import centred_region, rotary_tables

GRIDS = [(32, 32), (4, 4), (64, 64), (48, 80), (80, 48), (36, 28), (1, 5)]


@pytest.mark.torch
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("head_dim", [88, 32, 4])
def test_tables_are_those_of_diffusers(grid: tuple[int, int], head_dim: int) -> None:
    """Theirs rounds position, rate and angle to float32, each twice at most on its way, and the cosine; ours the cosine
    alone: an angle is off by 6 halves of a unit in the last place, and a cosine by as much and one rounding."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

    base = 32
    region = get_resize_crop_region_for_grid(grid, base)
    assert centred_region(grid, base) == region
    theirs = get_2d_rotary_pos_embed(head_dim, region, grid, output_type="pt")
    largest = max(abs(corner) for point in region for corner in point)
    limit = 6 * largest * 2.0**-24 + 2.0**-24
    for own, other in zip(rotary_tables(head_dim, grid, base), theirs, strict=True):
        assert own.shape == other.shape == (grid[0] * grid[1], head_dim) and own.dtype == np.float32
        assert np.abs(own - other.numpy()).max() <= limit


def test_angles_of_a_square() -> None:
    """A patch in the second row and third column: 2 radians by the column, 1 by the row, for the quickest pair."""
    cosines, sines = rotary_tables(4, (32, 32), 32)
    np.testing.assert_allclose(cosines[32 + 2], np.cos([2, 2, 1, 1]), rtol=2.0**-23)
    np.testing.assert_allclose(sines[32 + 2], np.sin([2, 2, 1, 1]), rtol=2.0**-23)
    with pytest.raises(ValueError, match="head_dim 6 must be a multiple of 4"):
        rotary_tables(6, (4, 4), 4)
