"""The method "vidit_q" (ViDiT-Q, arXiv 2406.02540): dynamic scales per token behind a static balance of channels.

Weights: one scale per output channel by absmax, rounded to nearest, no learning. Activations: one scale per token,
found at run time. Before it, SmoothQuant's balance (arXiv 2211.10438): x / s, W * s with s_c = x_c^alpha /
w_c^(1 - alpha), alpha 0.3 as in the authors' W4A8 of PixArt; w_c is the channel's absmax in the weight, x_c a running
mean over the calibration calls (momentum 0.95) of the samples' mean absmax over tokens. Their code can keep an s for
each range of timesteps; here one serves all, because a layer has one weight. Mixed precision by layer kind is the
recipe's `formats.weight_of`.

Activations are symmetric here (the authors' are asymmetric): a zero point needs static scales in this project. Integer
weights are symmetric too. The Hadamard rotation of later versions is left out.
"""

from __future__ import annotations

import numpy as np
import torch

from export.checkpoint import QuantizedLinear
from export.errors import RecipeError
from pipeline.calibrate.balance import F64, kinds, shared_maps
from pipeline.calibrate.method import Context, Unit
from pipeline.calibrate.methods.baseline import Baseline
from pipeline.calibrate.methods.rtn import quantize_linear


def sample_peaks(x: torch.Tensor) -> torch.Tensor:
    """[K]: mean over samples of each channel's largest magnitude over tokens; x [B, S, K], or [B, K] of one token."""
    tokens = x if x.ndim > 2 else x.unsqueeze(1)
    return tokens.abs().amax(-2).flatten(0, -2).mean(0)


def running_mean(values: F64, momentum: float) -> F64:
    """[K]: the last of m <- momentum m + (1 - momentum) v over values [calls, K], from the first value on."""
    mean = values[0]
    for value in values[1:]:
        mean = momentum * mean + (1 - momentum) * value
    return np.asarray(mean)


class ViditQ(Baseline):
    """The method "vidit_q"."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.alpha, self.momentum = (float(context.options[key]) for key in ("alpha", "momentum"))
        for name, value in (("alpha", self.alpha), ("momentum", self.momentum)):
            if not 0 <= value <= 1:
                raise RecipeError(f"calibrate.options.{name} {value} of vidit_q must be between 0 and 1")

    def quantize(self, unit: Unit) -> list[QuantizedLinear]:
        balanced_kinds = kinds(str(self.context.options["kinds"]))
        balanced = [plan for plan in unit.plans if plan.linear.kind in balanced_kinds]

        def magnitudes(peaks: F64, _: F64) -> F64:
            return running_mean(peaks, self.momentum)

        maps = shared_maps(unit.observed, balanced, self.rows_per_call, sample_peaks, magnitudes, self.alpha)
        return [
            maps[plan.name].layer(quantize_linear(maps[plan.name].plan(plan), "absmax"))
            if plan.name in maps
            else quantize_linear(plan, "absmax")
            for plan in unit.plans
        ]
