"""The method "ptq4dit" (PTQ4DiT, arXiv 2405.16005): salient channels of activations and weights balance each other.

Channel c of a layer's input reaches x_c, of its weight w_c. x is divided and w multiplied by B_c = sqrt(x_c / w_c), so
that both reach sqrt(x_c w_c). x_c is a mean of the maxima x_c^t over timesteps t, with the weights
softmax(-rho(x^t, w)), rho Spearman's rank correlation over channels: steps at which activation and weight are salient
in different channels can give most to each other. Then weights by least squared error per output channel, activations
by least squared error per tensor, static for all timesteps, asymmetric where the recipe's format is an integer.

Balanced are the layers that the authors' code balances on DiT: qkv, proj and fc1; not fc2, which follows GELU. PixArt
and HunyuanDiT have cross-attention besides, which the paper did not have: its layers are balanced like those of the
self-attention. The authors then reconstruct each block with quantized activations: here with float ones, `iterations`
steps of AdaRound (0 for none). They quantize attention probabilities to 8 bits: here attention stays float.
Integer weights are symmetric in this project.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from export.checkpoint import QuantizedLinear
from pipeline.calibrate.balance import F64, channel_peaks, kinds, shared_maps
from pipeline.calibrate.method import Unit
from pipeline.calibrate.methods.baseline import StaticBaseline


def ranks(values: F64) -> F64:
    """Rank of each value, 0 for the smallest; equal values share the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1
    return (last - (counts - 1) / 2)[place]


def spearman(one: F64, other: F64) -> float:
    """Spearman's rank correlation; 0 where one side is constant and none is defined."""
    a, b = ranks(one), ranks(other)
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / norm) if norm > 0 else 0.0


def salience(peaks: F64, w: F64) -> F64:
    """x_c [K] of peaks [T, K], the activation's at each timestep, beside the weight's w [K]."""
    share = np.exp([-spearman(row, w) for row in peaks])
    return (share / share.sum()) @ peaks


def peaks_by_timestep(peaks: F64, timesteps: Sequence[float]) -> F64:
    """[T, K]: largest of the calls at each timestep, from peaks [calls, K]."""
    times = np.array(timesteps)
    return np.stack([peaks[times == t].max(axis=0) for t in np.unique(times)])


class Ptq4dit(StaticBaseline):
    """The method "ptq4dit"."""

    def quantize(self, unit: Unit) -> list[QuantizedLinear]:
        balanced_kinds = kinds(str(self.context.options["kinds"]))
        balanced = [plan for plan in unit.plans if plan.linear.kind in balanced_kinds]

        def magnitudes(peaks: F64, w: F64) -> F64:
            return salience(peaks_by_timestep(peaks, unit.observed.timesteps), w)

        maps = shared_maps(unit.observed, balanced, self.rows_per_call, channel_peaks, magnitudes)
        return self.quantize_block(unit, maps)
