"""Rotary positions of a picture's patches (arXiv 2104.09864), in two dimensions as HunyuanDiT has them.

Computed in float64 and rounded once; diffusers computes them in float32, and is as far from these as its roundings.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Positions are laid out on the grid of a picture of so many pixels a side (its pipeline's base size).
BASE_PIXELS = 512
# Wavelength of the slowest pair of channels, by 2 pi.
LONGEST = 10000.0


def rotary_tables(head_dim: int, grid: tuple[int, int], base: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines [patches, head_dim] of the patches of a picture, row by row.

    grid: its height and width in patches; base: patches a side of a picture of BASE_PIXELS, into which the grid is
    scaled and centred. The first half of the channels is for the column, the second for the row; two by two they turn
    alike.
    """
    if head_dim % 4:
        raise ValueError(f"head_dim {head_dim} must be a multiple of 4")
    (top, left), (bottom, right) = centred_region(grid, base)
    rows, columns = _positions(top, bottom, grid[0]), _positions(left, right, grid[1])
    quarter = head_dim // 4
    rates = LONGEST ** (-np.arange(quarter) / quarter)
    of_columns = np.tile(columns, len(rows))[:, None] * rates
    of_rows = np.repeat(rows, len(columns))[:, None] * rates
    angles = np.repeat(np.concatenate([of_columns, of_rows], axis=1), 2, axis=1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _positions(start: int, stop: int, count: int) -> NDArray[np.float64]:
    """As diffusers spaces them, so that the last lies before `stop`: evenly where the region begins at 0, and closer
    together where it begins elsewhere."""
    return np.linspace(start, stop * (count - 1) / count, count)


def centred_region(grid: tuple[int, int], base: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Corners of the grid scaled to fit a square of side `base` and centred in it."""
    scale = base / max(grid)
    size = [round(side * scale) for side in grid]
    start = [round((base - side) / 2) for side in size]
    return (start[0], start[1]), (start[0] + size[0], start[1] + size[1])
