"""Calibration data: what the float model is called with along its own sampling trajectory.

Every prompt's trajectory is sampled with guidance, so a call holds the conditional and the unconditional half; calls
at evenly spread steps are kept: safetensors files in a cache folder named after everything they depend on.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from export.cache_folder import cache_folder
from export.documents import Rules, sha256, whole_file
from export.errors import ModelError, RecipeError
from pipeline.backends.base import Arrays
from pipeline.files import sha256_json, write_json
from pipeline.generate import pipeline_folder
from pipeline.generate.case import AnyCase, Case, example_prompts, make_case
from pipeline.generate.conditioning import GENERATION_FILE, load_generation
from pipeline.generate.example_prompts import prompt_lines
from pipeline.progress import track
from pipeline.recipe import Recipe

if TYPE_CHECKING:
    from export.models.load import LoadedModel

logger = logging.getLogger(__name__)
PROMPTS_RULES = Rules(RecipeError, "calibrate.prompts takes a text file with one prompt per line")
ORIGIN_FILE = "data.json"
FORMAT_VERSION = 2  # of the folder; raise it when the same origin gives other calls
# Prompts sampled at a time; with guidance a call holds twice as many samples.
BATCH_PROMPTS = 16
# Apart from the seeds of the pictures that an engine is verified on: those must not be calibrated on.
SEED_OFFSET = 7919


@dataclass(frozen=True)
class Call:
    """One call of a model: `inputs` of a batch [B, ...], of a denoiser all at one step of the sampler, with model input
    `timestep`, which is 0 of a text encoder. streamed: the input that counts samples."""

    inputs: Arrays
    timestep: float
    step: int
    streamed: str = "hidden_states"

    @property
    def samples(self) -> int:
        return len(self.inputs[self.streamed])


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

    Raises RecipeError for a prompt file that cannot be used, ModelError where sampling ends too early.
    """
    prompts = read_prompts(model, recipe)
    origin = _origin(model, recipe, prompts)
    folder = cache_folder("calibration", sha256_json(origin)[:16])
    names = _names(recipe, len(prompts))
    if _must_make(folder, names):
        _collect(model, recipe, prompts, folder)
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ModelError(
                f"{model.source}: sampling ended without the call of {missing[0]} and {len(missing) - 1} others; "
                "use fewer sampling.n_steps, as many as the model's scheduler takes"
            )
        write_json(folder / ORIGIN_FILE, origin | {"files": names})  # last: without it the folder is an unfinished one
    logger.info("calibration data in %s", folder)
    streamed = model.family.streamed
    return CalibrationData(tuple(_load(folder / name, streamed) for name in names), recipe.sampling.n_steps)


def content(model: LoadedModel, recipe: Recipe) -> dict[str, object]:
    """Hashes of what decides the calls beside model and settings: the prompts' texts, and what draws pictures of them.

    Raises RecipeError for a prompt file that cannot be used.
    """
    return {"prompts_sha256": sha256_json(list(read_prompts(model, recipe))), **sampled_by(model)}


def sampled_by(model: LoadedModel) -> dict[str, object]:
    """Hash of the description beside the model, or of the pipeline that it belongs to; nothing without either."""
    if (model.folder / GENERATION_FILE).is_file():
        paths = [model.folder / name for name in load_generation(model.folder).files]
        return {"generation_sha256": sha256_json({path.name: sha256(path) for path in paths if path.is_file()})}
    root = _root(model)
    return {"pipeline": pipeline_folder.identity(root)} if root else {}


def read_prompts(model: LoadedModel, recipe: Recipe) -> tuple[str, ...]:
    """`calibrate.size` prompts: from the recipe's file, repeated as needed, else ones that the model understands."""
    settings = recipe.calibrate
    described, root = (model.folder / GENERATION_FILE).is_file(), _root(model)
    if settings.prompts:
        path = Path(settings.prompts)
        if not described and root is None:
            raise RecipeError(
                f"calibrate.prompts: nothing encodes prompts for {model.source}; give the folder of its whole "
                f"diffusers pipeline ({pipeline_folder.INDEX} and all it lists), or a model with {GENERATION_FILE}"
            )
        prompts = prompt_lines(path, PROMPTS_RULES)
        return tuple(prompts[i % len(prompts)] for i in range(settings.size))
    if root is not None:
        return tuple(pipeline_folder.example_prompts(model, root, settings.size, settings.seed + SEED_OFFSET))
    if not described:
        if model.family.steps:
            logger.warning("%s has no text encoder: calibration sees random conditioning", model.source)
        else:
            logger.warning("%s: calibration sees random token ids", model.source)
        return ("random",) * settings.size
    return tuple(example_prompts(load_generation(model.folder), settings.size, settings.seed + SEED_OFFSET))


