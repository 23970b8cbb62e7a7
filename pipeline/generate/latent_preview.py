"""What latents look like, roughly and at once: to show what a drawing is about to become.

A decoder takes as long as many steps of a denoiser. A cell of the latents of an autoencoder for pictures is little more
than the colour of its pixels, blurred, so that a linear map of its channels to one colour shows what there is where.
The map is not given with an autoencoder: it is learned, by least squares, from every picture that the decoder makes.
"""

from __future__ import annotations

import threading

import numpy as np

from pipeline.generate.sampling import FloatArray

# Of the mean square of latents: keeps the map finite where a channel never changes.
RIDGE = 1e-4


class LatentPreview:
    """May be used from any number of threads.

    channels: of latents; cell: pixels of a latent's side.
    """

    def __init__(self, channels: int, cell: int) -> None:
        self.cell = cell
        self._squares = np.zeros((channels + 1, channels + 1))
        self._products = np.zeros((channels + 1, 3))
        self._lock = threading.Lock()

    @property
    def is_ready(self) -> bool:
        """Whether a picture has been seen."""
        return bool(self._squares[-1, -1] > 0)

    def learn(self, latents: FloatArray, pictures: FloatArray) -> None:
        """See pictures [B, 3, H, W] from -1 to 1 that were decoded of latents [B, C, h, w]. Such as are not finite
        teach nothing."""
        if not (np.isfinite(latents).all() and np.isfinite(pictures).all()):
            return
        count, _, height, width = latents.shape
        blocks = np.clip(pictures, -1, 1).reshape(count, 3, height, self.cell, width, self.cell)
        colours = blocks.mean(axis=(3, 5), dtype=np.float64).transpose(0, 2, 3, 1).reshape(-1, 3)
        cells = _with_ones(latents).astype(np.float64)
        with self._lock:
            self._squares += cells.T @ cells
            self._products += cells.T @ colours

    def __call__(self, latents: FloatArray) -> FloatArray:
        """Pictures [B, 3, H, W] from -1 to 1 of latents [B, C, h, w], one colour for each cell."""
        with self._lock:
            damped = self._squares + RIDGE * np.trace(self._squares) / len(self._squares) * np.eye(len(self._squares))
            weights = np.linalg.solve(damped, self._products)
        count, _, height, width = latents.shape
        colours = (_with_ones(latents) @ weights).reshape(count, height, width, 3).transpose(0, 3, 1, 2)
        enlarged = np.clip(colours, -1, 1).repeat(self.cell, axis=2).repeat(self.cell, axis=3)
        return np.asarray(enlarged, np.float32)


def _with_ones(latents: FloatArray) -> FloatArray:
    """The channels of every cell of [B, C, h, w] and a one, [cells, C + 1]."""
    cells = latents.transpose(0, 2, 3, 1).reshape(-1, latents.shape[1])
    return np.concatenate([cells, np.ones((len(cells), 1), cells.dtype)], axis=1)
