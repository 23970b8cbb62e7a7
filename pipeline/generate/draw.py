"""What can be asked of a pixel model, and a batch of its pictures on the way: NumPy and an engine alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from export.documents import shown
from export.errors import ContractError, RecipeError
from pipeline.generate.conditioning import GENERATION_FILE
from pipeline.generate.sampling import FloatArray, Trajectory
from pipeline.recipe import MOST_SEED, MOST_STEPS

if TYPE_CHECKING:
    from pipeline.bundle.bundle import Bundle

# Pictures drawn at a time: with guidance a batch of 8, the largest that every engine is built for.
BATCH_SIZE = 4
# Of one request, so that a slip of the finger is refused at once; MOST_STEPS and MOST_SEED are a recipe's.
MOST_PICTURES = 4096
Pictures = NDArray[np.uint8]


@dataclass(frozen=True)
class Picture:
    """One picture to draw. negative_prompt: what guidance leads away from; None: the empty prompt."""

    prompt: str
    seed: int
    negative_prompt: str | None = None


@dataclass(frozen=True)
class DrawRequest:
    """What to draw: `num_images` pictures of every prompt, with the seeds `seed`, `seed` + 1, ...

    negative_prompts: one for each prompt, None for the empty one; () for empty ones alone. n_steps and guidance_scale
    None stand for the model's own. Raises RecipeError for what no engine can draw.
    """

    prompts: tuple[str, ...]
    seed: int = 0
    num_images: int = 1
    n_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompts: tuple[str | None, ...] = ()

    def __post_init__(self) -> None:
        _check_whole("number of pictures of a prompt", self.num_images, 1, MOST_PICTURES)
        _check_whole("seed", self.seed, 0, MOST_SEED - 1)
        _check_whole("seed of the last picture", self.seed + self.num_images - 1, 0, MOST_SEED - 1)
        if self.n_steps is not None:
            _check_whole("number of denoising steps", self.n_steps, 1, MOST_STEPS)
        if self.num_images * len(self.prompts) > MOST_PICTURES:
            asked = f"{len(self.prompts)} x {self.num_images}"
            raise RecipeError(f"{asked} pictures in one request; ask for at most {MOST_PICTURES} at a time")
        self._check_guidance()
        for prompt in (*self.prompts, *self.negative_prompts):
            if prompt is not None and not isinstance(prompt, str):
                raise RecipeError(f"prompt {shown(prompt)} is no text; give a sentence")
            if any("\ud800" <= character <= "\udfff" for character in prompt or ""):
                raise RecipeError(f"prompt {prompt!r} is not text in the terminal's encoding; use UTF-8")
        if len(self.negative_prompts) not in (0, len(self.prompts)):
            counts = f"{len(self.negative_prompts)} negative prompts for {len(self.prompts)} prompts"
            raise RecipeError(f"{counts}; give one, or one for each")

    def _check_guidance(self) -> None:
        scale = self.guidance_scale
        if scale is None:
            return
        if isinstance(scale, bool) or not isinstance(scale, int | float | np.number) or not math.isfinite(scale):
            raise RecipeError(f"guidance scale {shown(scale)} is not a number; give one such as 4.5")
        if scale == 1 and any(self.negative_prompts):
            raise RecipeError("a negative prompt has no effect at a guidance scale of 1; leave one of them away")

    @property
    def pictures(self) -> list[Picture]:
        """Every picture, prompt by prompt."""
        negative = self.negative_prompts or (None,) * len(self.prompts)
        return [
            Picture(prompt, self.seed + index, without)
            for prompt, without in zip(self.prompts, negative, strict=True)
            for index in range(self.num_images)
        ]


def _check_whole(what: str, value: object, least: int, most: int) -> None:
    """Raise RecipeError unless `value` is a whole number within the bounds."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value <= most:
        raise RecipeError(f"{what} {shown(value)}; it must be a whole number from {least} to {most}")


