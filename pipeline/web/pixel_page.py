"""What the page needs of a bundle that draws pixels of prompts by a vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from export.errors import RecipeError
from pipeline.generate.conditioning import Generation
from pipeline.generate.pixel_model import makes_pixels, picture_shape
from pipeline.generate.sampling import make_sampler
from pipeline.generate.scene_grammar import GRAMMAR
from pipeline.web import ziggurat
from pipeline.web.model_files import EMBEDDING, MOST, SETTINGS, lower, refuse_model

if TYPE_CHECKING:
    from pipeline.bundle.bundle import Bundle


def refuse(bundle: Bundle) -> None:
    """Raise RecipeError for a bundle that the page cannot draw with."""
    if not makes_pixels(bundle):
        raise RecipeError(
            f"{bundle.path} draws no pixels by itself; the page takes models such as zoo:pixart_mini, and whole "
            "pipelines"
        )
    refuse_model(bundle)
    with bundle.generation() as generation:
        kind = generation.conditioning["kind"]
        if kind != "vocabulary":
            raise RecipeError(f"{bundle.path}: its prompts are {kind}; the page knows those of a vocabulary alone")
        make_sampler(generation.sampler, 1)


def write(bundle: Bundle, folder: Path) -> None:
    """Write the model, its embedding and settings into an empty folder."""
    lower(bundle, folder)
    with bundle.generation() as generation:
        document = settings(bundle, generation)
        assert generation.table is not None
        generation.table.astype("<f4").tofile(folder / EMBEDDING)
    (folder / SETTINGS).write_text(json.dumps(document), encoding="utf-8")


def settings(bundle: Bundle, generation: Generation) -> dict[str, object]:
    """What the page's scripts read."""
    channels, height, width = picture_shape(bundle)
    conditioning, table = generation.conditioning, generation.table
    assert conditioning["kind"] == "vocabulary" and table is not None
    return {
        "kind": "pixels",
        "name": bundle.name,
        "hint": GRAMMAR,
        "examples": conditioning.get("examples", []),
        "takes_negative": False,
        "picture": {"channels": channels, "height": height, "width": width},
        "sampler": generation.sampler,
        "timestep_scale": generation.timestep_scale,
        "n_steps": generation.n_steps,
        "guidance_scale": generation.guidance_scale,
        "most": MOST,
        "conditioning": {
            "slots": conditioning["slots"],
            "null_token": conditioning["null_token"],
            "grammar": GRAMMAR,
            "width": table.shape[1],
        },
        "ziggurat": ziggurat.tables(),
    }
