"""The method "qdit" (Q-DiT, arXiv 2406.17343): GPTQ on groups of input channels, activations by token and group.

Weights: GPTQ, the scales of a group fitted when its turn comes. Activations: one scale for each token and group, found
at run time; a layer's weight and its input have the same group size. Group sizes may be searched for (group_search.py).

Differences, all of them choices that can be measured through the options: integers are symmetric (the flags `--w_sym`
and `--a_sym` of the authors' code, which their own search uses), since a zero point per group would cost a GEMM per
group; H sees the inputs that the network with quantized weights gives (the authors' 256 samples at distinct timesteps
are here the recipe's trajectories); the recipe chooses the granularity: `weights.granularity=group` is theirs,
`exact_group` gives each channel one scale and its groups small integer multipliers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from export.checkpoint import QuantizedLinear
from export.errors import RecipeError
from export.formats import get_format
from pipeline.calibrate import gptq, rtn
from pipeline.calibrate.blocks import Tensors
from pipeline.calibrate.group_proxy import Candidates, ProxyScore
from pipeline.calibrate.group_search import Settings, search
from pipeline.calibrate.group_space import from_text, layer_sizes, make_space, to_text, with_sizes
from pipeline.calibrate.method import Context, Method, Unit
from pipeline.calibrate.plan import LayerPlan
from pipeline.calibrate.static_activations import find_range

logger = logging.getLogger(__name__)


def token_group(plan: LayerPlan, rows: Callable[[], Tensors]) -> dict[str, Any]:
    """Scales of each token and group; of each token where the layer has no groups."""
    if not plan.group_size or plan.group_size == plan.linear.module.in_features:
        return {}
    return {"activation_scaling": "token_group", "activation_group": plan.group_size}


def per_tensor(plan: LayerPlan, rows: Callable[[], Tensors]) -> dict[str, Any]:
    """One scale for all tokens and timesteps, of least squared error on the inputs seen."""
    return find_range(rows(), get_format(plan.activation_format), "mse", plan.name).fields


# Option "activations" -> fields of a QuantizedLinear, from the plan and a function that gives the layer's inputs.
ACTIVATIONS: dict[str, Callable[[LayerPlan, Callable[[], Tensors]], dict[str, Any]]] = {
    "token_group": token_group,
    "per_token": lambda plan, rows: {},
    "per_tensor": per_tensor,
}
CHOICES = {"activations": tuple(ACTIVATIONS), "rounding": ("gptq", "nearest"), "search": ("none", "proxy")}


class QDit(Method):
    """The method "qdit"."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        for name, known in CHOICES.items():
            if context.options[name] not in known:
                found = context.options[name]
                raise RecipeError(f"calibrate.options.{name} {found!r} of qdit; use one of {', '.join(known)}")

    def plan(self, plans: list[LayerPlan]) -> list[LayerPlan]:
        """The recipe's group sizes, those given as a text, or searched ones."""
        text = str(self.context.options["group_sizes"])
        if text:
            return with_sizes(plans, from_text(text))
        return self.searched(plans) if self.context.options["search"] == "proxy" else plans

    def searched(self, plans: list[LayerPlan]) -> list[LayerPlan]:
        """Group sizes by the evolutionary search, within the bytes that the recipe's own take."""
        options, data = self.context.options, self.context.data
        assert data is not None
        genes, wanted = str(options["genes"]), str(options["sizes"])
        space = make_space(plans, genes, from_text(wanted) if wanted else (), int(options["budget_bytes"]))
        settings = search_settings(options, self.context.seed)
        candidates = Candidates.of(self.context.model, self.context.recipe, genes, space, str(options["activations"]))
        score = ProxyScore.of(candidates.for_workers(settings.workers), data, int(options["samples"]))
        found = search(space, settings, score, self.context.folder / "search" / "scores.json", score.origin)
        sizes = layer_sizes(plans, genes, space, found.best)
        scored, text = len(found.costs), to_text(sizes)
        logger.info("searched %d candidates: %.2f dB with group sizes %s", scored, -found.cost, text)
        return with_sizes(plans, sizes)

    def quantize(self, unit: Unit) -> list[QuantizedLinear]:
        return [self.quantize_layer(unit, plan) for plan in unit.plans]

    def quantize_layer(self, unit: Unit, plan: LayerPlan) -> QuantizedLinear:
        assert unit.observed is not None
        observed, options = unit.observed, self.context.options
        rows = int(options["rows"])
        fields = ACTIVATIONS[str(options["activations"])](plan, lambda: observed.layer_inputs(plan.name, rows=rows))
        how = self.context.recipe.weights.search
        if options["rounding"] == "nearest":
            return replace(rtn.quantize_linear(plan, how), **fields)
        inputs = observed.layer_inputs(plan.name, noisy=True, rows=rows)
        matrix = gptq.hessian(inputs, plan.linear.module.in_features)
        damping, act_order = float(options["damping"]), bool(options["act_order"])
        return gptq.quantize_linear(plan, matrix, how, damping=damping, act_order=act_order, **fields)


def search_settings(options: Any, seed: int) -> Settings:
    """A population of which a fifth are parents, refilled half by crossover, half by mutation, as in the paper."""
    population = int(options["population"])
    half = population // 2
    return Settings(
        int(options["generations"]),
        population,
        max(2, population // 5),
        half,
        population - half,
        float(options["mutation"]),
        seed,
        int(options["workers"]),
    )
