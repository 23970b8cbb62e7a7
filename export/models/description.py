"""What is known of a model without its weights: family and configuration, hence inputs, sizes and samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.documents import read_json
from export.errors import RecipeError
from export.models.config import RULES
from export.models.families import Config, Family, Input, pixels_per_latent, shared_names
from export.models.rotary import BASE_PIXELS, rotary_tables

# A latent cell stands for 8 x 8 pixels in the VAEs of all latent families (four levels, three halvings).
LATENT_PIXELS = 8
GENERATION_FILE = "generation.json"
# Of a text encoder, which makes no picture.
NO_CELLS = (0, 0)
STEPS = 1000  # of training, that timesteps count
# Latents of an autoencoder, which takes any size, where none is asked for: what it does at a border and inside, and no
# side like the other.
USUAL_LATENTS = (16, 12)
Array = NDArray[np.float64] | NDArray[np.float32] | NDArray[np.int64] | NDArray[np.bool_]
Cells = tuple[int, int]
Shape = tuple[int, ...]


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
        """Image pixels per cell of `hidden_states`: 1 for a pixel-space model, 8 for a latent one; of an autoencoder
        per cell of its input."""
        if self.family.half is not None:
            return pixels_per_latent(self.config) if self.family.half == "decoder" else 1
        if self.family.recordings is not None:
            return self.family.recordings.pixels
        return pixels_per_cell(self.folder, self.config)

    @cached_property
    def tokens(self) -> int:
        """Length of a caption or prompt that the model's pipelines give it, within what it has positions for."""
        longest = self.family.longest(self.config)
        return self.family.tokens if longest is None else min(self.family.tokens, longest)

    def cells(self, height: int = 0, width: int = 0) -> tuple[int, int]:
        """Height and width of `hidden_states` for an image of that many pixels; 0 stands for the model's own size.

        NO_CELLS of a text encoder, of an autoencoder the cells of its input. Raises RecipeError for a size that the
        model cannot make.
        """
        if self.family.half is not None:
            return self._cells_of_half(height, width)
        if not self.family.steps:
            if height or width:
                raise RecipeError(
                    f"image size {height} x {width}: {self.source} is a text encoder and makes no picture"
                )
            return NO_CELLS
        if self.family.recordings is not None:
            return self.family.recordings.cells(height, width)
        own = self.config["sample_size"] * self.pixels_per_cell
        height, width = height or own, width or own
        unit = self.pixels_per_cell * self.config["patch_size"]
        if height % unit or width % unit or min(height, width) <= 0:
            raise RecipeError(f"image size {height} x {width}: {self.source} needs multiples of {unit} pixels")
        if self.family.square and height != width:
            raise RecipeError(f"image size {height} x {width}: {self.family.name} makes square images only")
        return height // self.pixels_per_cell, width // self.pixels_per_cell

    def _cells_of_half(self, height: int, width: int) -> Cells:
        unit = pixels_per_latent(self.config)
        height, width = height or USUAL_LATENTS[0] * unit, width or USUAL_LATENTS[1] * unit
        if height % unit or width % unit or min(height, width) <= 0:
            raise RecipeError(f"image size {height} x {width}: {self.source} needs multiples of {unit} pixels")
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

    height, width: image size in pixels, 0 for the model's own. tokens: caption length, 0 for the usual one. A text
    encoder's prompt ends with the token for that, if an output is its row.
    """
    cells = model.cells(height, width)
    sizes = {"batch": batch_size, "tokens": tokens or model.tokens, "height": cells[0], "width": cells[1]}
    if model.family.recordings is not None:
        sizes |= model.family.recordings.sizes(cells)
    elif model.family.steps:
        patch = model.config["patch_size"]
        sizes["patches"] = (cells[0] // patch) * (cells[1] // patch)
    arrays = {}
    for index, row in enumerate(model.inputs):
        shape = tuple(size if isinstance(size, int) else sizes[size] for size in row.shape)
        arrays[row.name] = np.asarray(
            _filled(row.fill, shape, np.random.default_rng([seed, index]), model, cells), row.dtype
        )
    end_prompts(model, arrays)
    return arrays


def end_prompts(model: Description, arrays: dict[str, NDArray[Any]]) -> None:
    """Put the end token of the model's prompts where their masks end, in place; nothing without such a token."""
    end, counted = model.family.end(model.config), model.family.counted
    if end is not None:
        assert counted is not None
        mask = arrays[counted].astype(bool)
        lasts = mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
        arrays[model.family.streamed][np.arange(len(mask)), lasts] = end


# --- what samples hold: a function for each kind of fill in the table of inputs --------------------------------------


def _filled(kind: str, shape: Shape, rng: np.random.Generator, model: Description, cells: Cells) -> Array:
    """An array of `shape` for the fill `kind` (some carry a number behind a colon)."""
    name, _, argument = kind.partition(":")
    if name in ("class", "ids"):
        return rng.integers(0, int(argument), shape)
    if name == "upto":
        return rng.uniform(0, float(argument), shape)
    if name == "timestep":
        return rng.integers(0, STEPS, shape) * (float(argument or STEPS) / STEPS)
    return FILL_FUNCTIONS[name](shape, rng, model, cells)


def _mask(shape: Shape, rng: np.random.Generator, *_: object) -> Array:
    """1 for the first tokens of each row, 0 after a random length of at least half."""
    lengths = rng.integers(-(-shape[1] // 2), shape[1] + 1, shape[0])
    return np.arange(shape[1])[None] < lengths[:, None]


def _image_size(shape: Shape, _: object, model: Description, cells: Cells) -> Array:
    """Rows of (height, width) in pixels, repeated for original and target size, then zeros for the crop offset."""
    size = [cells[0] * model.pixels_per_cell, cells[1] * model.pixels_per_cell]
    row = (size * 2 + [0, 0])[: shape[1]]
    return np.tile(np.array(row, np.float32), (shape[0], 1))


def _rotary(part: int) -> Callable[..., Array]:
    """Cosines (part 0) or sines (part 1) of two-dimensional rotary positions, [patches, head_dim]."""

    def table(shape: Shape, _: object, model: Description, cells: Cells) -> Array:
        patch = model.config["patch_size"]
        grid = (cells[0] // patch, cells[1] // patch)
        return rotary_tables(shape[1], grid, BASE_PIXELS // model.pixels_per_cell // patch)[part]

    return table


FILL_FUNCTIONS: dict[str, Callable[..., Array]] = {
    "normal": lambda shape, rng, *_: rng.standard_normal(shape),
    "mask": _mask,
    "zeros": lambda shape, *_: np.zeros(shape),
    "aspect": lambda shape, rng, model, cells: np.full(shape, cells[0] / cells[1]),
    "image_size": _image_size,
    "rotary_cos": _rotary(0),
    "rotary_sin": _rotary(1),
}
