"""Published metrics for real pipelines: `python -m benchmarks.quality --model FOLDER --prompts FILE --rows PATTERN`.

FOLDER is a diffusers pipeline with text encoder and VAE; its transformer is quantized as the row says and put back, in
the PyTorch reference. Everything that is missing is refused by name before work starts, and nothing is downloaded:

- `fid`: packages torchmetrics and torch-fidelity (`pip install '.[quality]'`), its Inception weights in torch's hub
  folder, and --real-pictures with at least as many pictures as are drawn.
- `clip`: torchmetrics, and openai/clip-vit-base-patch16 in the hub's cache.
- `image_reward`, `hpsv2`: a Python with that package and its weights, --scorer-python PATH. They need versions of
  transformers and protobuf that the compiler cannot live with, so they have an environment of their own.

Pictures stay in the work folder, so that metrics can be added later. No such run has been made yet: the metrics' own
weights were not at hand, and tests stand in small modules for them.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks import record
from benchmarks.quality_metrics import median_estimate, psnr_db, ssim
from benchmarks.quality_real_metrics import METRICS, Pictures, read_picture
from benchmarks.quality_results import FLOAT, MEASURED, Results, row_key
from benchmarks.quality_rows import Row, rows_of
from export.errors import EnvironmentLacksError, RecipeError
from export.models import LoadedModel, denoiser, load
from pipeline import recipe as recipes
from pipeline.backends.reference import ReferenceEngine, fake_quant
from pipeline.calibrate import pipeline_data
from pipeline.diffusers_adapter import EngineTransformer
from pipeline.files import sha256_json
from pipeline.latent_pictures import find_pipeline, pipeline_arguments
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


def run_real(arguments: argparse.Namespace) -> int:
    """Measure the chosen rows of a real pipeline; returns 0. Raises UserError for what is missing."""
    root = Path(find_pipeline(arguments.model))
    prompts = read_prompts(arguments)
    refuse_missing(root, arguments)
    model = load(str(root))
    rows = [(row, real_recipe(row, arguments)) for row in real_rows(model, arguments)]
    subject = facts(model, prompts, arguments)
    results = Results(f"real_{root.name}", arguments.output_dir or record.RESULTS)
    pipe = open_pipeline(root)
    work = arguments.work_dir / results.model
    base = measure(FLOAT, None, (pipe, model), prompts, arguments, work, subject)
    results.add(FLOAT, base[0], subject)
    for row, recipe in rows:
        key = row_key(subject, recipe, row.multipliers)
        if arguments.redo or not results.has(row.name, key):
            found, _ = measure(row.name, recipe, (pipe, model), prompts, arguments, work, subject, base[1])
            results.add(row.name, found | {"settings": list(row.settings), "key": key}, subject)
    print(results.path)
    return 0


def refuse_missing(root: Path, arguments: argparse.Namespace) -> None:
    """Raises EnvironmentLacksError naming every part of the pipeline and every need of a metric that is not there."""
    parts = pipeline_data.listed_parts(root / pipeline_data.INDEX)
    missing = [f"{root / name} of the pipeline" for name in parts if not (root / name).is_dir()]
    for name in arguments.metric:
        missing += [f"{name} needs {problem}" for problem in METRICS[name].problems(arguments)]
    if missing:
        raise EnvironmentLacksError("; ".join(missing))


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """The first --count lines of --prompts. Raises RecipeError if there are fewer."""
    path = arguments.prompts
    lines = [line.strip() for line in path.read_text().splitlines()] if path and path.is_file() else []
    found = [line for line in lines if line]
    if not arguments.count or len(found) < arguments.count:
        raise RecipeError(f"--prompts {path}: {len(found)} prompts; give --count and a file with that many lines")
    return found[: arguments.count]


def real_rows(model: LoadedModel, arguments: argparse.Namespace) -> list[Row]:
    """Rows by --rows, as the bundled model of the same kind has them. Raises RecipeError for none."""
    if model.family.name not in FAMILY_ROWS:
        raise RecipeError(f"{model.family.name}: no rows for this family; use one of {', '.join(FAMILY_ROWS)}")
    stand_in, recipe = FAMILY_ROWS[model.family.name]
    found = [replace(row, recipe=recipe) for row in rows_of(stand_in, patterns=arguments.rows) if not row.multipliers]
    if not found:
        raise RecipeError(f"--rows {' '.join(arguments.rows)}: no such row; --list shows them all")
    return found


def real_recipe(row: Row, arguments: argparse.Namespace) -> Recipe:
    made = recipes.with_settings(recipes.load(row.recipe), [*row.settings, *arguments.set])
    return replace(made, model=arguments.model)


def facts(model: LoadedModel, prompts: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """What all rows have in common; the float row's recipe gives steps and guidance, which --set may change."""
    return {
        "model": arguments.model,
        "model_sha256": model.sha256,
        "prompts_sha256": sha256_json(prompts),
        "count": len(prompts),
        "seed": arguments.seed,
        "set": arguments.set,
        "metrics": arguments.metric,
    }


