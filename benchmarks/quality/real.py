"""Published metrics for real pipelines: `python -m benchmarks.quality --model FOLDER --prompts FILE --rows PATTERN`.

FOLDER is a diffusers pipeline with text encoder and VAE; its transformer is quantized as the row says and put back, in
the PyTorch reference. Everything that is missing is refused by name before work starts, and nothing is downloaded:

- `fid`: packages torchmetrics and torch-fidelity (`pip install '.[quality]'`), its Inception weights in torch's hub
  folder, and --real-pictures with at least as many pictures as are drawn.
- `clip`: torchmetrics, and openai/clip-vit-base-patch16 in the hub's cache.
- `image_reward`, `hpsv2`: a Python with that package and its weights, --scorer-python PATH. They need versions of
  transformers and protobuf that the compiler cannot live with, so they have an environment of their own.

The reference draws on --device, by default a GPU where torch has one; the noise is drawn on the host, so that it is
the same everywhere. Calibration stays on the host. Pictures stay in the work folder, so that metrics can be added
later. No such run has been made yet, on no device: the metrics' own weights were not at hand, and tests stand in small
modules for them.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from benchmarks import record
from benchmarks.quality.metrics import median_estimate, psnr_db, ssim
from benchmarks.quality.real_metrics import METRICS, Pictures, read_picture
from benchmarks.quality.results import FLOAT, MEASURED, Results, outcome, row_key, stamp
from benchmarks.quality.rows import Row, rows_of
from benchmarks.record import Json
from export.errors import EnvironmentLacksError, RecipeError
from export.models.load import LoadedModel, denoiser, load
from pipeline import recipe as recipes
from pipeline.backends.base import Arrays
from pipeline.backends.reference import ReferenceEngine, fake_quant
from pipeline.calibrate import calibrate
from pipeline.files import remove, sha256_json
from pipeline.generate import pipeline_folder
from pipeline.generate.diffusers_adapter import EngineTransformer
from pipeline.generate.latent import find_pipeline
from pipeline.generate.pipeline_folder import pipeline_arguments
from pipeline.jobs.jobs import Job, Runner, in_turn
from pipeline.jobs.once import Once
from pipeline.progress import track
from pipeline.recipe import Recipe

logger = logging.getLogger("benchmarks.quality")
BATCH_SIZE = 4
# Family -> the bundled model whose rows it has, and the recipe that they start from.
FAMILY_ROWS = {
    "pixart": ("pixart_mini", "pixart_w4a6"),
    "hunyuan": ("pixart_mini", "hunyuan_w4a6"),
    "dit": ("dit_mini", "dit_w4a8"),
}


@dataclass(frozen=True)
class Real:
    """A real pipeline and what all of its rows have in common. facts: what decides the pictures of one denoiser."""

    root: Path
    model: LoadedModel
    prompts: list[str]
    arguments: argparse.Namespace
    facts: Json
    work: Path

    @cached_property
    def pipe(self) -> DiffusionPipeline:
        return DiffusionPipeline.from_pretrained(self.root, local_files_only=True)

    def pictures(self, name: str, key: str) -> Path:
        """The folder of a row's pictures."""
        return self.work / f"{name}-{key}"


def make_real(root: Path, prompts: list[str], arguments: argparse.Namespace) -> Real:
    """Of the pipeline at `root`."""
    model, work = load(str(root)), arguments.work_dir / f"real_{root.name}"
    return Real(root, model, prompts, arguments, facts(model, prompts, arguments), work)


