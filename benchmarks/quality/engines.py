"""The quantized model of a row: calibrated once and kept, built for the `cpu` target, proven, and the faster runner.

With another target its engine stands in the place of the `cpu` one; the gates are those of its lowered graph.

The engine draws two to three times as fast as the reference in PyTorch. It stands in for the reference only where
every linear has been found exact on a few of the row's own calls; else the reference draws, and the result says why.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.quality.drawing import BATCH_SIZES, Subject, Trajectory
from benchmarks.quality.painters import Run
from benchmarks.quality.rows import Algorithm, Row
from export import checkpoint
from export.checkpoint import QuantizedLinear
from export.errors import EnvironmentLacksError, UserError
from export.to_onnx import export_portable
from pipeline import machine
from pipeline import recipe as recipes
from pipeline.backends import BACKENDS
from pipeline.backends.base import Arrays, Engine, LoweredGraph
from pipeline.backends.cpu import CpuOptions
from pipeline.backends.cuda import CudaOptions
from pipeline.backends.reference import ReferenceEngine, fake_quant
from pipeline.bench.measure import interleaved
from pipeline.calibrate import calibrate
from pipeline.calibrate.methods.rtn import quantize_linear
from pipeline.calibrate.plan import make_plans
from pipeline.calibrate.state import TIME_FILE
from pipeline.distance import sqnr_db
from pipeline.files import remove, sha256_json, write_json
from pipeline.generate.case import make_case
from pipeline.recipe import Recipe
from pipeline.verify.gates import coverage_gate, layer_gates
from pipeline.verify.probe import ProbedGraph
from pipeline.verify.proof import layer_results
from pipeline.verify.report import Gate
from pipeline.verify.study import Realisations, Study

logger = logging.getLogger(__name__)
# Steps and pictures (with and without prompt) on which the engine is proven.
PROVEN_PICTURES = 2
TIMED_CALLS = 5


@dataclass
class Drawer:
    """What draws a row's pictures. name: "cpu engine, PATH", "cuda engine, fp32" or "reference"; proof: what gates and
    comparison found."""

    run: Run
    name: str
    proof: record.Json = field(default_factory=dict)


def row_recipe(row: Row, settings: Sequence[str] = ()) -> Recipe:
    """The row's recipe for its model. Raises RecipeError for a method or an option that is not there."""
    recipe = recipes.with_settings(recipes.load(row.recipe), [*row.settings, *settings])
    return replace(recipe, model=f"zoo:{row.model}")


def calibration_key(recipe: Recipe, model_sha256: str, row: Row) -> str:
    """Hash of all settings that decide the quantized layers."""
    parts = [asdict(getattr(recipe, part)) for part in ("formats", "weights", "calibrate", "sampling")]
    others = [] if row.algorithm is None else [dict(row.algorithm)]
    return sha256_json([*parts, model_sha256, list(row.multipliers), *others])[:16]


def calibrated(
    subject: Subject, row: Row, recipe: Recipe, folder: Path, redo: bool = False
) -> tuple[list[QuantizedLinear], float]:
    """The row's layers, and the minutes that their calibration took; rows of equal settings share one folder.

    redo: forget what the folder holds.
    """
    place = folder / calibration_key(recipe, subject.model.sha256, row)
    if redo:
        remove(place)
    path, started = place / TIME_FILE, time.monotonic()
    before = float(record.read(path, {"seconds": 0.0})["seconds"])  # of runs that were interrupted
    try:
        layers = _calibrated(subject, row, recipe, place)
    finally:
        seconds = before + time.monotonic() - started
        # A run that finds all done adds next to nothing.
        if place.is_dir() and not (path.is_file() and math.isclose(seconds, before, abs_tol=0.5)):
            write_json(path, {"seconds": seconds})
    return layers, seconds / 60


def _calibrated(subject: Subject, row: Row, recipe: Recipe, folder: Path) -> list[QuantizedLinear]:
    if row.multipliers:
        return restricted(subject, row, recipe, folder)
    if row.algorithm is not None:
        return by_modelopt(subject, row.algorithm, recipe, folder)
    return calibrate(subject.model, recipe, folder)


def by_modelopt(subject: Subject, algorithm: Algorithm, recipe: Recipe, folder: Path) -> list[QuantizedLinear]:
    """What ModelOpt makes of the recipe's formats and calibration calls. Raises EnvironmentLacksError without it."""
    if (folder / checkpoint.LAYERS_FILE).is_file():
        return checkpoint.load(folder)
    from pipeline.calibrate.modelopt.backend import quant_config
    from pipeline.calibrate.modelopt.take_over import quantized, take_over

    formats, weights = recipe.formats, recipe.weights
    size = 0 if weights.granularity == "per_channel" else weights.group_size
    config = quant_config(formats.weight, formats.activation, weights.granularity, size, dict(algorithm))
    return take_over(subject.model, recipe, quantized(subject.model, recipe, config), folder)


def refuse_missing_modelopt(row: Row) -> None:
    """Raises EnvironmentLacksError where ModelOpt is to calibrate the row and is not installed."""
    if row.algorithm is not None:
        machine.require(("modelopt",), f"the row {row.name}", "modelopt")


def restricted(subject: Subject, row: Row, recipe: Recipe, folder: Path) -> list[QuantizedLinear]:
    """Round to nearest with the row's group multipliers alone, for example powers of two."""
    if (folder / checkpoint.LAYERS_FILE).is_file():
        return checkpoint.load(folder)
    plans = make_plans(subject.model.linears(), recipe)
    common = [tuple(multiplier for multiplier in plan.multipliers if multiplier in row.multipliers) for plan in plans]
    allowed = [replace(plan, multipliers=multipliers or (1,)) for plan, multipliers in zip(plans, common, strict=True)]
    layers = [quantize_linear(plan, recipe.weights.search) for plan in allowed]
    checkpoint.save(layers, folder)
    return layers


