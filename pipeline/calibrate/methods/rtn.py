"""Round to nearest: scales from the weights alone, every weight to its nearest code. No data, no learning."""

from __future__ import annotations

import numpy as np

from export.checkpoint import QuantizedLinear
from export.errors import ModelError
from export.formats.format import get_format
from pipeline.calibrate.method import Method, Unit
from pipeline.calibrate.plan import LayerPlan
from pipeline.calibrate.scales import F32, find_scales, in_blocks, round_to_codes


class RoundToNearest(Method):
    """The method "rtn"."""

    def quantize(self, unit: Unit) -> list[QuantizedLinear]:
        return [quantize_linear(plan, self.context.recipe.weights.search) for plan in unit.plans]


def float_weight(plan: LayerPlan) -> F32:
    """The layer's weight [N, K] float32. Raises ModelError naming the layer if it holds NaN or Inf."""
    weight: F32 = plan.linear.module.weight.detach().float().numpy()
    broken = weight.size - int(np.isfinite(weight).sum())
    if broken:
        raise ModelError(
            f"{plan.name}: {broken} of {weight.size} weights are NaN or Inf; fetch or train the model again"
        )
    return weight


def quantize_linear(plan: LayerPlan, search: str) -> QuantizedLinear:
    """Scales by `search` ("absmax" or "mse"), then the nearest codes."""
    weight, fmt = float_weight(plan), get_format(plan.weight_format)
    blocks = in_blocks(weight, plan.granularity, plan.group_size)
    scales, multipliers = find_scales(blocks, fmt, plan.multipliers, search)
    codes = round_to_codes(blocks, fmt, scales, multipliers)
    return plan.layer(codes.reshape(weight.shape), scales.reshape(len(weight), -1), multipliers)
