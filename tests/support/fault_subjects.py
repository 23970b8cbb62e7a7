"""Models that faults are planted in, each built once: exported, lowered for both paths of the CPU, and studied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from unittest import mock

from export import to_onnx
from export.checkpoint import QuantizedLinear
from export.models import load as models
from export.models.load import LoadedModel
from pipeline import recipe as recipes
from pipeline.backends import BACKENDS
from pipeline.backends.base import Arrays, Engine, LoweredGraph
from pipeline.backends.cpu import CpuOptions
from pipeline.calibrate import calibrate
from pipeline.generate import case as picture_case
from pipeline.generate.case import Run
from pipeline.recipe import Recipe
from pipeline.verify.effort import FEW_INSIDE, LARGE_INSIDE, Effort
from pipeline.verify.probe import ProbedGraph
from pipeline.verify.proof import verify_target
from pipeline.verify.report import Gate, Report
from pipeline.verify.study import Study, study
from tests.support import learned, tiny
from tests.support.graph_edit import GraphEdit
from tests.support.graph_faults import CALLS

# The bundled models with the recipe that is theirs, and the tiny model of each family.
RECIPES = {"pixart_mini": "pixart_w4a6", "dit_mini": "dit_w4a8"}
# Two pictures of one step, prompted and not: few, so that many faults can be planted.
STEPS, PICTURES = 1, 2
# With learned branches, of which a step chooses one, more of both: code flips spread wider, and few samples say little.
LEARNED_STEPS = 2
# Pixels of a side where the model's own size is large for a tiny model: PixArt-Sigma's 1024.
SIDES = {"pixart_sigma": 64}
# A code that flips in four random layers of HunyuanDiT moves its output by 5 % at six bits, as much as a fault of 10 %
# less the 6 dB of the gates; at eight bits by a quarter of that.
ACTIVATIONS = {"hunyuan": "INT8"}
# Where quantization hardly matters: adaLN as at the start of training, and an output layer of zeros.
ZEROS = {"ada_zero": ("dit", ".norm1.linear"), "out_zero": ("pixart", "proj_out")}
# For a fault that linears or stretches show: a step and, as of a large model, a call of an odd length.
LOOKED_INTO = Effort((0,), (0,), 0, special=LARGE_INSIDE, inside=LARGE_INSIDE, state=False)
LEARNED = "learned"  # the end of the names of bundled models with routed branches and static scales
ATTENTION = "attention"  # the end of the names of models whose attention is quantized, too


@dataclass
class Subject:
    """One model with its quantized layers, portable model and references; graphs are lowered when first asked for."""

    name: str
    model: LoadedModel
    layers: list[QuantizedLinear]
    recipe: Recipe
    folder: Path
    found: Study
    lowered: dict[str, LoweredGraph] = field(default_factory=dict)

    @property
    def portable(self) -> Path:
        return self.folder / "model.onnx"

    def graph(self, path: str) -> LoweredGraph:
        """The graph lowered for a path of the CPU, without any fault."""
        if path not in self.lowered:
            self.lowered[path] = self.lower(self.portable, path)
        return self.lowered[path]

    def lower(self, portable: Path, path: str) -> LoweredGraph:
        """Lower a portable model for a path of the CPU, "stock" or "fused"."""
        folder = self.folder / (path if portable == self.portable else f"faulty-{path}")
        folder.mkdir(exist_ok=True)
        return BACKENDS["cpu"].lower(portable, folder, self.recipe.with_options(CpuOptions(path)))

    @cached_property
    def engine(self) -> Engine:
        """The clean graph as an engine, its session opened once: what faults of calls are wrapped around."""
        return GraphEngine(ProbedGraph(self.graph("stock")).denoiser())

    def planted(self, graph: str, plant: Callable[[GraphEdit], None]) -> LoweredGraph:
        """A lowered graph with a fault. graph: what is edited, see GraphFault."""
        if graph.startswith("portable"):
            edit = GraphEdit(self.portable)
            plant(edit)
            return self.lower(edit.save(), "fused" if graph.endswith("fused") else "stock")
        clean = self.graph(graph)
        edit = GraphEdit(clean.path)
        plant(edit)
        return replace(clean, path=edit.save())

    def failures(self, graph: LoweredGraph, gates: frozenset[str] = frozenset()) -> dict[str, Gate]:
        """The gates that fail for a graph, by name without the target. gates: the only ones that are asked for, and
        nothing is run that none of them looks at; empty: all."""
        study = self.found
        if gates and gates <= CALLS:
            return self._failures(graph, [], None, Effort(self.steps, study.probed, 0, inside=()))
        if gates and not gates & CALLS:
            return self._failures(graph, self.layers, None, replace(LOOKED_INTO, probed=study.probed))
        # As of a large model: no inside of the largest calls, which takes as long as that of all others.
        effort = Effort(self.steps, study.probed, len(study.case.noise), inside=FEW_INSIDE)
        return self._failures(graph, self.layers, None, effort)

    def failures_of_calls(self, plant: Callable[[Run], Run]) -> dict[str, Gate]:
        """The gates that fail for a fault in how calls are answered. No layer is looked at: the graph is right."""
        study = self.found
        kept = deepcopy(
            (study.case, study.calls, study.pools, study.special_calls)
        )  # a fault may write into its inputs
        try:
            effort = Effort(self.steps, study.probed, len(study.case.noise), inside=())
            return self._failures(self.graph("stock"), [], GraphEngine(plant(self.engine.run)), effort)
        finally:
            study.case, study.calls, study.pools, study.special_calls = kept

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(range(self.found.case.n_steps))

    def _failures(
        self, graph: LoweredGraph, layers: list[QuantizedLinear], engine: Engine | None, effort: Effort
    ) -> dict[str, Gate]:
        report = Report()
        verify_target("cpu", self.model, layers, graph, engine, self.found, report, effort=effort)
        return {gate.name.partition("/")[2]: gate for gate in report.failures()}


@dataclass
class GraphEngine:
    """A denoiser function as an engine."""

    function: Callable[[Arrays], Arrays]

    def run(self, inputs: Arrays) -> Arrays:
        return self.function(inputs)

    def close(self) -> None:
        """Nothing is held open."""


class Subjects:
    """name -> Subject, each made on first use below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = cache(self._model)
        self.subject = cache(self._subject)

    def _model(self, name: str) -> LoadedModel:
        if name in RECIPES:
            return models.load(f"zoo:{name}")
        return models.load(str(_with_zeros(name, self.root) if name in ZEROS else tiny.folder(name, self.root)))

    def _subject(self, name: str) -> Subject:
        base, _, kind = name.partition(" ")
        model, folder = self.model(base), self.root / name.replace(" ", "-")
        folder.mkdir(exist_ok=True)
        recipe = _recipe(base, model, LEARNED_STEPS if kind == LEARNED else STEPS)
        if kind == ATTENTION:
            recipe = recipes.with_settings(recipe, ["attention.qk=INT8", "attention.pv=INT8"])
        layers = _layers(base, model, recipe, folder)
        if kind == LEARNED:
            layers = learn(layers)
        size, attention = recipe.sampling, recipe.attention.formats
        to_onnx.export_portable(model, layers, folder / "model.onnx", size.height, size.width, attention)
        pictures = picture_case.SMALL_PICTURES if kind == LEARNED else PICTURES
        with mock.patch.object(picture_case, "SMALL_PICTURES", pictures):
            studied = study(model, layers, recipe)
        return Subject(name, model, layers, recipe, folder, studied)