# --- runner ---------------------------------------------------------------------------------------------------------


@contextmanager
def drawer(
    subject: Subject,
    layers: Sequence[QuantizedLinear],
    recipe: Recipe,
    trajectory: Trajectory,
    scratch: Path,
    target: str = "cpu",
) -> Iterator[Drawer]:
    """The faster of engine and reference that computes these layers exactly; "fused" has nothing to fuse behind static
    scales, where the stock engine draws."""
    reference = ReferenceEngine(
        fake_quant(subject.model, layers, torch.float32, recipe.attention.formats), torch.float32
    )
    for name, way in ways(recipe, target).items():
        try:
            graph, engine = build_engine(subject, layers, way, scratch, target)
            break
        except UserError as error:
            refusal = str(error)
            logger.warning("%s: the %s refuses it: %s", subject.name, name, refusal)
    else:
        yield Drawer(reference.run, "reference", {"refused": refusal})
        return
    try:
        proof = prove(subject, layers, way, graph, trajectory, target)
        yield choose(subject, name, proof, trajectory, engine, reference)
    finally:
        engine.close()
        shutil.rmtree(scratch, ignore_errors=True)


def ways(recipe: Recipe, target: str) -> dict[str, Recipe]:
    """Engine name -> recipe, in the order in which they are tried. On a GPU float32 lies between the kernels, so that
    rows of either target can stand in one table."""
    if target == "cuda":
        options = replace(recipe.options(CudaOptions), activations="fp32")
        return {"cuda engine, fp32": recipe.with_options(options)}
    paths = dict.fromkeys((recipe.options(CpuOptions).path, "stock"))
    return {f"cpu engine, {path}": recipe.with_options(CpuOptions(path)) for path in paths}


def refuse_missing_gpu(target: str) -> None:
    """Raises EnvironmentLacksError before any work."""
    if target == "cuda" and not torch.cuda.is_available():
        raise EnvironmentLacksError(f"--target cuda: torch {torch.__version__} finds no GPU; take --target cpu")


def build_engine(
    subject: Subject, layers: Sequence[QuantizedLinear], recipe: Recipe, folder: Path, target: str
) -> tuple[LoweredGraph, Engine]:
    """The target's engine of the layers, as `build` makes it, in `folder` (emptied first)."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("lowered", target):
        (folder / name).mkdir(parents=True)
    export_portable(subject.model, list(layers), folder / "model.onnx", attention=recipe.attention.formats)
    backend = BACKENDS[target]
    graph = backend.lower(folder / "model.onnx", folder / "lowered", recipe)
    backend.build(graph, folder / target, recipe)
    return graph, backend.load(folder)


def choose(
    subject: Subject,
    own: str,
    proof: Sequence[Gate],
    trajectory: Trajectory,
    engine: Engine,
    reference: ReferenceEngine,
) -> Drawer:
    """The engine called `own`, unless a gate fails or the reference is faster."""
    failed = [gate.name for gate in proof if not gate.passed]
    call = first_samples(trajectory.calls[len(trajectory.calls) // 2], BATCH_SIZES[subject.name])
    calls = {own: partial(engine.run, call), "reference": partial(reference.run, call)}
    timings = interleaved(calls, math.inf, (TIMED_CALLS, TIMED_CALLS))
    seconds = {name: min(timing.seconds) for name, timing in timings.items()}
    agreement = sqnr_db(reference.run(call)["sample"], engine.run(call)["sample"])
    facts: record.Json = {
        "gates": {gate.name: gate.value for gate in proof},
        "call_s": seconds,
        "engine_against_reference_sqnr_db": agreement,
    }
    if failed:
        logger.error("%s: the %s fails %s; the reference draws", subject.name, own, ", ".join(failed))
        return Drawer(reference.run, "reference", facts | {"refused": f"gates failed: {', '.join(failed)}"})
    name = min(seconds, key=lambda key: seconds[key])
    return Drawer(engine.run if name == own else reference.run, name, facts)


def prove(
    subject: Subject,
    layers: Sequence[QuantizedLinear],
    recipe: Recipe,
    graph: LoweredGraph,
    trajectory: Trajectory,
    target: str,
) -> list[Gate]:
    """The gates of `verify` over all linears, on calls of the first, a middle and the last step: every code as the
    oracle's, every integer GEMM equal, scales and bias within float32 rounding."""
    steps = sorted({0, len(trajectory.calls) // 2, len(trajectory.calls) - 1})
    calls = [first_samples(trajectory.calls[step], PROVEN_PICTURES) for step in steps]
    study = Study(make_case(subject.model, recipe), calls=calls, probed=tuple(range(len(calls))))
    probed = ProbedGraph(graph)
    modules = {ref.name: ref.module for ref in subject.model.linears()}
    present = [layer for layer in layers if layer.name in probed.complete]
    named = {f"step {step + 1}": call for step, call in zip(steps, calls, strict=True)}
    results = layer_results(target, present, modules, probed, study, Realisations(), named, study.probed)
    coverage = coverage_gate(target, {layer.name for layer in present}, list(modules))
    return [coverage, *layer_gates(target, results, 0)]


def first_samples(call: Arrays, count: int) -> Arrays:
    """The first `count` pictures, or as many as there are, of both halves of a guided call."""
    half = len(call["timestep"]) // 2
    count = min(count, half)
    rows = [*range(count), *range(half, half + count)]
    return {name: value[rows] for name, value in call.items()}
