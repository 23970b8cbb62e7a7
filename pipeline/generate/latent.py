"""Drawing with a latent model: the diffusers pipeline it belongs to, with the engine as its transformer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.errors import EnvironmentLacksError, RecipeError
from export.models.config import OLDER_CLASS
from export.models.families import FAMILIES, Config
from pipeline import machine
from pipeline.generate.draw import BATCH_SIZE, DrawRequest, Pictures
from pipeline.generate.pipeline_folder import INDEX, drawing, open_pipeline, pipeline_arguments, read_index

if TYPE_CHECKING:
    from pipeline.bundle.bundle import Bundle


def draw_latent(bundle: Bundle, request: DrawRequest, source: str | None = None, target: str = "auto") -> Pictures:
    """Pictures [prompts * num_images, H, W, 3] uint8; `source` names the pipeline if it is not the model's own."""
    if request.negative_prompts:
        raise RecipeError("a latent model's negative prompt is given to its own diffusers pipeline; leave it away here")
    machine.require(("torch", "diffusers", "transformers"), "drawing with a latent model", "build")
    root = find_pipeline(source or str(bundle.manifest["model"]["source"]))  # refuse before the slow imports
    family = str(bundle.manifest["model"]["family"])
    _refuse_other_class(root, family, bundle.config())
    import torch

    transformer = bundle.as_diffusers(target)
    try:
        pipeline = open_pipeline(Path(root), transformer)
        settings: dict[str, float] = {"num_inference_steps": request.n_steps} if request.n_steps else {}
        if request.guidance_scale is not None:  # 0 is one
            settings["guidance_scale"] = request.guidance_scale
        drawn = []
        for first in range(0, len(request.pictures), BATCH_SIZE):
            part = request.pictures[first : first + BATCH_SIZE]
            generators = [torch.Generator().manual_seed(picture.seed) for picture in part]
            named = pipeline_arguments(pipeline, bundle.recipe.sampling, [picture.prompt for picture in part])
            with drawing(Path(root)):
                images = pipeline(**named, generator=generators, output_type="np", **settings).images
            drawn.append(np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8))
    finally:
        transformer.engine.close()
    return np.concatenate(drawn)


def _refuse_other_class(root: str, family: str, config: Config) -> None:
    """Raise RecipeError if the pipeline's transformer is of another class than the engine's model.

    ModelError for an index that cannot be read.
    """
    row = read_index(Path(root) / INDEX).get("transformer")
    known = FAMILIES[family].class_name if family in FAMILIES else str(config["_class_name"])
    class_name = row[1] if isinstance(row, list) and len(row) == 2 else None
    if class_name not in (known, OLDER_CLASS):
        rule = f"the engine is one of {known}"
        raise RecipeError(f"{root}: its transformer is {class_name or 'absent'}, {rule}; give the pipeline it is from")


def find_pipeline(source: str) -> str:
    """The folder or hub id of the diffusers pipeline that `source` (a pipeline or its transformer folder) means."""
    folder = Path(source).expanduser()
    for candidate in (folder, folder.parent):
        if (candidate / INDEX).is_file():
            return str(candidate)
    if folder.exists() or ":" in source:
        raise EnvironmentLacksError(
            f"{source} is a transformer alone: its text encoder and VAE are needed to draw; "
            "name their pipeline with --pipeline DIR, or use load(BUNDLE).as_diffusers() in your own"
        )
    return _from_cache(source)


def _from_cache(repository: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    name, _, revision = repository.partition("@")
    try:
        return str(snapshot_download(name, revision=revision or None, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise EnvironmentLacksError(
            f"pipeline {repository} is not in the local cache; run: hf download {name}; or give --pipeline DIR"
        ) from error