class Drawing:
    """A batch of pictures on its way from noise; each `step` is one call of the engine.

    pictures: what is drawn, row by row.
    """

    def __init__(self, pictures: Sequence[Picture], trajectory: Trajectory) -> None:
        self.pictures, self.trajectory = list(pictures), trajectory
        self._interrupt = False  # under this name callbacks of diffusers pipelines set it

    @property
    def n_steps(self) -> int:
        """All there are."""
        return self.trajectory.sampler.n_steps

    @property
    def steps_done(self) -> int:
        return self.trajectory.index

    @property
    def is_interrupted(self) -> bool:
        return self._interrupt

    @property
    def is_over(self) -> bool:
        """Whether no step is left, or wanted."""
        return self._interrupt or self.steps_done == self.n_steps

    @property
    def latents(self) -> FloatArray:
        """What the sampler works on, [B, C, H, W] float32."""
        return self.trajectory.latents

    def step(self) -> None:
        """The next step of every picture."""
        self.trajectory.step()

    def replace(self, latents: FloatArray) -> None:
        """Go on with other latents. Raises RecipeError unless they are as the ones that they replace."""
        mine = self.latents
        if not isinstance(latents, np.ndarray) or (latents.shape, latents.dtype) != (mine.shape, mine.dtype):
            kind = f"{latents.dtype} {latents.shape}" if isinstance(latents, np.ndarray) else type(latents).__name__
            raise RecipeError(f"latents of {kind}; the batch goes on with {mine.dtype} {mine.shape} alone")
        self.trajectory.latents = latents

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these pictures alone."""
        self.pictures = [self.pictures[row] for row in rows]
        self.trajectory.keep(rows)

    def interrupt(self) -> None:
        """Make no further step; the pictures stay as they are by then."""
        self._interrupt = True

    def previews(self) -> Pictures:
        """What the model takes the pictures to become, [B, H, W, C] uint8, after at least one step."""
        return to_pixels(self._estimate())

    def preview(self, row: int) -> Pictures:
        """That of one picture, [H, W, C] uint8."""
        return to_pixels(self._estimate()[row : row + 1])[0]

    def _estimate(self) -> FloatArray:
        if self.trajectory.estimate is None:
            raise RecipeError("no step has been made yet; previews exist from the first one on")
        return self.trajectory.estimate

    def result(self) -> Pictures:
        """The pictures as they are by now, [B, H, W, C] uint8. Raises ContractError for NaN: the engine is broken."""
        return to_pixels(self.latents)

    def picture(self, row: int) -> Pictures:
        """One of them, [H, W, C] uint8; NaN in another is no matter."""
        return to_pixels(self.latents[row : row + 1])[0]


def noise_of(pictures: Sequence[Picture], shape: tuple[int, int, int]) -> FloatArray:
    """What they begin with, [B, *shape] float32: each by its own seed, whatever is drawn beside it."""
    drawn = [np.random.default_rng(picture.seed).standard_normal(shape) for picture in pictures]
    return np.stack(drawn).astype(np.float32)


def picture_shape(bundle: Bundle) -> tuple[int, int, int]:
    """Channels, height and width that the engine of a pixel model was made for."""
    config, size = bundle.config(), bundle.recipe.sampling
    own = config["sample_size"]
    return config["in_channels"], size.height or own, size.width or own


def to_floats(images: FloatArray) -> FloatArray:
    """[B, C, H, W] in [-1, 1] -> [B, H, W, C] from 0 to 1. Raises ContractError for NaN: the engine is broken."""
    return (_clipped(images) / np.float32(2)).transpose(0, 2, 3, 1)


def to_pixels(images: FloatArray) -> Pictures:
    """[B, C, H, W] in [-1, 1] -> [B, H, W, C] uint8, rounded. Raises ContractError for NaN: the engine is broken."""
    return np.rint(_clipped(images) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)


def _clipped(images: FloatArray) -> FloatArray:
    """From 0 to 2."""
    if not np.isfinite(images).all():
        raise ContractError("the engine's picture has NaN or Inf; verify the bundle, and build it again if that fails")
    return np.clip(images, -1, 1) + 1


def makes_pixels(bundle: Bundle) -> bool:
    """Whether the bundle describes how it makes pictures, and its engine makes them without a VAE."""
    if GENERATION_FILE not in bundle.manifest["files"]:
        return False
    with bundle.generation() as generation:
        return generation.output == "pixels"
