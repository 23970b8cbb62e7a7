"""Models with candidate group sizes, for a search to score: each layer is quantized once for each of its sizes.

Layers are rounded to nearest, as in the authors' script of Q-DiT, or come from a folder where a method has stored its
own. The former is quick, but finds sizes that suit rounding to nearest: on dit_mini at W4A8 they were 0.4 dB better
than uniform ones with rounding to nearest, and 0.4 dB worse with GPTQ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from export import checkpoint
from export.checkpoint import QuantizedLinear
from export.models.load import LoadedModel, denoiser
from pipeline.backends.reference import FakeQuantLinear
from pipeline.calibrate.blocks import BlockRunner, group_by_block
from pipeline.calibrate.groups.search import Individual, Space
from pipeline.calibrate.groups.space import gene_names, layer_sizes, with_sizes
from pipeline.calibrate.method import Unit
from pipeline.calibrate.methods.rtn import quantize_linear
from pipeline.calibrate.plan import LayerPlan, make_plans
from pipeline.progress import track
from pipeline.recipe import Recipe, load_float_model

# Options that say how to search and not what a candidate is: scores outlast a change of them.
SEARCH_ONLY = frozenset(
    {"search", "sizes", "budget_bytes", "generations", "population", "mutation", "workers", "group_sizes"}
)


def scored_keys(recipe: Recipe) -> dict[str, object]:
    """What a candidate's layers, and the data that they are made and scored on, depend on in a recipe."""
    parts = asdict(recipe)
    options = {key: value for key, value in recipe.calibrate.options.items() if key not in SEARCH_ONLY}
    used = {key: parts[key] for key in ("formats", "weights", "sampling")}
    return used | {"calibrate": parts["calibrate"] | {"options": options}}


@dataclass(frozen=True)
class Candidates:
    """Where quantized models with candidate sizes come from.

    activations: "token_group", or anything else for one scale per token. model: None where it is to be loaded anew
    from its source, as in another process that this is sent to. layers: folder of stored layers, None to round to
    nearest.
    """

    source: str
    recipe: Recipe
    genes: str
    space: Space
    activations: str
    model: LoadedModel | None = None
    layers: Path | None = None

    def __getstate__(self) -> dict[str, object]:
        return vars(self) | {"model": None}

    def load(self) -> LoadedModel:
        return self.model or load_float_model(replace(self.recipe, model=self.source))


class CandidateModels:
    """Denoisers of one model with the layers of a candidate."""

    def __init__(self, candidates: Candidates) -> None:
        self.candidates, self.model = candidates, candidates.load()
        self.plans = make_plans(self.model.linears(), candidates.recipe)
        self.linears: dict[tuple[str, int], nn.Module] = {}

    def float_module(self) -> nn.Module:
        return denoiser(self.model)

    def module(self, individual: Individual) -> nn.Module:
        """The denoiser with float32 fake quantization."""
        sizes = layer_sizes(self.plans, self.candidates.genes, self.candidates.space, individual)
        return denoiser(self.model, {plan.name: self.linear(plan) for plan in with_sizes(self.plans, sizes)})

    def linear(self, plan: LayerPlan) -> nn.Module:
        key = (plan.name, plan.group_size)
        if key not in self.linears:
            self.linears[key] = FakeQuantLinear(self.layer(plan), torch.float32)
        return self.linears[key]

    def layer(self, plan: LayerPlan) -> QuantizedLinear:
        candidates = self.candidates
        if candidates.layers is not None:
            return checkpoint.load(place(candidates.layers, plan))[0]
        return nearest_layer(plan, candidates.recipe.weights.search, candidates.activations)


def nearest_layer(plan: LayerPlan, search: str, activations: str) -> QuantizedLinear:
    """The layer rounded to nearest, its input scaled per token, or per token and group."""
    layer = quantize_linear(plan, search)
    if activations != "token_group" or not plan.group_size:
        return layer
    return replace(layer, activation_scaling="token_group", activation_group=plan.group_size)


def place(folder: Path, plan: LayerPlan) -> Path:
    """Folder of a stored layer."""
    return folder / plan.name / str(plan.group_size)


def store_layers(
    runner: BlockRunner,
    plans: Sequence[LayerPlan],
    genes: str,
    space: Space,
    make: Callable[[Unit, LayerPlan], QuantizedLinear],
    folder: Path,
) -> None:
    """Every layer with each size of its gene, by `make` (a unit is a block), each block behind blocks of the plans' own
    sizes. Layers that are there already are left as they are."""
    sizes = {gene.name: gene.sizes for gene in space.genes}
    choices = {
        plan.name: sorted({plan.group_size, *(sizes[name] if name else ())})
        for plan, name in zip(plans, gene_names(plans, genes), strict=True)
    }
    blocks = group_by_block(plans)
    for block in track(runner.blocks, len(blocks), "layers to choose from"):
        group = blocks[block]
        observed = runner.observe(block, group)
        unit = Unit(block, group, observed)
        for plan in (replace(one, group_size=size) for one in group for size in choices[one.name]):
            if not (place(folder, plan) / checkpoint.LAYERS_FILE).is_file():
                checkpoint.save([make(unit, plan)], place(folder, plan))
        runner.advance(observed, [checkpoint.load(place(folder, plan))[0] for plan in group])
