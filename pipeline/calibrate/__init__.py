"""Calibration: from a float model and a recipe to quantized linears on disk, one unit at a time.

What a method is stands in method.py, which methods there are in pipeline/methods.py.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from export import checkpoint
from export.checkpoint import QuantizedLinear
from export.errors import RecipeError
from pipeline import machine
from pipeline.backends.mapped_pages import give_back_weights
from pipeline.backends.side_by_side import side_by_side, single_threaded_torch
from pipeline.calibrate.method import Context, Method, Unit
from pipeline.calibrate.plan import LayerPlan, make_plans
from pipeline.calibrate.state import CalibrationState, copy_finished, load_named, refuse_unfinished
from pipeline.generate.case import is_large
from pipeline.methods import METHODS
from pipeline.progress import track
from pipeline.recipe import Recipe, settled

if TYPE_CHECKING:
    from export.models.load import LoadedModel

logger = logging.getLogger(__name__)


def with_method(recipe: Recipe, model: LoadedModel) -> Recipe:
    """The recipe with the method that "auto" means for this model, which is said; any other comes back as it is.

    Of other models than denoisers, which have no steps and no guidance, it asks for none. Raises RecipeError for a
    method that looks at steps.
    """
    if not model.family.steps:
        recipe = replace(recipe, sampling=replace(recipe.sampling, n_steps=1, guidance_scale=1.0))
        if recipe.calibrate.method in METHODS and METHODS[recipe.calibrate.method].steps:
            fitting = ", ".join(name for name, row in METHODS.items() if not row.steps)
            raise RecipeError(
                f"calibrate.method {recipe.calibrate.method} looks at the steps of a sampler, and {model.source} is a "
                f"{model.family.noun}, which has none; use one of {fitting}"
            )
    chosen = settled(recipe, model.parameters)
    if chosen is not recipe:
        words = "calibrate.method auto: %s for %.1f M parameters; --set method=NAME takes another"
        logger.info(words, chosen.calibrate.method, model.parameters / 1e6)
    return chosen


def calibrate(model: LoadedModel, recipe: Recipe, folder: Path, resume: bool = False) -> list[QuantizedLinear]:
    """Quantize every linear of `model` by the recipe's method and write the checkpoint into `folder`.

    Units that an interrupted run of the same model, settings and data left in `folder` are used as they are; what
    other settings left there is removed, or with `resume` refused. Raises RecipeError for that, if another run has the
    folder, or if a group size does not fit; ModelError naming the layer if a weight is NaN or Inf; ResourceError if
    the observed blocks do not fit into memory.
    """
    recipe = with_method(recipe, model)
    plans = make_plans(model.linears(), recipe)
    with CalibrationState(folder, origin(model, recipe), resume) as state:
        if state.is_complete:
            return load_named(folder, [plan.name for plan in plans])
        # Small models: their operations take microseconds, so a second thread gains little, and where other work shares
        # the cores its spinning waits take most of the time; a sixth of the speed was seen.
        single = _observes(recipe) and not is_large(model)
        with single_threaded_torch() if single else nullcontext():
            method = _make_method(model, recipe, plans, folder)
            plans = method.plan(plans)
            _quantize(method, plans, state)
            layers = method.finish(state.layers([plan.name for plan in plans]))
        state.complete(layers)
        size_mb, chosen = sum(layer.size_bytes for layer in layers) / 1e6, recipe.calibrate.method
        logger.info("calibrated %d linears (%s) in %.1f s: %.1f MB", len(layers), chosen, state.seconds, size_mb)
    return layers


def adopt(model: LoadedModel, recipe: Recipe, source: Path, folder: Path) -> list[QuantizedLinear]:
    """The layers that `python -m pipeline.calibrate` wrote into `source`, copied into `folder`.

    Raises RecipeError if they were made of another model or by other settings than these.
    """
    copy_finished(source, folder, origin(model, with_method(recipe, model)))
    return load_named(folder, [linear.name for linear in model.linears()])


def refuse_unfit(model: LoadedModel, recipe: Recipe, source: Path) -> None:
    """Raise what `adopt` would raise, without copying."""
    refuse_unfinished(source, origin(model, with_method(recipe, model)))
    load_named(source, [linear.name for linear in model.linears()])


def _quantize(method: Method, plans: Sequence[LayerPlan], state: CalibrationState) -> None:
    """Quantize the units that are left. What is observed is let go with this call, before the method finishes."""
    units = _group(plans, method.context.recipe)
    left = [name for name, group in units.items() if not state.has_all(group)]
    finished = _finished(method, units, left, state)
    for layers in track(finished, len(units), "calibrate", len(units) - len(left)):
        state.add(layers)
        if is_large(method.context.model):
            give_back_weights(method.context.model)


def _finished(
    method: Method, units: dict[str, list[LayerPlan]], left: Sequence[str], state: CalibrationState
) -> Iterator[list[QuantizedLinear]]:
    """The layers of each unit that is left, in order; layers that are looked at by themselves are quantized side by
    side."""
    if _observes(method.context.recipe):
        for unit in _observed(method, units, left, state):
            yield method.quantize(unit)
        return
    threads = machine.threads()
    for place in range(0, len(left), threads):
        together = [Unit(name, units[name]) for name in left[place : place + threads]]
        yield from side_by_side([partial(method.quantize, unit) for unit in together], threads)


def _make_method(model: LoadedModel, recipe: Recipe, plans: Sequence[LayerPlan], folder: Path) -> Method:
    """The recipe's method, with calibration data if it observes any."""
    row, settings = METHODS[recipe.calibrate.method], recipe.calibrate
    method = row.load()(Context(model, recipe, row.resolve(settings.preset, settings.options), folder))
    if _observes(recipe):
        from pipeline.calibrate.data import calibration_data

        _refuse_too_large(method, plans)
        method.context = replace(method.context, data=calibration_data(model, recipe))
    return method


