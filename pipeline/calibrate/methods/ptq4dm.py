"""The method "ptq4dm" (PTQ4DM, arXiv 2211.15736): static activation ranges, calibrated where sampling matters most.

Weights: one scale per output channel by least squared error. Activations: one scale (and zero) for all timesteps, by
least squared error. Its point is the calibration set (NDTC): inputs of the model's own reverse process at timesteps
drawn from a normal distribution skewed towards the clean end, mean 0.4 and standard deviation 0.4 of the trajectory,
clamped to it (the numbers of the authors' script). Here the trajectory's kept steps get rows in proportion to what
such a draw gives each of them on average. The authors' block reconstruction (QDrop) is left out: what distinguishes
the method is its data. Integer weights are symmetric in this project.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor

from export.checkpoint import QuantizedLinear
from export.errors import RecipeError
from pipeline.calibrate.blocks import Tensors
from pipeline.calibrate.method import Unit
from pipeline.calibrate.methods.baseline import StaticBaseline


def skewed_shares(steps: Sequence[int], n_steps: int, mean: float, deviation: float) -> dict[int, float]:
    """Kept step -> its share of draws t ~ N(mean, deviation), clamped to [0, 1]; a draw goes to the nearest kept step.

    t 0 is the trajectory's clean end (step n_steps - 1), 1 its noisy end (step 0). The shares sum to 1.

    >>> {step: round(share, 3) for step, share in skewed_shares([0, 5, 10], 11, 0.4, 0.4).items()}
    {10: 0.354, 5: 0.455, 0: 0.191}
    """
    if deviation <= 0:
        raise RecipeError(f"calibrate.options.deviation {deviation} of ptq4dm must be above 0")
    kept = sorted(set(steps), reverse=True)
    places = [1 - step / max(n_steps - 1, 1) for step in kept]
    borders = [(low + high) / 2 for low, high in pairwise(places)]
    below = [0.0, *(_normal_cdf((border - mean) / deviation) for border in borders), 1.0]
    return {step: high - low for step, (low, high) in zip(kept, pairwise(below), strict=True)}


def _normal_cdf(z: float) -> float:
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


def thinned(x: Tensor, share: float) -> Tensor:
    """A share of the rows of x [rows, K], evenly spread, at least one."""
    count = max(1, round(len(x) * share))
    return x[np.linspace(0, len(x) - 1, count).round().astype(int)]


class Ptq4dm(StaticBaseline):
    """The method "ptq4dm"."""

    def rows(self, unit: Unit, name: str) -> Tensors:
        """The layer's inputs, those of each timestep in its share."""
        data, options = self.context.data, self.context.options
        assert data is not None
        steps = [call.step for call in data.calls]
        shares = skewed_shares(steps, data.n_steps, float(options["mean"]), float(options["deviation"]))
        largest = max(shares.values())
        return [thinned(x, shares[step] / largest) for x, step in zip(super().rows(unit, name), steps, strict=True)]

    def quantize(self, unit: Unit) -> list[QuantizedLinear]:
        return self.quantize_block(unit, {})
