"""What drawing with a whole pipeline takes of memory, known before any part of it is loaded.

A part takes the files of its engine, what the runtime has beside them, and the tensors of a call. Of these the widest
decide: in a transformer the inside of its feed-forward (rows are tokens), in an autoencoder the first convolution at
the picture's full size (rows are pixels). LIVE of them are there at once, of float32.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from export.errors import ResourceError
from pipeline import machine
from pipeline.backends import BACKENDS
from pipeline.bundle.bundle import Bundle
from pipeline.bundle.pipeline_bundle import PipelineBundle
from pipeline.generate.latent_model import ENCODED_AT_ONCE, LatentModel
from pipeline.generate.pipeline_classes import DECODER, ENCODER, TRANSFORMER

logger = logging.getLogger(__name__)
# Input, result, and what operators beside it hold of the widest tensor. docs/deployment.md has what it follows from: a
# decoder's memory at 1024 and at 512 pixels differs by 4.1 of them, a denoiser's with a sample more by 3.3.
LIVE = 4
FLOAT32_BYTES = 4
# Of onnxruntime and other libraries, once they are used; and of each part that is loaded, beside its weights: sessions,
# graphs, buffers. As measured with the bundled pipeline, of which they are the most.
LIBRARIES_BYTES, PART_BYTES = 32 * 2**20, 8 * 2**20
SAMPLES = 2  # of a picture, with guidance


@dataclass(frozen=True)
class PartMemory:
    """weights_bytes: of the files that an engine is loaded from. call_bytes: of the tensors of a call."""

    weights_bytes: int
    call_bytes: int

    @property
    def loaded_bytes(self) -> int:
        return self.weights_bytes + PART_BYTES


def part_memory(
    bundle: PipelineBundle, model: LatentModel, target: str = "auto", pictures: int = 1
) -> dict[str, PartMemory]:
    """Of every part of the bundle, of which `model` is made, where `pictures` are drawn at a time. target: of the
    denoiser, whose engine counts nothing where it is on a GPU."""
    samples, patch = SAMPLES * pictures, bundle.components[TRANSFORMER].config()["patch_size"]
    _, height, width = model.latent_shape
    rows = {encoder.component: min(samples, ENCODED_AT_ONCE) * encoder.tokens for encoder in model.row.encoders}
    rows[TRANSFORMER] = samples * (height // patch) * (width // patch)
    # One picture after the other, in tiles.
    pixels = min(model.height, model.tiles.pixels) * min(model.width, model.tiles.pixels)
    parts = {}
    for name, part in bundle.components.items():
        if name == TRANSFORMER and BACKENDS[part.choose(target)].needs_gpu:
            continue
        if name in (DECODER, ENCODER):
            numbers = pixels * max(part.config()["block_out_channels"][:2])
        else:
            numbers = rows[name] * _widest(part)
        weights = part.engine_bytes(target if name == TRANSFORMER else "auto")
        parts[name] = PartMemory(weights, LIVE * FLOAT32_BYTES * numbers)
    return parts


def _widest(part: Bundle) -> int:
    """Features of the widest linear, of those that are quantized: nothing wider is kept."""
    return max((max(layer["shape"]) for layer in part.manifest["layers"]), default=0)


def needed_bytes(parts: Mapping[str, PartMemory], keep_loaded: bool) -> int:
    """At most at a time: of the largest part, or of all of them and the largest call."""
    if keep_loaded:
        most = sum(part.loaded_bytes for part in parts.values()) + max(part.call_bytes for part in parts.values())
    else:
        most = max(part.loaded_bytes + part.call_bytes for part in parts.values())
    return LIBRARIES_BYTES + most


def refuse_too_large(bundle: PipelineBundle, model: LatentModel, target: str, pictures: int) -> None:
    """Say in a sentence, before anything is loaded, where memory is short: weights that do not fit raise ResourceError,
    and where calls may not fit beside them the log has a warning."""
    parts, free = part_memory(bundle, model, target, pictures), machine.free_memory()
    keep_loaded = model.components.keep_loaded
    needed, in_turn = needed_bytes(parts, keep_loaded), needed_bytes(parts, False)
    sizes = {name: part.loaded_bytes for name, part in parts.items()}
    weights = sum(sizes.values()) if keep_loaded else max(sizes.values())
    are_free = f"{_gib(free.size_bytes)} of memory are free{free.within}"
    logger.info("%s: drawing needs about %s, %s", bundle.name, _gib(needed), are_free)
    if keep_loaded:
        what = "all parts at once"
        how = "generate without --keep-loaded, serve with --no-keep-loaded"
        remedy = f"let them take turns ({how}), which needs about {_gib(in_turn)}"
    else:
        what = max(sizes, key=lambda name: sizes[name])
        remedy = f"{free.remedy}, or build that component with fewer bits"
    if weights > free.size_bytes:
        raise ResourceError(f"{bundle.name}: {what} of {_gib(weights)}, {are_free}; {remedy}")
    if needed > free.size_bytes:
        smaller = (
            remedy if keep_loaded else f"{free.remedy}, draw fewer pictures at a time, or build it for smaller ones"
        )
        logger.warning(
            "%s: drawing needs about %s, %s, so it may be slow or be ended by the system; %s",
            bundle.name, _gib(needed), are_free, smaller,
        )  # fmt: skip


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"
