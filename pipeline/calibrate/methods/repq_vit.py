"""The method "repq_vit" (RepQ-ViT, arXiv 2212.08254): activations quantized per channel, then refolded to per tensor.

All ranges are percentiles: of 99.9, 99.99 and 99.999 % the one with the least squared error. Weights: one range per
output channel. Inputs of the layers behind a LayerNorm get a range per channel, scale s_c and lowest value min_c; with
s the mean of all s_c, r_c = s_c / s and b_c = min_c / r_c - m, the input x' = x / r - b has one scale s and one lowest
value m for all channels, and the weight takes r and the bias W' b. The authors fold r and b into the LayerNorm; that of
a DiT is modulated by adaLN, so here the layer itself carries them. All other inputs: one static range. No learning.

Option `kinds` names the layers behind a norm: "attn.qkv, ff.in" for DiT and PixArt (its cross-attention reads the
residual stream itself); add "cross.q" for HunyuanDiT. The authors' log-sqrt(2) quantizer of attention probabilities has
no place: attention stays float. Integer weights are symmetric in this project (the authors' are not), and floating
activation formats are symmetric: then b = 0, and r alone is folded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from export.checkpoint import QuantizedLinear
from export.dialect.ops import ABSMAX_FLOOR
from export.formats.format import Format, decode, get_format, pack, quantize
from pipeline.calibrate.balance import F32, F64, InputMap, kinds
from pipeline.calibrate.method import Unit
from pipeline.calibrate.methods.baseline import StaticBaseline
from pipeline.calibrate.methods.rtn import float_weight, quantize_linear
from pipeline.calibrate.plan import LayerPlan
from pipeline.calibrate.scales import round_to_codes
from pipeline.calibrate.static_activations import TAILS


@dataclass(frozen=True)
class Ranges:
    """Static quantizers, one for each of C columns: x ~ zero + value(code) * scale. [C] float64; zero 0 if signed."""

    scale: F64
    zero: F64

    def errors(self, x: NDArray[np.floating], fmt: Format) -> F64:
        """Squared error of each column of x [rows, C]."""
        u = (x - self.zero) / self.scale
        return (((decode(fmt, quantize(fmt, u)) - u) * self.scale) ** 2).sum(axis=0)


def percentile_ranges(x: NDArray[np.floating], fmt: Format) -> Ranges:
    """For each column of x [rows, C] the percentile of least squared error.

    A signed format covers +- the percentile of the magnitude, an unsigned one lowest to highest.
    """
    tried = [_ranges(x, fmt, tail) for tail in TAILS]
    best = np.stack([ranges.errors(x, fmt) for ranges in tried]).argmin(axis=0)[None]
    scale, zero = (np.stack([getattr(ranges, key) for ranges in tried]) for key in ("scale", "zero"))
    return Ranges(np.take_along_axis(scale, best, 0)[0], np.take_along_axis(zero, best, 0)[0])


def _ranges(x: NDArray[np.floating], fmt: Format, tail: float) -> Ranges:
    if fmt.sign_bits:
        reach = np.quantile(np.abs(x), 1 - tail, axis=0).astype(np.float64)
        return Ranges(np.maximum(reach, ABSMAX_FLOOR) / fmt.max_value, np.zeros_like(reach))
    low, high = np.quantile(x, (tail, 1 - tail), axis=0).astype(np.float64)
    step = np.maximum(high - low, ABSMAX_FLOOR) / fmt.kmax
    return Ranges(step * fmt.kmax / fmt.max_value, np.round(low / step) * step)  # the authors' integer zero point


def refold(ranges: Ranges) -> tuple[InputMap, float, float]:
    """The map to x', and the scale s and zero m that all channels of x' share.

    m is s times the mean of the channels' min_c / s_c, as in the authors' code.
    """
    scale = float(ranges.scale.mean())
    ratio = ranges.scale / scale
    zero = scale * float((ranges.zero / ranges.scale).mean())
    offset = zero - ranges.zero / ratio
    return InputMap((1 / ratio).astype(np.float32), offset.astype(np.float32) if offset.any() else None), scale, zero


class RepqVit(StaticBaseline):
    """The method "repq_vit"."""

    def quantize(self, unit: Unit) -> list[QuantizedLinear]:
        behind_norm = kinds(str(self.context.options["kinds"]))
        return [
            self._refolded(unit, plan)
            if plan.linear.kind in behind_norm
            else self.with_static_range(unit, plan, percentile_weight(plan), None)
            for plan in unit.plans
        ]

    def _refolded(self, unit: Unit, plan: LayerPlan) -> QuantizedLinear:
        fmt = self.activation_format(plan)
        x = np.concatenate([rows.numpy() for rows in self.rows(unit, plan.name)])
        to, scale, zero = refold(percentile_ranges(x, fmt))
        layer = replace(
            percentile_weight(to.plan(plan)),
            activation_format=fmt.name,
            activation_scaling="per_tensor",
            activation_scale=np.array([scale], np.float32),
            activation_zero=None if fmt.sign_bits else np.array([zero], np.float32),
        )
        return to.layer(layer)


def percentile_weight(plan: LayerPlan) -> QuantizedLinear:
    """Nearest codes under the percentile range of each output channel."""
    weight, fmt = float_weight(plan), get_format(plan.weight_format)
    scales: F32 = percentile_ranges(weight.T, fmt).scale.astype(np.float32)
    codes = round_to_codes(weight[:, None], fmt, scales, np.ones((len(weight), 1), np.uint8))
    base = quantize_linear(plan, "absmax")
    return replace(base, codes=pack(codes[:, 0], fmt.bits), scales=scales[:, None])