def open_pipeline(root: Path) -> Any:
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(root, local_files_only=True)


def measure(
    name: str,
    recipe: Recipe | None,
    parts: tuple[Any, LoadedModel],
    prompts: list[str],
    arguments: argparse.Namespace,
    work: Path,
    subject: dict[str, Any],
    base: Pictures | None = None,
) -> tuple[dict[str, Any], Pictures]:
    """One row's record and its pictures; recipe None is the float model, base its pictures."""
    from pipeline.calibrate import calibrate

    pipe, model = parts
    key = row_key({k: v for k, v in subject.items() if k != "metrics"}, recipe, ())
    found: dict[str, Any] = {"status": MEASURED, "key": key}
    module, sampling = denoiser(model), recipes.with_settings(recipes.load("pixart_w4a6"), arguments.set)
    if recipe is not None:
        layers = calibrate(model, recipe, work / "calibrated" / key)
        module, sampling = fake_quant(model, layers, torch.float32), recipe
        found |= {"weight_bytes": sum(layer.size_bytes for layer in layers), "drawn_by": "reference"}
    folder = work / f"{name}-{key}"
    pictures = stored_pictures(folder, lambda: draw(pipe, module, model, sampling, prompts, arguments.seed), prompts)
    found |= {metric: METRICS[metric].score(pictures, prompts, folder, arguments) for metric in arguments.metric}
    if base is not None:
        pair = [part.transpose(0, 3, 1, 2) / np.float32(127.5) - 1 for part in (pictures, base)]
        found |= {"psnr_db": asdict(median_estimate(psnr_db(*pair))), "ssim": asdict(median_estimate(ssim(*pair)))}
    logger.info("%s: %s", name, {metric: found[metric] for metric in arguments.metric})
    return found, pictures


# --- pictures -------------------------------------------------------------------------------------------------------


def stored_pictures(folder: Path, make: Callable[[], Pictures], prompts: list[str]) -> Pictures:
    """Pictures of a folder; drawn and written there (prompts.json last) if they are not."""
    from PIL import Image

    if not (folder / "prompts.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for index, picture in enumerate(make()):
            Image.fromarray(picture).save(folder / f"{index:04d}.png")
        (folder / "prompts.json").write_text(json.dumps(prompts))
    return np.stack([read_picture(folder / f"{index:04d}.png") for index in range(len(prompts))])


def draw(pipe: Any, module: Any, model: LoadedModel, recipe: Recipe, prompts: list[str], seed: int) -> Pictures:
    """One picture for each prompt with the denoiser `module` in the pipeline; picture i has the seed `seed` + i."""
    pipe.transformer = EngineTransformer(ReferenceEngine(module, torch.float32), model.family, model.config)
    pipe.set_progress_bar_config(disable=True)
    steps = {"num_inference_steps": recipe.sampling.n_steps, "guidance_scale": recipe.sampling.guidance_scale}
    as_bundle: Any = SimpleNamespace(recipe=recipe)
    named = pipeline_arguments(model.family.name)
    drawn = []
    starts = range(0, len(prompts), BATCH_SIZE)
    for start in track(starts, len(starts), "pictures"):
        part = prompts[start : start + BATCH_SIZE]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        images = pipe(**named(pipe, as_bundle, part), generator=generators, output_type="np", **steps).images
        drawn.append(np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8))
    return np.concatenate(drawn)
