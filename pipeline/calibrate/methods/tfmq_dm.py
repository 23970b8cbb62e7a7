"""The method "tfmq_dm" (TFMQ-DM, arXiv 2311.16503): temporal features are learned by themselves, and per timestep.

Layers whose input depends on the timestep only are few numbers with a finite set of values, one for each step of the
sampler. They are reconstructed apart from the blocks, on that set, and their activation scale is stored for each
timestep (finite-set calibration). All other weights: AdaRound, block by block; all other activations: one static range.

What is left of it here: PixArt's and DiT's timestep embedding and adaLN linears are kept in float by every recipe, so
the temporal features are exact and nothing remains to be preserved; there the method is block-wise AdaRound with static
activations, and measures no more than that. HunyuanDiT's in-block adaLN linears ("adaln") are quantized: these are
learned layer by layer. Their per-timestep scales are those of dynamic per-token quantization: the input has one row for
each sample, so the row's absmax is the timestep's min-max range whenever the row depends on the timestep alone, and for
HunyuanDiT, whose embedding has text and size in it, it is finer than a stored table. (The authors' script stores the
other activations' ranges per timestep as well; a range for all timesteps is what the engines here can hold.)
Per-channel weights start from the scale of least squared error; integer weights are symmetric in this project.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from export.checkpoint import QuantizedLinear
from pipeline.calibrate.learn.adaround import Quadratic, SoftRounding
from pipeline.calibrate.method import Unit
from pipeline.calibrate.methods.baseline import StaticBaseline
from pipeline.calibrate.methods.fp4dit import learned_layer
from pipeline.calibrate.methods.rtn import float_weight, quantize_linear
from pipeline.calibrate.plan import LayerPlan

TEMPORAL = ("adaln",)


class TfmqDm(StaticBaseline):
    """The method "tfmq_dm"."""

    def quantize(self, unit: Unit) -> list[QuantizedLinear]:
        temporal = [plan for plan in unit.plans if plan.linear.kind in TEMPORAL]
        others = replace(unit, plans=[plan for plan in unit.plans if plan.linear.kind not in TEMPORAL])
        layers = [self._temporal_layer(unit, plan) for plan in temporal] + self.quantize_block(others, {})
        by_name = {layer.name: layer for layer in layers}
        return [by_name[plan.name] for plan in unit.plans]

    def _temporal_layer(self, unit: Unit, plan: LayerPlan) -> QuantizedLinear:
        """AdaRound against the layer's own output on every calibration row; scales per token."""
        base, weight = quantize_linear(plan, "mse"), torch.from_numpy(float_weight(plan))
        settings = self.settings()
        if not settings.schedule.iterations:
            return base
        seen = (unit.observed.layer_inputs(plan.name, noisy) for noisy in (False, True))
        return learned_layer(SoftRounding(weight, base, scale_aware=False), Quadratic.of(weight, *seen), settings)
