"""From ModelOpt's result to a calibration folder that `build --checkpoint` and `export` take.

from pipeline.calibrate.modelopt.take_over import quantized, take_over
module = quantized(model, recipe, W4A6_FP4DIT_CFG | {"algorithm": "mse"})
take_over(model, recipe, module, Path("checkpoints/mse"))
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from export.checkpoint import QuantizedLinear
from export.documents import whole_file
from export.models.load import LoadedModel, save_kept
from export.models.torch_modules import Denoiser
from pipeline.backends.reference import ReferenceEngine
from pipeline.calibrate import origin, with_method
from pipeline.calibrate.data import calibration_data
from pipeline.calibrate.modelopt.backend import fitted, refuse_without_cuda, register
from pipeline.calibrate.modelopt.layers import Taken, recipe_of
from pipeline.calibrate.modelopt.state import live_state, read_state, state_sha256
from pipeline.calibrate.state import KEPT, CalibrationState
from pipeline.recipe import Recipe, to_toml

logger = logging.getLogger(__name__)
RECIPE_FILE = "recipe.toml"


def recipe_of_file(model: LoadedModel, recipe: Recipe, path: Path) -> Recipe:
    """The recipe whose method takes over what `mto.save` wrote into `path`, or `save_pretrained` into that folder: its
    formats are the file's.

    Raises ModelError and RecipeError as `read_state` and `Taken` do.
    """
    taken = Taken(model, read_state(path))
    return recipe_of(recipe, taken, {"checkpoint": str(path.resolve()), "sha256": state_sha256(path)})


def take_over(model: LoadedModel, recipe: Recipe, module: nn.Module, folder: Path) -> list[QuantizedLinear]:
    """The layers of a live module that `mtq.quantize` or `mtq.auto_quantize` returned, written into `folder` with the
    recipe that goes with them (recipe.toml) and what is not quantized.

    model: the float model that was quantized. recipe: what the layers do not decide, such as sampling. Raises
    RecipeError naming a quantizer that has no equal here, ModelError for a module of another model.
    """
    taken = Taken(model, live_state(module))
    layers = [taken.layer(name) for name in taken.rows]
    made = recipe_of(recipe, taken, {"sha256": _digest(layers)})
    with CalibrationState(folder, origin(model, made)) as state:
        state.complete(layers)
    write_recipe(made, folder)
    save_kept(model, folder / KEPT)
    logger.info("took over %d linears of ModelOpt into %s", len(layers), folder)
    return layers


def quantized(model: LoadedModel, recipe: Recipe, config: Mapping[str, Any]) -> nn.Module:
    """A copy of the model's module, quantized by ModelOpt on the recipe's calibration calls.

    config: of ModelOpt or of backend.py; what our engines keep in float is switched off. Raises EnvironmentLacksError
    where ModelOpt is not installed, or needs CUDA for it.
    """
    register()
    refuse_without_cuda(config)
    import modelopt.torch.quantization as mtq

    calls = calibration_data(model, with_method(recipe, model)).calls
    names = tuple(row.name for row in model.inputs)

    def forward_loop(module: nn.Module) -> None:
        engine = ReferenceEngine(Denoiser(module, model.family, names).eval())
        for call in calls:
            engine.run(call.inputs)

    return mtq.quantize(copy.deepcopy(model.module), fitted(config, model), forward_loop=forward_loop)


def write_recipe(recipe: Recipe, folder: Path) -> None:
    """Write recipe.toml, from which `build --engine` makes the same again."""
    with whole_file(folder / RECIPE_FILE) as part:
        part.write_text(to_toml(recipe), encoding="utf-8")


def _digest(layers: list[QuantizedLinear]) -> str:
    """Hash of all arrays of the layers, and of what they are."""
    digest = hashlib.sha256()
    for layer in layers:
        for key, value in sorted(vars(layer).items()):
            digest.update(f"{key} {getattr(value, 'shape', value)} ".encode())
            digest.update(value.tobytes() if hasattr(value, "tobytes") else b"")
    return digest.hexdigest()
