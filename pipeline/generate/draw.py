"""What can be asked of a model that draws, and a batch of its pictures on the way: NumPy and engines alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray

from export.documents import shown
from export.errors import ContractError, RecipeError
from pipeline.generate.conditioning import MOST_GUIDANCE
from pipeline.generate.sampling import FloatArray, Trajectory
from pipeline.generate.schedulers.base import SeededNoise
from pipeline.recipe import MOST_SEED, MOST_STEPS

# Pictures drawn at a time: with guidance a batch of 8, the largest that every engine is built for.
BATCH_SIZE = 4
# Of one request, so that a slip of the finger is refused at once; MOST_STEPS and MOST_SEED are a recipe's.
MOST_PICTURES = 4096
Pictures = NDArray[np.uint8]


@dataclass(frozen=True)
class Picture:
    """One picture to draw. negative_prompt: what guidance leads away from; None: the empty prompt.

    image: what image-to-image begins with, [C, H, W] float32 from -1 to 1; None: noise alone. noise: [C, h, w] float32
    of what the sampler works on, to begin with in the place of the seed's.
    """

    prompt: str
    seed: int
    negative_prompt: str | None = None
    image: FloatArray | None = field(default=None, compare=False)
    noise: FloatArray | None = field(default=None, compare=False)


@dataclass(frozen=True)
class DrawRequest:
    """What to draw: `num_images` pictures of every prompt, with the seeds `seed`, `seed` + 1, ...

    negative_prompts: one for each prompt, None for the empty one; () for empty ones alone. n_steps and guidance_scale
    None stand for the model's own. images: of image-to-image, one for each prompt or one for all; strength: the share
    of steps that they are changed by. noise: one for each picture, or () for that of the seeds. Both as of Picture.
    Raises RecipeError for what no engine can draw.
    """

    prompts: tuple[str, ...]
    seed: int = 0
    num_images: int = 1
    n_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompts: tuple[str | None, ...] = ()
    images: tuple[FloatArray, ...] = field(default=(), compare=False)
    strength: float = 1.0
    noise: tuple[FloatArray, ...] = field(default=(), compare=False)

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
        if not _is_number(self.strength):
            raise RecipeError(f"strength {shown(self.strength)} is not a number; give one such as 0.8")
        for prompt in (*self.prompts, *self.negative_prompts):
            if prompt is not None and not isinstance(prompt, str):
                raise RecipeError(f"prompt {shown(prompt)} is no text; give a sentence")
            if any("\ud800" <= character <= "\udfff" for character in prompt or ""):
                raise RecipeError(f"prompt {prompt!r} is not text in the terminal's encoding; use UTF-8")
        if len(self.negative_prompts) not in (0, len(self.prompts)):
            counts = f"{len(self.negative_prompts)} negative prompts for {len(self.prompts)} prompts"
            raise RecipeError(f"{counts}; give one, or one for each")
        if len(self.images) not in (0, 1, len(self.prompts)):
            counts = f"{len(self.images)} images for {len(self.prompts)} prompts"
            raise RecipeError(f"{counts}; give one, or one for each")
        if len(self.noise) not in (0, self.num_images * len(self.prompts)):
            counts = f"latents of {len(self.noise)} pictures for {self.num_images * len(self.prompts)}"
            raise RecipeError(f"{counts}; give one for each")

    def _check_guidance(self) -> None:
        scale = self.guidance_scale
        if scale is None:
            return
        if not _is_number(scale):
            raise RecipeError(f"guidance scale {shown(scale)} is not a number; give one such as 4.5")
        if not abs(scale) <= MOST_GUIDANCE:
            raise RecipeError(f"guidance scale {scale:g}; it must be from {-MOST_GUIDANCE:g} to {MOST_GUIDANCE:g}")
        if scale == 1 and any(self.negative_prompts):
            raise RecipeError("a negative prompt has no effect at a guidance scale of 1; leave one of them away")

    def refuse_noise(self, shape: tuple[int, int, int]) -> None:
        """Raise RecipeError for noise of another shape than a model draws from."""
        for own in self.noise:
            if own.shape != shape:
                raise RecipeError(f"latents of {own.shape} for a picture; this model draws from {shape}")

    @property
    def pictures(self) -> list[Picture]:
        """Every picture, prompt by prompt."""
        count = len(self.prompts)
        negative = self.negative_prompts or (None,) * count
        images = self.images * count if len(self.images) == 1 else self.images or (None,) * count
        noise = self.noise or (None,) * (count * self.num_images)
        return [
            Picture(prompt, self.seed + index, without, image, noise[row * self.num_images + index])
            for row, (prompt, without, image) in enumerate(zip(self.prompts, negative, images, strict=True))
            for index in range(self.num_images)
        ]


def _is_number(value: object) -> TypeGuard[float]:
    """Is it a real number that a float holds?"""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond them
        return False


def _check_whole(what: str, value: object, least: int, most: int) -> None:
    """Raise RecipeError unless `value` is a whole number within the bounds."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value <= most:
        raise RecipeError(f"{what} {shown(value)}; it must be a whole number from {least} to {most}")


def _as_it_is(latents: FloatArray) -> FloatArray:
    """Of a pixel model: what the sampler works on is the picture."""
    return latents


