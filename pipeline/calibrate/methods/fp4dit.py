"""Learned rounding: FP4DiT's scale-aware AdaRound and the methods it is compared with.

fp4dit: scale-aware, block by block, on the recipe's float formats (arXiv 2503.15465). fp_adaround: the same without
scale awareness. adaround: plain, every layer by itself (arXiv 2004.10568). brecq: plain, block by block, as
Q-Diffusion runs it on INT formats (arXiv 2102.05426, 2302.04304). Scales and group multipliers are found first, by the
recipe's search (the authors: absmax); the rounding is learned on the grid that they make.

Differences of fp4dit from the authors' code: queries, keys and values stay float in attention's products, where theirs
are rounded to the activation format; calibration data are the model's own sampling trajectories, not noised photographs
with their captions; a block whose learned rounding is no better than nearest keeps nearest, in all methods here.
Differences of brecq and adaround, as published for integers: activations are dynamic per token and not of learned
static steps; there is no weighting by the Fisher information; integers are symmetric.
"""

from __future__ import annotations

import logging
from typing import ClassVar

import torch

from export.checkpoint import QuantizedLinear
from export.errors import RecipeError
from pipeline.calibrate.blocks import Observed
from pipeline.calibrate.groups.space import from_text, with_sizes
from pipeline.calibrate.learn.adaround import Quadratic, Schedule, SoftRounding, learn_layer
from pipeline.calibrate.learn.reconstruct import LearningSettings, output_loss, reconstruct
from pipeline.calibrate.memory import BlockSize, Sizes, layer_rounding_bytes, rounding_bytes
from pipeline.calibrate.method import Method, Unit
from pipeline.calibrate.methods.rtn import float_weight, quantize_linear
from pipeline.calibrate.plan import LayerPlan

logger = logging.getLogger(__name__)
# Calls on which a finished block is compared with rounding to nearest: enough to see a difference, a second of work.
JUDGED_CALLS = 8


class BlockRounding(Method):
    """Plain AdaRound of all linears of a block together: "fp_adaround" and "brecq"."""

    scale_aware: ClassVar[bool] = False

    def plan(self, plans: list[LayerPlan]) -> list[LayerPlan]:
        """With the group sizes of the option, where the method has it and it is given."""
        text = str(self.context.options.get("group_sizes", ""))
        return with_sizes(plans, from_text(text)) if text else plans

    def quantize(self, unit: Unit) -> list[QuantizedLinear]:
        nearest = [quantize_linear(plan, self.context.recipe.weights.search) for plan in unit.plans]
        roundings = {base.name: self.rounding(plan, base) for plan, base in zip(unit.plans, nearest, strict=True)}
        reconstruct(unit.observed, roundings, self.settings(), unit.name, self.context.seed)
        return better(unit.observed, unit.name, nearest, [roundings[base.name].layer() for base in nearest])

    def unit_bytes(self, sizes: Sizes, block: BlockSize) -> int:
        return rounding_bytes(block, int(self.context.options["batch"]))

    def rounding(self, plan: LayerPlan, base: QuantizedLinear) -> SoftRounding:
        return SoftRounding(torch.from_numpy(float_weight(plan)), base, self.scale_aware)

    def settings(self) -> LearningSettings:
        """The options. Raises RecipeError for those that learn nothing."""
        options = self.context.options
        for key in ("iterations", "lr", "batch"):
            if float(options.get(key, 1)) <= 0:
                raise RecipeError(f"calibrate.options.{key} {options[key]} must be above 0; method=rtn learns nothing")
        schedule = Schedule(int(options["iterations"]))
        return LearningSettings(
            schedule, float(options["lr"]), float(options["strength"]), int(options.get("batch", 1))
        )


class ScaleAwareRounding(BlockRounding):
    """The method "fp4dit"."""

    scale_aware = True


class LayerRounding(BlockRounding):
    """The method "adaround": every layer on its own output, so that the data come down to one matrix [K, K]."""

    def quantize(self, unit: Unit) -> list[QuantizedLinear]:
        return [self.quantize_layer(plan, unit.observed) for plan in unit.plans]

    def unit_bytes(self, sizes: Sizes, block: BlockSize) -> int:
        """At the layer where it is most: all its inputs, float and quantized, their sums in float64, the learning."""
        return max(layer_rounding_bytes(sizes, layer) for layer in block.layers)

    def quantize_layer(self, plan: LayerPlan, observed: Observed) -> QuantizedLinear:
        rounding = self.rounding(plan, quantize_linear(plan, self.context.recipe.weights.search))
        inputs, noisy = (observed.layer_inputs(plan.name, noisy=which) for which in (False, True))
        quadratic = Quadratic.of(torch.from_numpy(float_weight(plan)), inputs, noisy)
        return learned_layer(rounding, quadratic, self.settings())


def learned_layer(rounding: SoftRounding, quadratic: Quadratic, settings: LearningSettings) -> QuantizedLinear:
    """The layer with rounding learned on its own output, or its base where that is no worse."""
    learn_layer(rounding, quadratic, settings.schedule, settings.learning_rate, settings.strength)
    nearest, learned = rounding.base, rounding.layer()
    before, after = (float(quadratic.loss(torch.from_numpy(one.dequantized()).float())) for one in (nearest, learned))
    return learned if _has_paid(nearest.name, before, after) else nearest


def better(
    observed: Observed, name: str, nearest: list[QuantizedLinear], learned: list[QuantizedLinear]
) -> list[QuantizedLinear]:
    """The learned layers, unless the block is better off without: too few iterations leave weights undecided."""
    before, after = (output_loss(observed, layers, JUDGED_CALLS) for layers in (nearest, learned))
    return learned if _has_paid(name, before, after) else nearest


def _has_paid(name: str, before: float, after: float) -> bool:
    """Whether learning lowered the loss; told either way."""
    logger.info("%s: loss %.4g rounded to nearest, %.4g learned", name, before, after)
    if after >= before:
        logger.warning("%s: learned rounding is not better and not used; use more iterations or calibration data", name)
    return after < before
