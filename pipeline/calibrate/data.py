"""Calibration data: what the float model is called with along its own sampling trajectory.

Every prompt's trajectory is sampled with guidance, so a call holds the conditional and the unconditional half; calls
at evenly spread steps are kept: safetensors files in a cache folder named after everything they depend on.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file, save_file

from export.errors import RecipeError
from pipeline import machine
from pipeline.backends.base import Arrays
from pipeline.calibrate import pipeline_data
from pipeline.conditioning import GENERATION_FILE, load_generation
from pipeline.files import sha256_json, write_json
from pipeline.picture_case import Case, example_prompts, make_case
from pipeline.progress import track
from pipeline.recipe import Recipe

if TYPE_CHECKING:
    from export.models import LoadedModel
    from pipeline.backends.reference import ReferenceEngine

logger = logging.getLogger(__name__)
ORIGIN_FILE = "data.json"
# Prompts sampled at a time; with guidance a call holds twice as many samples.
BATCH_PROMPTS = 16
# Apart from the seeds of the pictures that an engine is verified on: those must not be calibrated on.
SEED_OFFSET = 7919


@dataclass(frozen=True)
class Call:
    """One denoiser call: `inputs` of a batch [B, ...], all at one step of the sampler, with model input `timestep`."""

    inputs: Arrays
    timestep: float
    step: int

    @property
    def samples(self) -> int:
        return len(self.inputs["hidden_states"])


@dataclass(frozen=True)
class CalibrationData:
    """Calls in order of prompt batch, then step. n_steps: length of the trajectory they were taken from."""

    calls: tuple[Call, ...]
    n_steps: int

    @property
    def samples(self) -> int:
        return sum(call.samples for call in self.calls)


def calibration_data(model: LoadedModel, recipe: Recipe) -> CalibrationData:
    """The calls of a recipe, made once: methods that are calibrated on the same model and settings share them.

    Raises RecipeError for a prompt file that cannot be used.
    """
    prompts = read_prompts(model, recipe)
    origin = _origin(model, recipe, prompts)
    folder = machine.cache_dir() / "calibration" / sha256_json(origin)[:16]
    if not (folder / ORIGIN_FILE).is_file():
        _collect(model, recipe, prompts, folder)
        write_json(folder / ORIGIN_FILE, origin)  # last: without it the folder is an unfinished one
    logger.info("calibration data in %s", folder)
    return _load(folder, recipe)


def read_prompts(model: LoadedModel, recipe: Recipe) -> tuple[str, ...]:
    """`calibrate.size` prompts: from the recipe's file, repeated as needed, else ones that the model understands."""
    wanted = recipe.calibrate
    described, root = (model.folder / GENERATION_FILE).is_file(), _root(model)
    if wanted.prompts:
        path = Path(wanted.prompts)
        if not described and root is None:
            raise RecipeError(
                f"calibrate.prompts: nothing encodes prompts for {model.source}; give the folder of its whole "
                f"diffusers pipeline ({pipeline_data.INDEX} and all it lists), or a model with {GENERATION_FILE}"
            )
        lines = [line.strip() for line in path.read_text().splitlines()] if path.is_file() else []
        found = [line for line in lines if line]
        if not found:
            raise RecipeError(f"calibrate.prompts: {path} has no prompt; give a text file with one prompt per line")
        return tuple(found[i % len(found)] for i in range(wanted.size))
    if root is not None:
        return tuple(pipeline_data.example_prompts(model, wanted.size, wanted.seed + SEED_OFFSET))
    if not described:
        logger.warning("%s has no text encoder: calibration sees random conditioning", model.source)
        return ("random",) * wanted.size
    return tuple(example_prompts(load_generation(model.folder), wanted.size, wanted.seed + SEED_OFFSET))


def kept_steps(n_steps: int, timesteps: int) -> list[int]:
    """Evenly spread step indices, first and last included, each once.

    >>> kept_steps(20, 4), kept_steps(3, 10)
    ([0, 6, 13, 19], [0, 1, 2])
    """
    return sorted({round(step) for step in np.linspace(0, n_steps - 1, min(timesteps, n_steps)).tolist()})


def _origin(model: LoadedModel, recipe: Recipe, prompts: tuple[str, ...]) -> dict[str, Any]:
    sampling, root = recipe.sampling, _root(model)
    found = {
        "model_sha256": model.sha256,
        "prompts": list(prompts),
        "seed": recipe.calibrate.seed,
        "timesteps": recipe.calibrate.timesteps,
        "sampling": [sampling.n_steps, sampling.guidance_scale, sampling.height, sampling.width],
    }
    return found | ({"pipeline": pipeline_data.identity(root)} if root else {})


def _root(model: LoadedModel) -> Path | None:
    """The pipeline that samples this model, if it is not sampled by the description beside it."""
    return None if (model.folder / GENERATION_FILE).is_file() else pipeline_data.pipeline_root(model)


def _collect(model: LoadedModel, recipe: Recipe, prompts: tuple[str, ...], folder: Path) -> None:
    """Sample every batch of prompts and write its kept calls."""
    import torch

    from export.models import denoiser
    from pipeline.backends.reference import ReferenceEngine

    steps = set(kept_steps(recipe.sampling.n_steps, recipe.calibrate.timesteps))
    engine, root = ReferenceEngine(denoiser(model), torch.float32), _root(model)
    sampler = pipeline_data.PipelineSampler(root, model, recipe, engine) if root else None
    starts = range(0, len(prompts), BATCH_PROMPTS)
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(track(starts, len(starts), "calibration data")):
        if all(_path(folder, number, step).is_file() for step in steps):
            continue  # an interrupted run has made this batch

        def keep(step: int, inputs: Arrays, number: int = number) -> None:
            if step in steps:
                _save(inputs, _path(folder, number, step))

        part = prompts[start : start + BATCH_PROMPTS]
        if sampler:
            sampler.draw(part, recipe.calibrate.seed + SEED_OFFSET + start, keep)
        else:
            _draw(_case(model, recipe, part, number), engine, keep)


def _draw(case: Case, engine: ReferenceEngine, keep: pipeline_data.Keep) -> None:
    """Sample by the description beside the model, or from random conditioning."""
    from export.torch_modules import set_resolution

    set_resolution(engine.module, *case.noise.shape[2:])
    case.draw(engine.run, lambda step, inputs, _: keep(step, inputs))


def _case(model: LoadedModel, recipe: Recipe, prompts: tuple[str, ...], number: int) -> Case:
    """Conditioning and noise of one batch of prompts."""
    seed = recipe.calibrate.seed + SEED_OFFSET + number
    sampling = replace(recipe.sampling, seed=seed, batch_size=len(prompts))
    case = make_case(model, replace(recipe, sampling=sampling), len(prompts))
    if prompts[0] == "random":
        return case
    return replace(case, prompts=prompts, conditioning=load_generation(model.folder).encode(list(prompts)))


def _save(inputs: Arrays, path: Path) -> None:
    partial = path.with_suffix(f".{os.getpid()}.part")
    save_file({name: np.ascontiguousarray(value) for name, value in inputs.items()}, partial)
    os.replace(partial, path)


def _path(folder: Path, number: int, step: int) -> Path:
    return folder / f"batch{number:04d}_step{step:04d}.safetensors"


def _load(folder: Path, recipe: Recipe) -> CalibrationData:
    calls = []
    for path in sorted(folder.glob("batch*.safetensors")):
        inputs = load_file(path)
        calls.append(Call(inputs, float(inputs["timestep"][0]), int(path.stem.rpartition("step")[2])))
    return CalibrationData(tuple(calls), recipe.sampling.n_steps)
