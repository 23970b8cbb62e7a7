"""Calibration: from a float model and a recipe to quantized linears on disk.

A method observes the model in its constructor, says which layers it learns together (`units`: one layer, or a whole
block for a method that reconstructs blocks), and emits the quantized layers of each unit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from export import checkpoint
from export.checkpoint import QuantizedLinear
from pipeline.calibrate.plan import LayerPlan, make_plans
from pipeline.calibrate.rtn import RoundToNearest
from pipeline.calibrate.state import CalibrationState
from pipeline.progress import track
from pipeline.recipe import Recipe

if TYPE_CHECKING:
    from export.models import LoadedModel

logger = logging.getLogger(__name__)


class Method(Protocol):
    """One calibration method; `METHODS` makes it from the model and the recipe."""

    def units(self, plans: list[LayerPlan]) -> list[list[LayerPlan]]:
        """The layers in order of work, those learned together in one list."""
        ...

    def quantize(self, unit: list[LayerPlan]) -> list[QuantizedLinear]:
        """The finished layers of one unit. The same inputs give the same bytes."""
        ...


METHODS: dict[str, Callable[[LoadedModel, Recipe], Method]] = {"rtn": RoundToNearest}


def calibrate(model: LoadedModel, recipe: Recipe, folder: Path) -> list[QuantizedLinear]:
    """Quantize every linear of `model` by the recipe's method and write the checkpoint into `folder`.

    Units that an interrupted run of the same model and recipe left in `folder` are used as they are. Raises
    RecipeError if the group size does not fit, ModelError naming the layer if a weight is NaN or Inf.
    """
    plans = make_plans(model.linears(), recipe)
    state = CalibrationState(folder, _origin(model, recipe))
    if state.is_complete:
        return checkpoint.load(folder)
    started = time.monotonic()
    method = METHODS[recipe.calibrate.method](model, recipe)
    units = method.units(plans)
    left = [unit for unit in units if not all(state.has(plan.name) for plan in unit)]
    for unit in track(left, len(units), "calibrate", len(units) - len(left)):
        for layer in method.quantize(unit):
            state.add(layer)
    layers = state.finish([plan.name for plan in plans])
    size_mb = sum(layer.size_bytes for layer in layers) / 1e6
    seconds = time.monotonic() - started
    logger.info("calibrated %d linears (%s) in %.1f s: %.1f MB", len(layers), recipe.calibrate.method, seconds, size_mb)
    return layers


def _origin(model: LoadedModel, recipe: Recipe) -> dict[str, Any]:
    """Everything that the result depends on."""
    parts = {key: asdict(getattr(recipe, key)) for key in ("formats", "weights", "calibrate")}
    return {"schema_version": checkpoint.SCHEMA_VERSION, "model_sha256": model.sha256, **parts}
