"""What the compared methods have in common: one weight scale per output channel, static activations, block learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from export.checkpoint import QuantizedLinear
from export.errors import RecipeError
from export.formats.format import Format, get_format
from pipeline.calibrate.balance import InputMap
from pipeline.calibrate.blocks import Tensors
from pipeline.calibrate.learn.adaround import Schedule, SoftRounding
from pipeline.calibrate.learn.reconstruct import LearningSettings, reconstruct
from pipeline.calibrate.memory import BlockSize, Sizes, rounding_bytes
from pipeline.calibrate.method import Method, Unit
from pipeline.calibrate.methods.fp4dit import better
from pipeline.calibrate.methods.rtn import float_weight, quantize_linear
from pipeline.calibrate.plan import LayerPlan
from pipeline.calibrate.static_activations import find_range, unsigned_format

GRANULARITIES = ("per_channel", "recipe")


class Baseline(Method):
    """Options: granularity ("per_channel" as the papers have it, or "recipe"), rows (tokens seen of each call)."""

    def plan(self, plans: list[LayerPlan]) -> list[LayerPlan]:
        granularity = self.context.options.get("granularity", GRANULARITIES[0])
        if granularity not in GRANULARITIES:
            raise RecipeError(f"calibrate.options.granularity {granularity!r}; use one of {', '.join(GRANULARITIES)}")
        return plans if granularity == "recipe" else per_channel(plans)

    @property
    def rows_per_call(self) -> int:
        rows = int(self.context.options["rows"])
        if rows <= 0:
            raise RecipeError(f"calibrate.options.rows {rows} must be positive")
        return rows

    def unit_bytes(self, sizes: Sizes, block: BlockSize) -> int:
        options = self.context.options
        learned = rounding_bytes(block, int(options["batch"])) if "strength" in options else 0
        return sizes.kept_rows(block, self.rows_per_call) + learned


def per_channel(plans: Sequence[LayerPlan]) -> list[LayerPlan]:
    """The same plans with one weight scale per output channel."""
    return [replace(plan, granularity="per_channel", group_size=0, multipliers=(1,)) for plan in plans]


class StaticBaseline(Baseline):
    """Options besides: asymmetric (integer activations get a zero), search (of the activations' range)."""

    def activation_format(self, plan: LayerPlan) -> Format:
        """The recipe's; integers as unsigned ones with a zero if the option asks for it."""
        fmt = get_format(plan.activation_format)
        return unsigned_format(fmt.name) if fmt.is_integer and self.context.options["asymmetric"] else fmt

    def rows(self, unit: Unit, name: str) -> Tensors:
        """What a layer's range is settled on: its input in the float model, [rows, K] of each call."""
        return unit.observed.layer_inputs(name, rows=self.rows_per_call)

    def with_static_range(
        self, unit: Unit, plan: LayerPlan, layer: QuantizedLinear, to: InputMap | None
    ) -> QuantizedLinear:
        """The layer with one activation scale for all timesteps, of its input behind the map `to`."""
        rows = self.rows(unit, plan.name)
        mapped = rows if to is None else [to.rows(x) for x in rows]
        search = str(self.context.options["search"])
        static = find_range([x.numpy() for x in mapped], self.activation_format(plan), search, plan.name)
        layer = replace(layer, **static.fields)
        return layer if to is None else to.layer(layer)

    def quantize_block(self, unit: Unit, maps: Mapping[str, InputMap]) -> list[QuantizedLinear]:
        """Weights by least squared error behind the `maps` (layer name -> map), then static ranges."""
        plans = [maps[plan.name].plan(plan) if plan.name in maps else plan for plan in unit.plans]
        bases = [quantize_linear(plan, "mse") for plan in plans]
        if "iterations" in self.context.options and self.settings().schedule.iterations:
            bases = self.learn_rounding(unit, plans, bases, maps)
        return [
            self.with_static_range(unit, plan, base, maps.get(plan.name))
            for plan, base in zip(plans, bases, strict=True)
        ]

    def learn_rounding(
        self, unit: Unit, plans: list[LayerPlan], bases: list[QuantizedLinear], maps: Mapping[str, InputMap]
    ) -> list[QuantizedLinear]:
        """AdaRound of the block's weights together (BRECQ), with float activations; `bases` where it is no better."""
        roundings = {}
        for plan, base in zip(plans, bases, strict=True):
            to, weight = maps.get(plan.name), torch.from_numpy(float_weight(plan))
            roundings[plan.name] = SoftRounding(weight, base, False) if to is None else MappedRounding(weight, base, to)
        reconstruct(unit.observed, roundings, self.settings(), unit.name, self.context.seed)
        learned = [roundings[plan.name].layer() for plan in plans]
        mapped = ([maps[one.name].layer(one) if one.name in maps else one for one in some] for some in (bases, learned))
        return better(unit.observed, unit.name, *mapped)

    def settings(self) -> LearningSettings:
        """Those of AdaRound; 0 iterations for none."""
        options = self.context.options
        iterations, rate = int(options["iterations"]), float(options["lr"])
        if iterations < 0 or rate <= 0:
            raise RecipeError(f"calibrate.options: iterations {iterations} must not be negative, lr {rate} be above 0")
        return LearningSettings(Schedule(iterations), rate, float(options["strength"]), int(options["batch"]))


class MappedRounding(SoftRounding):
    """The rounding of a weight behind a balance, seen from before it: the weight that the float input meets."""

    multiplier: Tensor

    def __init__(self, weight: Tensor, base: QuantizedLinear, to: InputMap) -> None:
        super().__init__(weight, base, False)
        if to.offset is not None:
            raise ValueError(
                f"{base.name}: its balance has an offset; rounding is learned behind a plain multiplier only"
            )
        self.register_buffer("multiplier", torch.from_numpy(to.multiplier), persistent=False)

    def forward(self) -> tuple[Tensor, Tensor]:
        weight, share = super().forward()
        return weight * self.multiplier, share
