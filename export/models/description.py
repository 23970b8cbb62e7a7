"""What is known of a denoiser without its weights: its family and configuration, hence its inputs and sizes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.documents import read_json
from export.errors import RecipeError
from export.models.config import RULES
from export.models.families import Config, Family, Input, shared_names
from export.models.samples import fill

# A latent cell stands for 8 x 8 pixels in the VAEs of all latent families (four levels, three halvings).
LATENT_PIXELS = 8
GENERATION_FILE = "generation.json"


@dataclass(frozen=True)
class Description:
    """folder: of a model or a bundle, with its generation.json if it has one. source: its name, for messages."""

    family: Family
    config: Config
    folder: Path
    source: str

    @cached_property
    def inputs(self) -> tuple[Input, ...]:
        """The family's input table for this configuration."""
        return self.family.inputs(self.config)

    @cached_property
    def shared(self) -> frozenset[str]:
        """Names of the inputs that have no batch axis."""
        return shared_names(self.inputs)

    @cached_property
    def pixels_per_cell(self) -> int:
        """Image pixels per cell of `hidden_states`: 1 for a pixel-space model, 8 for a latent one."""
        return pixels_per_cell(self.folder, self.config)

    def cells(self, height: int = 0, width: int = 0) -> tuple[int, int]:
        """Height and width of `hidden_states` for an image of that many pixels; 0 stands for the model's own size."""
        own = self.config["sample_size"] * self.pixels_per_cell
        height, width = height or own, width or own
        unit = self.pixels_per_cell * self.config["patch_size"]
        if height % unit or width % unit or min(height, width) <= 0:
            raise RecipeError(f"image size {height} x {width}: {self.source} needs multiples of {unit} pixels")
        if self.family.square and height != width:
            raise RecipeError(f"image size {height} x {width}: {self.family.name} makes square images only")
        return height // self.pixels_per_cell, width // self.pixels_per_cell


def pixels_per_cell(folder: Path, config: Config) -> int:
    """As the property of a loaded model, for the folder and the configuration of a model or a bundle."""
    generation = folder / GENERATION_FILE
    stated = read_json(generation, dict[str, object], RULES).get("output") if generation.is_file() else ""
    return 1 if stated == "pixels" or config["in_channels"] <= 3 else LATENT_PIXELS


def sample_inputs(
    model: Description, batch_size: int, seed: int, height: int = 0, width: int = 0, tokens: int = 0
) -> dict[str, NDArray[Any]]:
    """Random inputs of the right shapes and types, the same for the same arguments.

    height, width: image size in pixels, 0 for the model's own. tokens: caption length, 0 for the family's usual one.
    """
    cells = model.cells(height, width)
    patches = (cells[0] // model.config["patch_size"]) * (cells[1] // model.config["patch_size"])
    sizes = {"batch": batch_size, "tokens": tokens or model.family.tokens, "height": cells[0], "width": cells[1]}
    sizes |= {"patches": patches}
    arrays = {}
    for index, row in enumerate(model.inputs):
        shape = tuple(size if isinstance(size, int) else sizes[size] for size in row.shape)
        arrays[row.name] = np.asarray(
            fill(row.fill, shape, np.random.default_rng([seed, index]), model, cells), row.dtype
        )
    return arrays
