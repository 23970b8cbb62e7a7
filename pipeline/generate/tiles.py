"""Large pictures through an autoencoder in tiles that overlap and are blended, so that memory does not grow with them.

What diffusers' AutoencoderKL.tiled_decode and tiled_encode compute, in NumPy: tiles at every (1 - overlap) of their
side; where two overlap, each is blended into the next by a weight that rises in equal steps. Each tile has norms and
attention of its own, so that the result is near to that of the whole, not equal. Samples go one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from export.models.families import Config, pixels_per_latent
from pipeline.backends.base import Arrays, only
from pipeline.progress import raise_if_stopped

Array = NDArray[np.float32]
Run = Callable[[Arrays], Arrays]
# Share of a tile's side that it has in common with the next.
OVERLAP = 0.25
# A tile, as diffusers has it for autoencoders that were trained on pictures of this size.
TILE_PIXELS = 512


@dataclass(frozen=True)
class Tiles:
    """Sides of a square tile of one picture, in latents and in pixels, and the share of it that overlaps."""

    latents: int
    pixels: int
    overlap: float = OVERLAP

    @staticmethod
    def of_pixels(config: Config, pixels: int = TILE_PIXELS) -> Tiles:
        """Tiles of so many pixels for an autoencoder of this configuration."""
        return Tiles(pixels // pixels_per_latent(config), pixels)

    def decode(self, run: Run, latents: Array) -> Array:
        """latents [B, C, h, w] -> pictures [B, 3, H, W] by a decoder's `run`."""
        return self._each(run, "latents", latents, self.latents, self.pixels)

    def encode(self, run: Run, pictures: Array) -> Array:
        """pictures [B, 3, H, W] -> moments of their latents [B, 2 C, h, w] by an encoder's `run`."""
        return self._each(run, "sample", pictures, self.pixels, self.latents)

    def _each(self, run: Run, name: Literal["latents", "sample"], inputs: Array, side: int, result_side: int) -> Array:
        """side: of a tile of the input; result_side: of what becomes of it."""

        def computed(part: Array) -> Array:
            raise_if_stopped()
            return only(run({name: np.ascontiguousarray(part)}))

        if max(inputs.shape[2:]) <= side:
            return np.concatenate([computed(inputs[i : i + 1]) for i in range(len(inputs))])
        samples = [self._tiled(computed, inputs[i : i + 1], side, result_side) for i in range(len(inputs))]
        return np.concatenate(samples)

    def _tiled(self, computed: Callable[[Array], Array], whole: Array, side: int, result_side: int) -> Array:
        step, blend = int(side * (1 - self.overlap)), int(result_side * self.overlap)
        kept, above, rows = result_side - blend, list[Array](), list[Array]()
        for top in range(0, whole.shape[2], step):
            row = list[Array]()
            for place, left in enumerate(range(0, whole.shape[3], step)):
                tile = computed(whole[:, :, top : top + side, left : left + side])
                if above:
                    tile = blended(above[place], tile, blend, axis=2)
                if row:
                    tile = blended(row[-1], tile, blend, axis=3)
                row.append(tile)
            rows.append(np.concatenate([tile[:, :, :kept, :kept] for tile in row], axis=3))
            above = row
        return np.concatenate(rows, axis=2)


def blended(before: Array, tile: Array, extent: int, axis: int) -> Array:
    """`tile`, its first `extent` rows (axis 2) or columns (3) mixed with the last of the tile `before` it."""
    extent = min(before.shape[axis], tile.shape[axis], extent)
    if extent == 0:
        return tile
    sides = [1] * tile.ndim
    sides[axis] = extent
    weight = (np.arange(extent) / extent).reshape(sides)
    overlapping = np.take(before, range(before.shape[axis] - extent, before.shape[axis]), axis)
    first, rest = np.split(tile, [extent], axis)
    mixed = overlapping * (1 - weight).astype(tile.dtype) + first * weight.astype(tile.dtype)
    return np.concatenate([mixed, rest], axis)
