"""What sample inputs hold: one function for each kind of fill in the table of inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from export.errors import EnvironmentLacksError

if TYPE_CHECKING:
    from export.models.description import Description

Array = NDArray[np.float64] | NDArray[np.float32] | NDArray[np.int64] | NDArray[np.bool_]
Cells = tuple[int, int]
Shape = tuple[int, ...]
# HunyuanDiT's rotary positions are laid out on the grid of a 512 pixel image (its pipeline's base size).
ROTARY_BASE_PIXELS = 512


def fill(kind: str, shape: Shape, rng: np.random.Generator, model: Description, cells: Cells) -> Array:
    """An array of `shape` for the fill `kind` ("class:N" carries its number behind the colon)."""
    name, _, argument = kind.partition(":")
    if name == "class":
        return rng.integers(0, int(argument), shape)
    return FILL_FUNCTIONS[name](shape, rng, model, cells)


def _mask(shape: Shape, rng: np.random.Generator, *_: object) -> Array:
    """1 for the first tokens of each row, 0 after a random length of at least half."""
    lengths = rng.integers(-(-shape[1] // 2), shape[1] + 1, shape[0])
    return np.arange(shape[1])[None] < lengths[:, None]


def _image_size(shape: Shape, _: object, model: Description, cells: Cells) -> Array:
    """Rows of (height, width) in pixels, repeated for original and target size, then zeros for the crop offset."""
    size = [cells[0] * model.pixels_per_cell, cells[1] * model.pixels_per_cell]
    row = (size * 2 + [0, 0])[: shape[1]]
    return np.tile(np.array(row, np.float32), (shape[0], 1))


def _rotary(part: int) -> Callable[..., Array]:
    """Cosines (part 0) or sines (part 1) of two-dimensional rotary positions, [patches, head_dim]."""

    def table(shape: Shape, _: object, model: Description, cells: Cells) -> Array:
        try:
            from diffusers.models.embeddings import get_2d_rotary_pos_embed
        except ImportError as error:
            remedy = "install with: pip install 'ditc[build]'"
            raise EnvironmentLacksError(
                f"HunyuanDiT's rotary tables are those of diffusers ({error}); {remedy}"
            ) from error

        patch = model.config["patch_size"]
        grid = (cells[0] // patch, cells[1] // patch)
        region = _centred_region(grid, ROTARY_BASE_PIXELS // model.pixels_per_cell // patch)
        return get_2d_rotary_pos_embed(shape[1], region, grid, output_type="pt")[part].numpy()

    return table


def _centred_region(grid: Cells, base: int) -> tuple[Cells, Cells]:
    """Corners of the grid scaled to fit a square of side `base` and centred in it."""
    scale = base / max(grid)
    size = [round(side * scale) for side in grid]
    start = [round((base - side) / 2) for side in size]
    return (start[0], start[1]), (start[0] + size[0], start[1] + size[1])


FILL_FUNCTIONS: dict[str, Callable[..., Array]] = {
    "normal": lambda shape, rng, *_: rng.standard_normal(shape),
    "timestep": lambda shape, rng, *_: rng.integers(0, 1000, shape),
    "mask": _mask,
    "zeros": lambda shape, *_: np.zeros(shape),
    "aspect": lambda shape, rng, model, cells: np.full(shape, cells[0] / cells[1]),
    "image_size": _image_size,
    "rotary_cos": _rotary(0),
    "rotary_sin": _rotary(1),
}
