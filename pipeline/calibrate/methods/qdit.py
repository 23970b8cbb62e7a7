"""The method "qdit" (Q-DiT, arXiv 2406.17343): GPTQ on groups of input channels, activations by token and group.

Weights: GPTQ; the scales of a group are fitted when its turn comes, to their absmax unless the option `range` says
otherwise. Activations: one scale for each token and group, found at run time; a layer's weight and its input have the
same group size. Group sizes may be searched for (groups/search.py).

Differences, all of them choices that can be measured through the options: integers are symmetric (the flags `--w_sym`
and `--a_sym` of the authors' code, which their own search uses), since a zero point per group would cost a GEMM per
group; H sees the inputs that the network with quantized weights gives (the authors' 256 samples at distinct timesteps
are here the recipe's trajectories); the recipe chooses the granularity: `weights.granularity=group` is theirs,
`exact_group` gives each channel one scale and its groups small integer multipliers. One difference has no option: DiT's
adaLN linears stay float, as in all methods here, where the authors' GPTQ path rounds their weights too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from export.checkpoint import QuantizedLinear
from export.errors import RecipeError
from export.formats.format import get_format
from pipeline.calibrate.blocks import BlockRunner, Tensors, group_by_block
from pipeline.calibrate.groups.candidates import Candidates, store_layers
from pipeline.calibrate.groups.proxy import ProxyScore
from pipeline.calibrate.groups.search import SearchSettings, Space, search
from pipeline.calibrate.groups.space import from_text, layer_sizes, make_space, to_text, with_sizes
from pipeline.calibrate.learn import gptq
from pipeline.calibrate.memory import BlockSize, Sizes, gptq_bytes
from pipeline.calibrate.method import Context, Method, Unit
from pipeline.calibrate.methods import rtn
from pipeline.calibrate.plan import Activation, LayerPlan
from pipeline.calibrate.static_activations import find_range
from pipeline.jobs.processes import in_processes
from pipeline.methods import Scalar
from pipeline.progress import track

logger = logging.getLogger(__name__)


def token_group(plan: LayerPlan, rows: Callable[[], Tensors]) -> Activation:
    """Scales of each token and group; of each token where the layer has no groups."""
    if not plan.group_size or plan.group_size == plan.linear.module.in_features:
        return {}
    return {"activation_scaling": "token_group", "activation_group": plan.group_size}


def per_tensor(plan: LayerPlan, rows: Callable[[], Tensors]) -> Activation:
    """One scale for all tokens and timesteps, of least squared error on the inputs seen."""
    return find_range(rows(), get_format(plan.activation_format), "mse", plan.name).fields


# Option "activations" -> fields of a QuantizedLinear, from the plan and a function that gives the layer's inputs.
ACTIVATIONS: dict[str, Callable[[LayerPlan, Callable[[], Tensors]], Activation]] = {
    "token_group": token_group,
    "per_token": lambda plan, rows: {},
    "per_tensor": per_tensor,
}
ELSEWHERE = {
    "search": "; pictures judge in python -m benchmarks.quality.search_groups --fitness fid, and what it finds goes to "
    "calibrate.options.group_sizes"
}
CHOICES = {
    "activations": tuple(ACTIVATIONS),
    "rounding": ("gptq", "nearest"),
    "candidates": ("own", "nearest"),
    "search": ("none", "proxy"),
}


class QDit(Method):
    """The method "qdit"."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        for name, known in CHOICES.items():
            if context.options[name] not in known:
                value = context.options[name]
                use = ", ".join(known) + ELSEWHERE.get(name, "")
                raise RecipeError(f"calibrate.options.{name} {value!r} of qdit; use one of {use}")
        self.weight_search = gptq.clip_search(context.recipe, context.options)

    def plan(self, plans: list[LayerPlan]) -> list[LayerPlan]:
        """The recipe's group sizes, those given as a text, or searched ones."""
        text = str(self.context.options["group_sizes"])
        if text:
            return with_sizes(plans, from_text(text))
        return self.searched(plans) if self.context.options["search"] == "proxy" else plans

    def searched(self, plans: list[LayerPlan]) -> list[LayerPlan]:
        """Group sizes by the evolutionary search, within the bytes that the recipe's own take."""
        options, data, folder = self.context.options, self.context.data, self.context.folder / "search"
        assert data is not None
        space, settings = self.space(plans), search_settings(options, self.context.seed)
        with in_processes(search_workers(options)) as runner:
            score = ProxyScore.of(self.candidates(plans, space, folder), data, int(options["samples"]))
            outcome = search(space, settings, score, folder / "scores.json", score.origin, runner)
        sizes = layer_sizes(plans, str(options["genes"]), space, outcome.best)
        scored, text = len(outcome.costs), to_text(sizes)
        logger.info("searched %d candidates: %.2f dB with group sizes %s", scored, -outcome.cost, text)
        return with_sizes(plans, sizes)

    def space(self, plans: list[LayerPlan]) -> Space:
        """What the options let the search choose from."""
        options, text = self.context.options, str(self.context.options["sizes"])
        sizes = from_text(text) if text else ()
        return make_space(plans, str(options["genes"]), sizes, int(options["budget_bytes"]))

    def candidates(self, plans: list[LayerPlan], space: Space, folder: Path) -> Candidates:
        """Where the search gets its layers from: rounded to nearest when asked for, or made now as they will be."""
        options, model = self.context.options, self.context.model
        recipe = replace(self.context.recipe, weights=replace(self.context.recipe.weights, search=self.weight_search))
        genes, activations = str(options["genes"]), str(options["activations"])
        if options["candidates"] == "nearest":
            return Candidates(model.source, recipe, genes, space, activations, model)
        assert self.context.data is not None
        runner = BlockRunner(model, self.context.data, list(group_by_block(plans)))
        store_layers(runner, plans, genes, space, self.quantize_layer, folder / "layers")
        return Candidates(model.source, recipe, genes, space, activations, model, folder / "layers")

    def unit_bytes(self, sizes: Sizes, block: BlockSize) -> int:
        kept = sizes.kept_rows(block, int(self.context.options["rows"]))
        return (2 if self.context.options["activations"] == "per_tensor" else 1) * kept + gptq_bytes(block)

    def apart_bytes(self, sizes: Sizes, plans: list[LayerPlan]) -> int:
        """Every worker of the search has a model and each layer in all its sizes, in float32."""
        if self.context.options["search"] != "proxy" or self.context.options["group_sizes"]:
            return 0
        choices = max(len(gene.sizes) for gene in self.space(plans).genes)
        model_bytes = 4 * self.context.model.parameters
        return int(self.context.options["workers"]) * (model_bytes + (choices + 1) * sizes.linear_bytes)

    def quantize(self, unit: Unit) -> list[QuantizedLinear]:
        return [self.quantize_layer(unit, plan) for plan in track(unit.plans, len(unit.plans), unit.name)]

    def quantize_layer(self, unit: Unit, plan: LayerPlan) -> QuantizedLinear:
        observed, options = unit.observed, self.context.options
        rows = int(options["rows"])
        fields = ACTIVATIONS[str(options["activations"])](plan, lambda: observed.layer_inputs(plan.name, rows=rows))
        if options["rounding"] == "nearest":
            return replace(rtn.quantize_linear(plan, self.weight_search), **fields)
        inputs = observed.layer_inputs(plan.name, noisy=True, rows=rows)
        return gptq.learned_linear(plan, inputs, self.context.recipe, options, **fields)


def search_settings(options: Mapping[str, Scalar], seed: int) -> SearchSettings:
    """How the options say to search."""
    return SearchSettings(int(options["generations"]), int(options["population"]), float(options["mutation"]), seed)


def search_workers(options: Mapping[str, Scalar]) -> int:
    """Processes of the search. Raises RecipeError for none."""
    workers = int(options["workers"])
    if workers < 1:
        raise RecipeError(f"calibrate.options.workers {workers} of qdit; use 1 or more")
    return workers
