"""Drawing with a pixel model: its own prompts and sampler, in NumPy and its engine alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from export.errors import ContractError, RecipeError
from export.models.families import FAMILIES, shared_names, stated_inputs
from pipeline.generate.conditioning import GENERATION_FILE, Generation
from pipeline.generate.sampling import make_sampler, sample
from pipeline.progress import track
from pipeline.recipe import MOST_SEED, MOST_STEPS

if TYPE_CHECKING:
    from pipeline.backends.base import Engine
    from pipeline.bundle.bundle import Bundle

# Pictures drawn at a time: with guidance a batch of 8, the largest that every engine is built for.
BATCH_SIZE = 4
# Of one request, so that a slip of the finger is refused at once; MOST_STEPS and MOST_SEED are a recipe's.
MOST_PICTURES = 4096
Pictures = NDArray[np.uint8]


@dataclass(frozen=True)
class DrawRequest:
    """What to draw: `num_images` pictures of every prompt, with the seeds `seed`, `seed` + 1, ...

    n_steps 0 and guidance_scale None stand for the model's own.
    """

    prompts: tuple[str, ...]
    seed: int = 0
    num_images: int = 1
    n_steps: int = 0
    guidance_scale: float | None = None
    target: str = "auto"

    def __post_init__(self) -> None:
        if self.num_images < 1 or self.seed < 0 or self.n_steps < 0:
            raise RecipeError("--num-images must be at least 1, --seed and --n-steps not negative")
        if self.num_images * len(self.prompts) > MOST_PICTURES or self.n_steps > MOST_STEPS or self.seed >= MOST_SEED:
            raise RecipeError(f"at most {MOST_PICTURES} pictures, {MOST_STEPS} --n-steps and seeds below 2**63")
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            raise RecipeError(f"--guidance-scale {self.guidance_scale} is not a number; give one such as 4.5")
        for prompt in self.prompts:
            if any("\ud800" <= character <= "\udfff" for character in prompt):
                raise RecipeError(f"prompt {prompt!r} is not text in the terminal's encoding; use UTF-8")

    @property
    def pictures(self) -> list[tuple[str, int]]:
        """(prompt, seed) of every picture, prompt by prompt."""
        return [(prompt, self.seed + index) for prompt in self.prompts for index in range(self.num_images)]


def draw(bundle: Bundle, request: DrawRequest) -> Pictures:
    """Pictures [prompts * num_images, H, W, 1 or 3] uint8 of a pixel model."""
    with bundle.generation() as generation:
        generation.encode(list(request.prompts))  # refuse a bad prompt before the engine is loaded
        engine = bundle.engine(request.target)
        try:
            pictures = request.pictures
            parts = [pictures[first : first + BATCH_SIZE] for first in range(0, len(pictures), BATCH_SIZE)]
            drawn = [_draw_part(bundle, generation, engine, request, part) for part in track(parts, len(parts), "draw")]
        finally:
            engine.close()
    return np.concatenate(drawn)


def _draw_part(
    bundle: Bundle, generation: Generation, engine: Engine, request: DrawRequest, part: list[tuple[str, int]]
) -> Pictures:
    sampler = make_sampler(generation.sampler, request.n_steps or generation.n_steps, generation.timestep_scale)
    scale = generation.guidance_scale if request.guidance_scale is None else request.guidance_scale
    shape = picture_shape(bundle)
    noise = np.stack([np.random.default_rng(seed).standard_normal(shape) for _, seed in part]).astype(np.float32)
    encoded = generation.encode([prompt for prompt, _ in part])
    family = FAMILIES.get(bundle.manifest["model"]["family"])  # classes without a row of their own have no such inputs
    inputs = stated_inputs(family, bundle.config(), bundle.path / "config.json") if family else ()
    return to_pixels(sample(engine.run, encoded, noise, sampler, scale, shared=shared_names(inputs)))


def picture_shape(bundle: Bundle) -> tuple[int, int, int]:
    """Channels, height and width that the engine of a pixel model was made for."""
    config, size = bundle.config(), bundle.recipe.sampling
    own = config["sample_size"]
    return config["in_channels"], size.height or own, size.width or own


def to_pixels(images: NDArray[np.float32]) -> Pictures:
    """[B, C, H, W] in [-1, 1] -> [B, H, W, C] uint8, rounded. Raises ContractError for NaN: the engine is broken."""
    if not np.isfinite(images).all():
        raise ContractError("the engine's picture has NaN or Inf; verify the bundle, and build it again if that fails")
    return np.rint((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)


def makes_pixels(bundle: Bundle) -> bool:
    """Whether the bundle describes how it makes pictures, and its engine makes them without a VAE."""
    if GENERATION_FILE not in bundle.manifest["files"]:
        return False
    with bundle.generation() as generation:
        return generation.output == "pixels"
