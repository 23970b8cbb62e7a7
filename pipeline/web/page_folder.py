"""Writes the page: its files, onnxruntime-web, the model lowered to stock ops, and what drawing needs of the bundle."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from export.errors import RecipeError
from pipeline.backends import PORTABLE
from pipeline.backends.base import DATA, MODEL
from pipeline.generate.conditioning import Generation
from pipeline.generate.pixel_model import makes_pixels, picture_shape
from pipeline.generate.sampling import make_sampler
from pipeline.generate.scene_grammar import GRAMMAR
from pipeline.web import onnxruntime_web, ziggurat

if TYPE_CHECKING:
    from pipeline.bundle.bundle import Bundle

logger = logging.getLogger(__name__)

PAGE = ("index.html", "page.css", "page.js", "worker.js", "noise.js", "prompts.js", "sampler.js")
SETTINGS, EMBEDDING = "settings.json", "embedding.bin"
MODEL_FOLDER, RUNTIME_FOLDER = "model", "ort"
# What an export consists of, at the top of its folder.
ENTRIES = {*PAGE, MODEL_FOLDER, RUNTIME_FOLDER}


def refuse(bundle: Bundle) -> None:
    """Raise RecipeError for a bundle that the page cannot draw with."""
    if not makes_pixels(bundle):
        raise RecipeError(f"{bundle.path} draws no pixels by itself; the page takes models such as zoo:pixart_mini")
    if PORTABLE not in bundle.targets or MODEL not in bundle.manifest["files"]:
        raise RecipeError(f"{bundle.path} has no portable model, which the page runs; build it without --drop-portable")
    with bundle.generation() as generation:
        kind = generation.conditioning["kind"]
        if kind != "vocabulary":
            raise RecipeError(f"{bundle.path}: its prompts are {kind}; the page knows those of a vocabulary alone")
        make_sampler(generation.sampler, 1)


def write(bundle: Bundle, folder: Path, runtime: Path | None) -> int:
    """Write all files into a new folder; returns their bytes. runtime: as `onnxruntime_web.find` takes it.

    Raises RecipeError for a bundle that the page cannot draw with, EnvironmentLacksError without onnxruntime-web.
    """
    refuse(bundle)
    files = onnxruntime_web.find(runtime)
    for name in (MODEL_FOLDER, RUNTIME_FOLDER):
        (folder / name).mkdir(parents=True)
    own = resources.files("pipeline.web") / "page"
    for name in PAGE:
        (folder / name).write_text((own / name).read_text(encoding="utf-8"), encoding="utf-8")
    for name, path in files.items():
        shutil.copyfile(path, folder / RUNTIME_FOLDER / name)
    lower(bundle, folder / MODEL_FOLDER)
    with bundle.generation() as generation:
        document = settings(bundle, generation)
        assert generation.table is not None
        generation.table.astype("<f4").tofile(folder / MODEL_FOLDER / EMBEDDING)
    (folder / MODEL_FOLDER / SETTINGS).write_text(json.dumps(document), encoding="utf-8")
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def lower(bundle: Bundle, folder: Path) -> None:
    """The portable model in stock ops, with integer GEMMs that are exact wherever pairs of products are summed in 16
    bits. It runs several times as fast as the portable one."""
    from pipeline.backends.cpu import CpuOptions, build

    with bundle.copied({MODEL, DATA}.__contains__) as private, tempfile.TemporaryDirectory(dir=folder) as work:
        build.lower(private.path / MODEL, Path(work), CpuOptions(path="stock"), frozenset())
        for name in (MODEL, DATA):
            (Path(work) / name).rename(folder / name)


def settings(bundle: Bundle, generation: Generation) -> dict[str, object]:
    """What the page's scripts read."""
    channels, height, width = picture_shape(bundle)
    conditioning, table = generation.conditioning, generation.table
    assert conditioning["kind"] == "vocabulary" and table is not None
    return {
        "name": bundle.name,
        "picture": {"channels": channels, "height": height, "width": width},
        "sampler": generation.sampler,
        "timestep_scale": generation.timestep_scale,
        "n_steps": generation.n_steps,
        "guidance_scale": generation.guidance_scale,
        "conditioning": {
            "slots": conditioning["slots"],
            "null_token": conditioning["null_token"],
            "grammar": GRAMMAR,
            "examples": conditioning.get("examples", []),
            "width": table.shape[1],
        },
        "ziggurat": ziggurat.tables(),
    }
