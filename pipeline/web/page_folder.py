"""Writes the page: its files, onnxruntime-web, models lowered to stock ops, and what drawing needs of the bundle."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.bundle.pipeline_bundle import PipelineBundle
from pipeline.web import onnxruntime_web, pipeline_page, pixel_page

if TYPE_CHECKING:
    from pipeline.bundle.bundle import Bundle

PAGE = (
    "index.html", "page.css", "page.js", "worker.js", "engine.js", "pixel_model.js", "latent_model.js", "noise.js",
    "preview.js", "prompts.js", "sampler.js", "schedulers.js", "tokenizer.js",
)  # fmt: skip
MODEL_FOLDER, RUNTIME_FOLDER = "model", "ort"
# What an export consists of, at the top of its folder.
ENTRIES = {*PAGE, MODEL_FOLDER, RUNTIME_FOLDER}


def refuse(bundle: Bundle | PipelineBundle) -> None:
    """Raise RecipeError or ModelError for a bundle that the page cannot draw with."""
    if isinstance(bundle, PipelineBundle):
        pipeline_page.refuse(bundle)
    else:
        pixel_page.refuse(bundle)


def write(bundle: Bundle | PipelineBundle, folder: Path, runtime: Path | None) -> int:
    """Write all files for a bundle that `refuse` lets pass into a new folder; returns their bytes. runtime: as
    `onnxruntime_web.find` takes it, which raises EnvironmentLacksError."""
    files = onnxruntime_web.find(runtime)
    for name in (MODEL_FOLDER, RUNTIME_FOLDER):
        (folder / name).mkdir(parents=True)
    own = resources.files("pipeline.web") / "page"
    for name in PAGE:
        (folder / name).write_text((own / name).read_text(encoding="utf-8"), encoding="utf-8")
    for name, path in files.items():
        shutil.copyfile(path, folder / RUNTIME_FOLDER / name)
    if isinstance(bundle, PipelineBundle):
        pipeline_page.write(bundle, folder / MODEL_FOLDER)
    else:
        pixel_page.write(bundle, folder / MODEL_FOLDER)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
