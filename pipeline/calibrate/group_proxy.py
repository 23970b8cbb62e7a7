"""Models with candidate group sizes, and a cheap score of them: how far the denoiser's output is from the float one's.

While searching, weights are rounded to nearest, as in the authors' script: GPTQ for every candidate would take hours. A
layer is quantized once for each of its sizes. The score is the mean over calibration calls (spread over timesteps) of
the output's SQNR in dB, negated. Whether it ranks candidates as pictures do is measured by benchmarks/search_groups.py,
which scores by pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from export.checkpoint import QuantizedLinear
from pipeline.backends.base import Arrays
from pipeline.backends.reference import FakeQuantLinear
from pipeline.calibrate.data import CalibrationData
from pipeline.calibrate.group_search import Individual, Space
from pipeline.calibrate.group_space import layer_sizes, with_sizes
from pipeline.calibrate.plan import LayerPlan, make_plans
from pipeline.calibrate.rtn import quantize_linear
from pipeline.gates import sqnr_db
from pipeline.recipe import Recipe

if TYPE_CHECKING:
    from export.models import LoadedModel


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums of float32 depend on how many threads share them; scores must not."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Candidates:
    """Where quantized models with candidate sizes come from. `model` None: loaded anew from its source, as another
    process has to. activations: "token_group", or anything else for one scale per token."""

    source: str
    recipe: Recipe
    genes: str
    space: Space
    activations: str
    model: LoadedModel | None = None

    @classmethod
    def of(cls, model: LoadedModel, recipe: Recipe, genes: str, space: Space, activations: str) -> Candidates:
        return cls(model.source, recipe, genes, space, activations, model)

    def for_workers(self, workers: int) -> Candidates:
        """What can be sent to other processes, if there are any."""
        return self if workers == 1 else replace(self, model=None)

    def load(self) -> LoadedModel:
        from export.models import load

        return self.model or load(self.source)


class CandidateModels:
    """Denoisers of one model with the layers of a candidate; each layer is quantized once for each size."""

    def __init__(self, candidates: Candidates) -> None:
        self.candidates, self.model = candidates, candidates.load()
        self.plans = make_plans(self.model.linears(), candidates.recipe)
        self.made: dict[tuple[str, int], nn.Module] = {}

    def float_module(self) -> nn.Module:
        from export.models import denoiser

        module: nn.Module = denoiser(self.model)
        return module

    def module(self, individual: Individual) -> nn.Module:
        """The denoiser with float32 fake quantization."""
        from export.models import denoiser

        sizes = layer_sizes(self.plans, self.candidates.genes, self.candidates.space, individual)
        module: nn.Module = denoiser(self.model, {p.name: self.linear(p) for p in with_sizes(self.plans, sizes)})
        return module

    def linear(self, plan: LayerPlan) -> nn.Module:
        key = (plan.name, plan.group_size)
        if key not in self.made:
            layer = candidate_layer(plan, self.candidates.recipe.weights.search, self.candidates.activations)
            self.made[key] = FakeQuantLinear(layer, torch.float32)
        return self.made[key]


def candidate_layer(plan: LayerPlan, search: str, activations: str) -> QuantizedLinear:
    """The layer rounded to nearest, its input scaled per token, or per token and group."""
    layer = quantize_linear(plan, search)
    if activations != "token_group" or not plan.group_size:
        return layer
    return replace(layer, activation_scaling="token_group", activation_group=plan.group_size)


@dataclass(frozen=True)
class ProxyScore:
    """Makes the score: called once in every process. calls: model inputs."""

    candidates: Candidates
    calls: tuple[Arrays, ...] = field(repr=False)

    @classmethod
    def of(cls, candidates: Candidates, data: CalibrationData, samples: int) -> ProxyScore:
        """On about `samples` samples, the same number of each calibration call."""
        each = max(1, samples // len(data.calls))
        return cls(candidates, tuple(_evenly(call.inputs, each) for call in data.calls))

    @property
    def origin(self) -> dict[str, Any]:
        """What scores depend on beside model and data, which the folder of a calibration belongs to."""
        recipe = asdict(self.candidates.recipe)
        parts = {key: recipe[key] for key in ("formats", "weights")}
        return {"score": "proxy", "activations": self.candidates.activations, "calls": len(self.calls), **parts}

    def __call__(self) -> _Proxy:
        return _Proxy(self)


def _evenly(inputs: Arrays, count: int) -> Arrays:
    """`count` samples of a call, evenly spread over its batch; inputs without a batch axis stay whole."""
    batch = len(inputs["hidden_states"])
    rows = np.linspace(0, batch - 1, min(count, batch)).round().astype(int)
    return {name: value[rows] if len(value) == batch else value for name, value in inputs.items()}


class _Proxy:
    """The score itself: minus the mean SQNR in dB of the candidate's outputs."""

    def __init__(self, wanted: ProxyScore) -> None:
        self.calls = [{name: torch.from_numpy(value) for name, value in call.items()} for call in wanted.calls]
        self.models = CandidateModels(wanted.candidates)
        self.channels = int(self.models.model.config["in_channels"])  # beyond them is a learned sigma, not used
        self.exact = self._outputs(self.models.float_module())

    def __call__(self, individual: Individual) -> float:
        found = self._outputs(self.models.module(individual))
        return -float(np.mean([sqnr_db(exact, other) for exact, other in zip(self.exact, found, strict=True)]))

    def _outputs(self, module: nn.Module) -> list[Any]:
        with torch.inference_mode(), one_thread():
            return [module(**call)[:, : self.channels].numpy() for call in self.calls]