def _with_zeros(name: str, root: Path) -> Path:
    """A folder of a tiny model some of whose parameters are zero."""
    base, part = ZEROS[name]
    module = tiny.build(base)
    for path, parameter in module.named_parameters():
        if part in path:
            parameter.zero_()
    module.half().save_pretrained(root / name)
    return root / name


def _recipe(name: str, model: LoadedModel, steps: int) -> Recipe:
    side = SIDES.get(name, 0)
    sizes = [f"sampling.height={side}", f"sampling.width={side}"]
    settings = ["method=rtn", f"sampling.n_steps={steps}", *sizes, "attention.qk=float", "attention.pv=float"]
    base = (
        recipes.load(RECIPES[name]) if name in RECIPES else recipes.from_dict({"name": "t", "model": model.source}, "t")
    )
    return recipes.with_settings(base, settings)


def _layers(name: str, model: LoadedModel, recipe: Recipe, folder: Path) -> list[QuantizedLinear]:
    if name in RECIPES:
        return calibrate(model, recipe, folder / "calibrate")
    return tiny.quantized(model, activation=ACTIVATIONS.get(name, "E2M3"), granularity="exact_group")


def learn(layers: Sequence[QuantizedLinear]) -> list[QuantizedLinear]:
    """The layers with everything that methods learn, by their places: static and balanced scales and a branch in
    self-attention, branches in cross-attention (in front of the hidden layer without one), a zero point behind GELU."""
    of = learned.router()
    return [_learned(layer, index, of) for index, layer in enumerate(layers)]


def _learned(layer: QuantizedLinear, index: int, of: Any) -> QuantizedLinear:
    if layer.name.endswith(("attn1.to_q", "attn1.to_k", "attn1.to_v")):
        static = learned.with_balance(learned.with_scaling(layer, "per_tensor", reach=4.0 + 0.5 * index), index)
        return learned.with_low_rank(static, of, index) if layer.name.endswith("to_q") else static
    if layer.name.endswith(("attn2.to_k", "attn2.to_v", "attn1.to_out.0")):
        return learned.with_low_rank(layer, of, index)
    if layer.name.endswith("net.2"):
        return learned.with_scaling(layer, "zero", reach=2.0)
    return layer