def _refuse_too_large(method: Method, plans: Sequence[LayerPlan]) -> None:
    """Say how much memory the calibration takes, before anything is computed, and refuse what does not fit."""
    from export.models.load import sample_inputs
    from pipeline.calibrate.data import BATCH_PROMPTS, kept_steps
    from pipeline.calibrate.memory import measure

    model, settings, size = method.context.model, method.context.recipe.calibrate, method.context.recipe.sampling
    halves, steps = 1 if size.guidance_scale == 1.0 else 2, len(kept_steps(size.n_steps, settings.timesteps))
    samples, calls = settings.size * halves * steps, math.ceil(settings.size / BATCH_PROMPTS) * steps
    one = sample_inputs(model, 1, settings.seed, size.height, size.width)
    per_call = halves * min(settings.size, BATCH_PROMPTS)
    sizes = measure(model, _group(plans, method.context.recipe), one, samples, calls, per_call)
    units = [method.unit_bytes(sizes, block) for block in sizes.blocks]
    remedy = (
        f"use fewer prompts (--calib-size, now {settings.size}), --set calibrate.timesteps (now {settings.timesteps}), "
        f"or smaller calibrate.options (batch, rows, workers, as far as {settings.method} has them)"
    )
    needed = sizes.total(units, method.apart_bytes(sizes, list(plans)))
    machine.refuse_too_large(needed, f"calibration on {samples} samples needs about", remedy)


def _group(plans: Sequence[LayerPlan], recipe: Recipe) -> dict[str, list[LayerPlan]]:
    """Unit name -> its layers: a repeated block, or a single layer for methods that look at weights alone."""
    if not _observes(recipe):
        return {plan.name: [plan] for plan in plans}
    from pipeline.calibrate.blocks import group_by_block

    return group_by_block(plans)


def _observed(
    method: Method, units: dict[str, list[LayerPlan]], left: Sequence[str], state: CalibrationState
) -> Iterator[Unit]:
    """The units that are left, each observed, in the order in which the model runs them; finished ones are passed
    through, since later inputs depend on them."""
    from pipeline.calibrate.blocks import BlockRunner

    context = method.context
    assert context.data is not None
    runner = BlockRunner(context.model, context.data, list(units))
    names = runner.blocks
    last = max(map(names.index, left), default=-1)
    for place, name in enumerate(names[: last + 1]):
        plans = units[name]
        observed = runner.observe(name, plans)
        if name in left:
            yield Unit(name, plans, observed)
        if place != last:
            runner.advance(observed, state.layers([plan.name for plan in plans]))


# Keys of a recipe that decide what calibration gives, by what the method observes.
DECIDING: dict[str, dict[str, tuple[str, ...]]] = {
    "weights": {"calibrate": ("method", "preset", "options")},
    "blocks": {
        "calibrate": ("method", "preset", "options", "size", "timesteps", "seed"),
        "sampling": ("n_steps", "guidance_scale", "height", "width"),  # of the trajectory that data are taken from
    },
}


def _observes(recipe: Recipe) -> bool:
    """Does the recipe's method look at more than weights?"""
    return METHODS[recipe.calibrate.method].observes == "blocks"


def origin(model: LoadedModel, recipe: Recipe) -> dict[str, object]:
    """Everything that the result depends on; data by their content, not by the name of a file."""
    row = METHODS[recipe.calibrate.method]
    parts = {key: asdict(getattr(recipe, key)) for key in ("formats", "weights")}
    for key, names in DECIDING[row.observes].items():
        parts[key] = {name: value for name, value in asdict(getattr(recipe, key)).items() if name in names}
    parts["calibrate"]["options"] = row.deciding(recipe.calibrate.options)
    if _observes(recipe):
        from pipeline.calibrate.data import content

        parts["data"] = content(model, recipe)
    hashes = {"model_sha256": model.sha256, "config_sha256": model.config_sha256}
    return {"schema_version": checkpoint.SCHEMA_VERSION, **hashes, **parts}
