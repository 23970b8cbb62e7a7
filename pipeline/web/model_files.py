"""A bundle's model as the page runs it: the portable one, lowered to stock ops."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from export.errors import RecipeError
from pipeline.backends import PORTABLE
from pipeline.backends.base import DATA, MODEL
from pipeline.generate.conditioning import MOST_GUIDANCE
from pipeline.recipe import MOST_STEPS

if TYPE_CHECKING:
    from pipeline.bundle.bundle import Bundle

# What lies in the export's folder of these names, beside models.
SETTINGS, EMBEDDING = "settings.json", "embedding.bin"
# Of a model's files: a browser's WebAssembly has 4 GiB of memory, and weights are there twice while it is opened.
MOST_BYTES = 2 * 2**30
# What may be asked of a page, as of `generate`.
MOST = {"n_steps": MOST_STEPS, "guidance_scale": MOST_GUIDANCE}


def refuse_model(bundle: Bundle) -> None:
    """Raise RecipeError for a bundle whose model the page cannot open."""
    files = bundle.manifest["files"]
    if PORTABLE not in bundle.targets or MODEL not in files:
        raise RecipeError(f"{bundle.path} has no portable model, which the page runs; build it without --drop-portable")
    if (size := expected_bytes(bundle)) > MOST_BYTES:
        raise RecipeError(
            f"{bundle.path} takes {size / 2**30:.1f} GiB in the browser, whose WebAssembly opens models of at most "
            f"{MOST_BYTES / 2**30:.0f} GiB; use a smaller model"
        )


def expected_bytes(bundle: Bundle) -> int:
    """About the size of the lowered model: what is packed in the portable one takes a byte for each weight."""
    stored = sum(bundle.manifest["files"][name]["size"] for name in (MODEL, DATA) if name in bundle.manifest["files"])
    layers = bundle.manifest["layers"]
    return stored + sum(row["shape"][0] * row["shape"][1] - row["size_bytes"] for row in layers)


def lower(bundle: Bundle, folder: Path) -> int:
    """Write model.onnx and model.onnx.data into `folder`; returns their bytes. GEMMs are of integers, exact wherever
    pairs of products are summed in 16 bits, and run several times as fast as the portable model's."""
    from pipeline.backends.cpu import CpuOptions, build

    quantized = bundle.recipe.half is None  # an autoencoder's half has no quantized linear
    with bundle.copied({MODEL, DATA}.__contains__) as private, tempfile.TemporaryDirectory(dir=folder) as work:
        build.lower(private.path / MODEL, Path(work), CpuOptions(path="stock"), frozenset(), quantized)
        for name in (MODEL, DATA):
            (Path(work) / name).rename(folder / name)
    return sum((folder / name).stat().st_size for name in (MODEL, DATA))
