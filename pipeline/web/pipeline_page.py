"""What the page needs of a whole pipeline: its parts, its tokenizer, its scheduler, and what its class knows."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from export.errors import ModelError, RecipeError
from pipeline.backends import PORTABLE
from pipeline.bundle.pipeline_bundle import PipelineBundle
from pipeline.generate.components import PipelineSource
from pipeline.generate.latent_model import LatentModel
from pipeline.generate.pipeline_classes import PipelineClass, TextEncoder, find_pipeline_class
from pipeline.generate.tokenizer import TOKENIZER_FILE, plain_caption
from pipeline.web import page_schedulers, tokenizer_rules, ziggurat
from pipeline.web.model_files import MOST, SETTINGS, lower, refuse_model

logger = logging.getLogger(__name__)

# All parts together: above it they are loaded and let go in turn, as a browser's tab has some gigabytes at most.
KEPT_BYTES = 512 * 2**20


def refuse(bundle: PipelineBundle) -> None:
    """Raise RecipeError or ModelError for a pipeline that the page cannot draw with, by what it does not know."""
    row = find_pipeline_class(bundle.class_name, str(bundle.path))
    if row.classes is not None:
        raise RecipeError(f"{bundle.path}: {row.name} draws numbers of classes; the page draws with prompts in words")
    if len(row.encoders) != 1:
        names = ", ".join(encoder.component for encoder in row.encoders)
        raise RecipeError(
            f"{bundle.path}: {row.name} has {len(row.encoders)} text encoders ({names}); the page draws with one"
        )
    for name in row.components:
        if name not in bundle.components:
            raise ModelError(f"{bundle.path}: {row.name} draws with {name}, which it lacks; build that component too")
        refuse_model(bundle.components[name])
    with bundle.source(PORTABLE) as source:
        refuse_source(source, str(bundle.path))


def refuse_source(source: PipelineSource, path: str) -> None:
    """As `refuse`, of tokenizer, scheduler and size. path: of the bundle, for messages."""
    row, model = find_pipeline_class(source.class_name, path), LatentModel(source)
    tokenizer_rules.refuse_tokenizer(source.tokenizers[_encoder(row).tokenizer], path)
    page_schedulers.scheduler_settings(model.scheduler, path)
    if max(model.latent_shape[1:]) > model.tiles.latents:
        raise RecipeError(
            f"{path}: pictures of {model.height} x {model.width} are decoded in tiles of {model.tiles.pixels}; the "
            "page decodes them whole, build it for at most that many pixels a side"
        )


def write(bundle: PipelineBundle, folder: Path) -> None:
    """Write parts, tokenizer and settings into an empty folder."""
    row, sizes = find_pipeline_class(bundle.class_name, str(bundle.path)), dict[str, int]()
    for name in row.components:
        (folder / name).mkdir()
        sizes[name] = lower(bundle.components[name], folder / name)
    if others := bundle.components.keys() - set(row.components):
        logger.info(
            "%s: left out of the page, which draws from noise alone: %s", bundle.name, ", ".join(sorted(others))
        )
    with bundle.source(PORTABLE) as source:
        shutil.copyfile(source.tokenizers[_encoder(row).tokenizer], folder / TOKENIZER_FILE)
        document = settings(source, row, sizes)
    (folder / SETTINGS).write_text(json.dumps(document, allow_nan=False), encoding="utf-8")


def settings(source: PipelineSource, row: PipelineClass, sizes: dict[str, int]) -> dict[str, object]:
    """What the page's scripts read. sizes: bytes of the parts' files."""
    encoder, model = _encoder(row), LatentModel(source)
    dtypes = {given.name: given.dtype for given in model.inputs}
    total, kept = sum(sizes.values()), sum(sizes.values()) <= KEPT_BYTES
    parts = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in sizes.items())
    channels, height, width = model.latent_shape
    return {
        "kind": "pipeline",
        "name": source.name,
        "hint": f"{total / 1e6:.1f} MB are loaded for {'the first' if kept else 'every'} picture: {parts}.",
        "examples": model.examples,
        "takes_negative": True,
        "picture": {"channels": model.channels, "height": model.height, "width": model.width},
        "latent": {
            "channels": channels,
            "height": height,
            "width": width,
            "factor": float(model.factor),
            "shift": float(model.shift),
        },
        "n_steps": model.n_steps,
        "guidance_scale": model.guidance_scale,
        "most": MOST,
        "scheduler": page_schedulers.scheduler_settings(model.scheduler, source.name),
        "prompt": {
            "plain": row.prepare is plain_caption,
            "tokens": model.tokenizers[encoder.component].max_length,
            "component": encoder.component,
            "states": encoder.states,
            "mask": encoder.mask,
        },
        "inputs": dtypes,
        "conditions": {
            name: {"dims": value.shape, "values": value.ravel().tolist(), "shared": name in model.shared}
            for name, value in model.conditions.items()
            if name in dtypes
        },
        "parts": sizes,
        "keep_loaded": kept,
        "ziggurat": ziggurat.tables(),
    }


def _encoder(row: PipelineClass) -> TextEncoder:
    """The one that `refuse` has seen."""
    [encoder] = row.encoders
    return encoder
