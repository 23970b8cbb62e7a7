"""Uniform noise for jittered runs, drawn once and then read from anywhere in it.

A jittered run moves every result of every operation. Drawing as many new random numbers as the model computes takes
longer than computing it; slices of one table that begin at random places are as good: no two operations meet the same
numbers at the same places but by chance.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Numbers of the table: those of the hidden layer of 900 tokens at true size, 16 MiB. A larger tensor gets them again.
NUMBERS = 2**22
# Of the table, apart from the seeds that runs have: a run's own draws have nothing to do with it.
TABLE_SEED = 2**40 + 1


@cache
def _table(dtype: torch.dtype) -> torch.Tensor:
    """[2 * NUMBERS], uniform in [-1, 1): the numbers twice, so that a slice of NUMBERS may begin anywhere."""
    import torch

    numbers = torch.rand(NUMBERS, generator=torch.Generator().manual_seed(TABLE_SEED), dtype=dtype) * 2 - 1
    return numbers.repeat(2)


class Noise:
    """Numbers uniform in [-1, 1) for one run, from its seed."""

    def __init__(self, seed: int) -> None:
        import torch

        self._generator = torch.Generator().manual_seed(seed)

    def moved(self, value: torch.Tensor, size: torch.Tensor, factor: float) -> torch.Tensor:
        """value + factor * size * noise, for value and size of one shape and one float type."""
        import torch

        noise = self._slice(value.numel(), value.dtype).view(value.shape)
        return torch.addcmul(value, size, noise, value=factor)

    def _slice(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        import torch

        first = int(torch.randint(NUMBERS, (), generator=self._generator))
        if count <= NUMBERS:
            return _table(dtype)[first : first + count]
        return _table(dtype)[first : first + NUMBERS].repeat(-(-count // NUMBERS))[:count]
