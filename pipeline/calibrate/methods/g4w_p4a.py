"""The method "g4w_p4a" (G4W+P4A, the strong baseline of Q-DiT, arXiv 2406.17343): GPTQ weights, PTQ4DM activations.

Weights: GPTQ on groups of 128 input channels, a real scale each. Activations: one static scale (and zero) for all
timesteps, by least squared error on inputs of the model's own trajectory, drawn towards its clean end as in PTQ4DM.
The name was read so from its sizes (that of 4 bits plus one scale for each 128 weights, and at 6 bits too); the paper
does not spell it out in what was seen. Integer weights are symmetric in this project.
"""

from __future__ import annotations

from dataclasses import replace

from export.checkpoint import QuantizedLinear
from export.errors import RecipeError
from pipeline.calibrate.groups.space import with_sizes
from pipeline.calibrate.learn import gptq
from pipeline.calibrate.memory import BlockSize, Sizes, gptq_bytes
from pipeline.calibrate.method import Unit
from pipeline.calibrate.methods.ptq4dm import Ptq4dm
from pipeline.calibrate.plan import LayerPlan
from pipeline.progress import track

GROUP_SIZE = 128


class G4wP4a(Ptq4dm):
    """The method "g4w_p4a". Option granularity: "group" (real scales per 128, as published) or "recipe"."""

    def plan(self, plans: list[LayerPlan]) -> list[LayerPlan]:
        choice = self.context.options["granularity"]
        if choice == "recipe":
            return plans
        if choice != "group":
            raise RecipeError(f"calibrate.options.granularity {choice!r} of g4w_p4a; use group or recipe")
        grouped = [replace(plan, granularity="group", group_size=GROUP_SIZE, multipliers=(1,)) for plan in plans]
        return with_sizes(grouped, [GROUP_SIZE] * len(grouped))  # refuses a layer that it does not divide

    def unit_bytes(self, sizes: Sizes, block: BlockSize) -> int:
        return 2 * super().unit_bytes(sizes, block) + gptq_bytes(block)

    def quantize(self, unit: Unit) -> list[QuantizedLinear]:
        plans = track(unit.plans, len(unit.plans), unit.name)
        return [self.with_static_range(unit, plan, self.weights(unit, plan), None) for plan in plans]

    def weights(self, unit: Unit, plan: LayerPlan) -> QuantizedLinear:
        """By GPTQ on the inputs that the network with quantized weights gives."""
        inputs = unit.observed.layer_inputs(plan.name, noisy=True, rows=self.rows_per_call)
        return gptq.learned_linear(plan, inputs, self.context.recipe, self.context.options)