def run_real(arguments: argparse.Namespace, runner: Runner = in_turn) -> int:
    """Measure the chosen rows of a real pipeline; returns how many failed. Raises UserError for what is missing."""
    root = Path(find_pipeline(arguments.model)).absolute()
    prompts, arguments.device = read_prompts(arguments), chosen_device(arguments.device)
    refuse_missing(root, arguments)
    shared = Once(partial(make_real, root, prompts, arguments))
    real = shared()
    rows = {
        row.name: (row, replace(with_set(row.recipe, arguments, row.settings), model=arguments.model))
        for row in real_rows(real.model, arguments)
    }
    results = Results(real.work.name, arguments.output_dir or record.RESULTS)
    results.refuse_others(real.facts)
    results.add(FLOAT, scored(real, results, FLOAT, row_key(real.facts, None, ()), float_pictures(real)), real.facts)
    jobs = [Job(name, partial(measured_row, shared, results, row, recipe)) for name, (row, recipe) in rows.items()]
    failed = 0
    for ended in runner(jobs):
        row, recipe = rows[ended.name]
        stated = {"settings": list(row.settings), "key": row_key(real.facts, recipe, row.multipliers)}
        results.add(ended.name, stated | outcome(ended), real.facts)
        failed += not ended.passed
    print(results.path)
    return failed


def chosen_device(name: str) -> str:
    """ "auto" is a GPU where torch has one."""
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def refuse_missing(root: Path, arguments: argparse.Namespace) -> None:
    """Raises EnvironmentLacksError naming every part of the pipeline and every need of a metric that is not there."""
    parts = pipeline_folder.listed_parts(root / pipeline_folder.INDEX)
    missing = [f"{root / name} of the pipeline" for name in parts if not (root / name).is_dir()]
    for name in arguments.metric:
        missing += [f"{name} needs {problem}" for problem in METRICS[name].problems(arguments)]
    if arguments.device == "cuda" and not torch.cuda.is_available():
        missing.append(f"--device cuda needs a GPU that torch {torch.__version__} can use; take --device cpu")
    if missing:
        raise EnvironmentLacksError("; ".join(missing))


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """The first --count lines of --prompts. Raises RecipeError if there are fewer."""
    path = arguments.prompts
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()] if path and path.is_file() else []
    prompts = [line for line in lines if line]
    if not arguments.count or len(prompts) < arguments.count:
        raise RecipeError(f"--prompts {path}: {len(prompts)} prompts; give --count and a file with that many lines")
    return prompts[: arguments.count]


def real_rows(model: LoadedModel, arguments: argparse.Namespace) -> list[Row]:
    """Rows by --rows, as the bundled model of the same kind has them. Raises RecipeError for none."""
    if model.family.name not in FAMILY_ROWS:
        raise RecipeError(f"{model.family.name}: no rows for this family; use one of {', '.join(FAMILY_ROWS)}")
    stand_in, recipe = FAMILY_ROWS[model.family.name]
    chosen = rows_of(stand_in, patterns=arguments.rows)
    rows = [replace(row, recipe=recipe) for row in chosen if not row.multipliers and row.algorithm is None]
    if not rows:
        raise RecipeError(f"--rows {' '.join(arguments.rows)}: no such row; --list shows them all")
    return rows


def with_set(name: str, arguments: argparse.Namespace, settings: Sequence[str] = ()) -> Recipe:
    """A bundled recipe with `settings`, then those of --set."""
    return recipes.with_settings(recipes.load(name), [*settings, *arguments.set])


def family_recipe(model: LoadedModel, arguments: argparse.Namespace) -> Recipe:
    """What the rows of the model's family start from: float draws with its steps and guidance, too."""
    return with_set(FAMILY_ROWS[model.family.name][1], arguments)


def facts(model: LoadedModel, prompts: list[str], arguments: argparse.Namespace) -> Json:
    """What all rows have in common; metrics are not among it, they may be added later."""
    return {
        "model": arguments.model,
        "model_sha256": model.sha256,
        "prompts_sha256": sha256_json(prompts),
        "count": len(prompts),
        "seed": arguments.seed,
        "set": arguments.set,
        "sampling": asdict(family_recipe(model, arguments).sampling),
        "device": arguments.device,
    }


# --- rows -----------------------------------------------------------------------------------------------------------


