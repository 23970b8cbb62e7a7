"""Uniform noise for jittered runs, drawn once and then read from anywhere in it.

A jittered run moves every result of every operation. Drawing as many new random numbers as the model computes takes
longer than computing it; slices of one table that begin at random places are as good: no two operations meet the same
numbers at the same places but by chance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# A table holds this many times the numbers of the largest tensor, so that slices hardly overlap, and at least SMALLEST.
SPARE, SMALLEST = 2, 2**18


class NoiseTable:
    """Numbers uniform in [-1, 1) from one seed."""

    def __init__(self, seed: int) -> None:
        import torch

        self._generator = torch.Generator().manual_seed(seed)
        self._numbers = torch.empty(0)

    def moved(self, value: torch.Tensor, size: torch.Tensor, factor: float) -> torch.Tensor:
        """value + factor * size * noise, for value and size of one shape and one float type."""
        import torch

        noise = self._slice(value.numel(), value.dtype).view(value.shape)
        return torch.addcmul(value, size, noise, value=factor)

    def _slice(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        import torch

        if len(self._numbers) < max(SPARE * count, SMALLEST) or self._numbers.dtype != dtype:
            size = max(SPARE * count, SMALLEST)
            self._numbers = torch.rand(size, generator=self._generator, dtype=dtype) * 2 - 1
        first = int(torch.randint(len(self._numbers) - count + 1, (), generator=self._generator))
        return self._numbers[first : first + count]