class Drawing:
    """A batch of pictures on its way from noise; each `step` is one call of the denoiser.

    pictures: what is drawn, row by row. decode: what the sampler works on, [B, C, h, w] -> pictures [B, C, H, W] from
    -1 to 1; look: the same, roughly and at once, of what is not done yet. seconds: what each part of the model has
    taken for these pictures, by its name.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        trajectory: Trajectory,
        seconds: Mapping[str, float],
        decode: Callable[[FloatArray], FloatArray] = _as_it_is,
        look: Callable[[FloatArray], FloatArray] = _as_it_is,
    ) -> None:
        self.pictures, self.trajectory, self.seconds = list(pictures), trajectory, seconds
        self.decode, self.look = decode, look
        self._interrupt = False  # under this name callbacks of diffusers pipelines set it
        self._decoded: FloatArray | None = None

    @property
    def n_steps(self) -> int:
        """All that are made: calls of the denoiser."""
        return len(self.trajectory.sampler.timesteps) - self.trajectory.first

    @property
    def steps_done(self) -> int:
        return self.trajectory.index - self.trajectory.first

    @property
    def timestep(self) -> float:
        """Of the step that comes next."""
        return float(self.trajectory.sampler.timesteps[self.trajectory.index])

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
        """The next step of every picture. Raises RecipeError where none is left."""
        if self.steps_done == self.n_steps:
            raise RecipeError(f"all {self.n_steps} steps are done; no further one can be made")
        self._decoded = None
        self.trajectory.step()

    def replace(self, latents: FloatArray) -> None:
        """Go on with other latents. Raises RecipeError unless they are as the ones that they replace."""
        mine = self.latents
        if not isinstance(latents, np.ndarray) or (latents.shape, latents.dtype) != (mine.shape, mine.dtype):
            kind = f"{latents.dtype} {latents.shape}" if isinstance(latents, np.ndarray) else type(latents).__name__
            raise RecipeError(f"latents of {kind}; the batch goes on with {mine.dtype} {mine.shape} alone")
        if not np.isfinite(latents).all():
            raise RecipeError("latents with NaN or Inf; the batch goes on with finite numbers alone")
        self._decoded = None
        self.trajectory.latents = latents

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these pictures alone."""
        self.pictures = [self.pictures[row] for row in rows]
        self._decoded = None if self._decoded is None else self._decoded[list(rows)]
        self.trajectory.keep(rows)

    def interrupt(self) -> None:
        """Make no further step; the pictures stay as they are by then."""
        self._interrupt = True

    def previews(self) -> Pictures:
        """What the model takes the pictures to become, [B, H, W, C] uint8, after at least one step."""
        return to_pixels(self.look(self._estimate()))

    def preview(self, row: int) -> Pictures:
        """That of one picture, [H, W, C] uint8."""
        return to_pixels(self.look(self._estimate()[row : row + 1]))[0]

    def _estimate(self) -> FloatArray:
        if self.trajectory.estimate is None:
            raise RecipeError("no step has been made yet; previews exist from the first one on")
        return self.trajectory.estimate

    @property
    def decoded(self) -> FloatArray:
        """The pictures as they are by now, [B, C, H, W] float32, about from -1 to 1."""
        if self._decoded is None:
            self._decoded = self.decode(self.latents)
        return self._decoded

    def result(self) -> Pictures:
        """The pictures as they are by now, [B, H, W, C] uint8. Raises ContractError for NaN: the engine is broken."""
        return to_pixels(self.decoded)

    def picture(self, row: int) -> Pictures:
        """One of them, [H, W, C] uint8; NaN in another is no matter."""
        return to_pixels(self.decoded[row : row + 1])[0]


def first_noise(pictures: Sequence[Picture], shape: tuple[int, int, int], noise: SeededNoise) -> FloatArray:
    """What pictures begin with, [B, *shape] float32: their own, or the first of `noise`, whatever is drawn beside
    them."""
    drawn = noise((len(pictures), *shape))
    for row, own in enumerate(picture.noise for picture in pictures):
        if own is not None:
            drawn[row] = own
    return drawn


class PictureModel(Protocol):
    """What draws: a bundle of a pixel model, or of a whole pipeline. May be used from any number of threads.

    name: of the bundle. height, width: of a picture, the one size that it draws. channels: 1 or 3. n_steps,
    guidance_scale: its own. examples: prompts that it knows. of_classes: prompts name classes, or are their numbers.
    batches: how many are drawn before any is decoded.
    """

    name: str
    height: int
    width: int
    channels: int
    n_steps: int
    guidance_scale: float
    examples: tuple[str, ...]
    of_classes: bool
    batches: int

    def check(self, request: DrawRequest) -> None:
        """Raise RecipeError for what it cannot draw, without computing anything."""

    def warnings(self, request: DrawRequest) -> tuple[str, ...]:
        """A sentence on each thing that a request asks for and does not get, as the end of a long prompt."""

    def calls(self, n_steps: int | None = None, strength: float = 1.0) -> int:
        """How often the denoiser is called for a picture of so many steps."""

    def start(
        self,
        batches: Sequence[Sequence[Picture]],
        n_steps: int | None = None,
        guidance_scale: float | None = None,
        strength: float = 1.0,
    ) -> list[Drawing]:
        """Batches before their first step. Their pictures may differ in all but steps, guidance, strength and whether
        they begin with a picture. What is done for all at once counts among the seconds of the first.

        A picture is the same whatever is drawn beside it, but for what floating point makes of another batch size.
        """

    def turn(self) -> AbstractContextManager[None]:
        """Within, one request is drawn; where parts are loaded in turn, others wait for theirs, and at its end no part
        is loaded any more."""

    def close(self) -> None:
        """Free all engines, when the calls that are running have ended; later calls raise RecipeError."""


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