def measured_row(shared: Once[Real], results: Results, row: Row, recipe: Recipe) -> Json:
    """A row's numbers, with the size of its weights; --redo calibrates and draws anew."""
    real = shared()
    key = row_key(real.facts, recipe, row.multipliers)
    calibrated = real.work / "calibrated" / key
    if real.arguments.redo:
        remove(real.pictures(row.name, key))
        remove(calibrated)
    layers = calibrate(real.model, recipe, calibrated)
    module = fake_quant(real.model, layers, torch.float32, recipe.attention.formats)
    pictures = stored_pictures(real, row.name, key, module, recipe)
    size = {"weight_bytes": sum(layer.size_bytes for layer in layers)}
    return size | scored(real, results, row.name, key, pictures, float_pictures(real)) | stamp()


def scored(real: Real, results: Results, name: str, key: str, pictures: Pictures, base: Pictures | None = None) -> Json:
    """The measures of a row's pictures. Metrics that its record holds already are kept, unless --redo."""
    before = results.read()["rows"].get(name, {}) if results.has(name, key) and not real.arguments.redo else {}
    measures: Json = {"status": MEASURED, "key": key, "drawn_by": f"reference, {real.arguments.device}"}
    for metric in dict.fromkeys([*(metric for metric in METRICS if metric in before), *real.arguments.metric]):
        score = before.get(metric)
        if score is None:
            score = METRICS[metric].score(pictures, real.prompts, real.pictures(name, key), real.arguments)
        measures[metric] = score
        logger.info("%s: %s %g", name, metric, score)
    if base is not None:
        pair = [part.transpose(0, 3, 1, 2) / np.float32(127.5) - 1 for part in (pictures, base)]
        measures |= {"psnr_db": asdict(median_estimate(psnr_db(*pair))), "ssim": asdict(median_estimate(ssim(*pair)))}
    return measures


# --- pictures -------------------------------------------------------------------------------------------------------


def float_pictures(real: Real) -> Pictures:
    """What all rows are compared with."""
    key = row_key(real.facts, None, ())
    return stored_pictures(real, FLOAT, key, denoiser(real.model), family_recipe(real.model, real.arguments))


def stored_pictures(real: Real, name: str, key: str, module: torch.nn.Module, recipe: Recipe) -> Pictures:
    """Pictures of a row; drawn and written to its folder (prompts.json last) if they are not there."""
    folder = real.pictures(name, key)
    if not (folder / "prompts.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for index, picture in enumerate(draw(real, module, recipe)):
            Image.fromarray(picture).save(folder / f"{index:04d}.png")
        (folder / "prompts.json").write_text(json.dumps(real.prompts), encoding="utf-8")
    return np.stack([read_picture(folder / f"{index:04d}.png") for index in range(len(real.prompts))])


class PlacedEngine(ReferenceEngine):
    """The float32 reference with a copy of its module on `device`; arrays come from the host and go back there."""

    def __init__(self, module: torch.nn.Module, device: str) -> None:
        super().__init__(module if device == "cpu" else copy.deepcopy(module).to(device), torch.float32)
        self.device = device

    def run(self, inputs: Arrays) -> Arrays:
        tensors = {name: self._tensor(value).to(self.device) for name, value in inputs.items()}
        with torch.inference_mode():
            return {"sample": self.module(**tensors).cpu().numpy()}


def draw(real: Real, module: torch.nn.Module, recipe: Recipe) -> Pictures:
    """One picture for each prompt with the denoiser `module` in the pipeline; picture i has the seed --seed + i."""
    pipe, model, device = real.pipe, real.model, real.arguments.device
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32 in convolutions, as it does in products
    pipe.transformer = EngineTransformer(PlacedEngine(module, device), model.family, model.config)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    steps = {"num_inference_steps": recipe.sampling.n_steps, "guidance_scale": recipe.sampling.guidance_scale}
    drawn = []
    starts = range(0, len(real.prompts), BATCH_SIZE)
    for start in track(starts, len(starts), "pictures"):
        part = real.prompts[start : start + BATCH_SIZE]
        generators = [torch.Generator().manual_seed(real.arguments.seed + start + i) for i in range(len(part))]
        named = pipeline_arguments(pipe, recipe.sampling, part)
        images = pipe(**named, generator=generators, output_type="np", **steps).images
        drawn.append(np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8))
    return np.concatenate(drawn)