def kept_steps(n_steps: int, timesteps: int) -> list[int]:
    """Evenly spread step indices, first and last included, each once.

    >>> kept_steps(20, 4), kept_steps(3, 10)
    ([0, 6, 13, 19], [0, 1, 2])
    """
    return sorted({round(step) for step in np.linspace(0, n_steps - 1, min(timesteps, n_steps)).tolist()})


def _origin(model: LoadedModel, recipe: Recipe, prompts: tuple[str, ...]) -> dict[str, object]:
    sampling = recipe.sampling
    return {
        "format_version": FORMAT_VERSION,
        "model_sha256": model.sha256,
        "config_sha256": model.config_sha256,
        "prompts": list(prompts),
        "seed": recipe.calibrate.seed,
        "timesteps": recipe.calibrate.timesteps,
        "sampling": [sampling.n_steps, sampling.guidance_scale, sampling.height, sampling.width],
        **sampled_by(model),
    }


def _root(model: LoadedModel) -> Path | None:
    """The pipeline that samples this model, if it is not sampled by the description beside it, or a text encoder."""
    if not model.family.steps:
        return None
    return None if (model.folder / GENERATION_FILE).is_file() else pipeline_folder.pipeline_root(model)


def _collect(model: LoadedModel, recipe: Recipe, prompts: tuple[str, ...], folder: Path) -> None:
    """Sample every batch of prompts and write its kept calls."""
    import torch

    from export.models.load import denoiser
    from export.models.torch_modules import set_resolution
    from pipeline.backends.reference import ReferenceEngine

    steps = set(kept_steps(recipe.sampling.n_steps, recipe.calibrate.timesteps))
    engine, root = ReferenceEngine(denoiser(model), torch.float32), _root(model)
    sampler = pipeline_folder.PipelineSampler(root, model, recipe, engine) if root else None
    starts = range(0, len(prompts), BATCH_PROMPTS)
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(track(starts, len(starts), "calibration data")):
        if all(_path(folder, number, step).is_file() for step in steps):
            continue  # another run has made this batch

        def keep(step: int, inputs: Arrays, outputs: Arrays | None = None, number: int = number) -> None:
            if step in steps:
                _save(inputs, _path(folder, number, step))

        part = prompts[start : start + BATCH_PROMPTS]
        if sampler:
            sampler.draw(part, recipe.calibrate.seed + SEED_OFFSET + start, keep)
        else:  # by the description beside the model, or from random conditioning
            case = _case(model, recipe, part, number)
            set_resolution(engine.module, *case.cells)
            case.draw(engine.run, keep)


def _case(model: LoadedModel, recipe: Recipe, prompts: tuple[str, ...], number: int) -> AnyCase:
    """Conditioning and noise of one batch of prompts, or a text encoder's call with them."""
    seed = recipe.calibrate.seed + SEED_OFFSET + number
    sampling = replace(recipe.sampling, seed=seed, batch_size=len(prompts))
    case = make_case(model, replace(recipe, sampling=sampling), len(prompts))
    if not isinstance(case, Case) or prompts[0] == "random":
        return case
    return replace(case, prompts=prompts, conditioning=load_generation(model.folder).encode(list(prompts)))


def _save(inputs: Arrays, path: Path) -> None:
    with whole_file(path, shared=True) as part:
        save_file({name: np.ascontiguousarray(value) for name, value in inputs.items()}, part)


def _path(folder: Path, number: int, step: int) -> Path:
    return folder / f"batch{number:04d}_step{step:04d}.safetensors"


def _names(recipe: Recipe, prompts: int) -> list[str]:
    """The files of a whole folder, in the order of the calls."""
    steps = kept_steps(recipe.sampling.n_steps, recipe.calibrate.timesteps)
    batches = range(math.ceil(prompts / BATCH_PROMPTS))
    return [_path(Path(), number, step).name for number in batches for step in steps]


def _must_make(folder: Path, names: Sequence[str]) -> bool:
    """Is anything to be made? Broken files are removed, and said like missing ones if the folder once was whole."""
    broken = [name for name in names if not _is_whole(folder / name)]
    for name in broken:
        (folder / name).unlink(missing_ok=True)
    finished = (folder / ORIGIN_FILE).is_file()
    if broken and finished:
        logger.warning(
            "%s: %d of %d files missing or broken (%s); making them again", folder, len(broken), len(names), broken[0]
        )
    return bool(broken) or not finished


def _is_whole(path: Path) -> bool:
    """Is the file there, as long as its head says?"""
    try:
        with safe_open(path, framework="numpy"):
            return True
    except (OSError, SafetensorError):
        return False


def _load(path: Path, streamed: str) -> Call:
    inputs = load_file(path)
    timestep = float(inputs["timestep"][0]) if "timestep" in inputs else 0.0
    return Call(inputs, timestep, int(path.stem.rpartition("step")[2]), streamed)
