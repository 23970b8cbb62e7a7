"""A bundle of a model of pixels: what its denoiser makes of noise is the picture."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np

from export.errors import RecipeError
from export.models.families import FAMILIES, shared_names, stated_inputs
from pipeline.generate.components import timed
from pipeline.generate.conditioning import GENERATION_FILE
from pipeline.generate.draw import Drawing, DrawRequest, Picture, first_noise
from pipeline.generate.sampling import Sampler, Trajectory, make_sampler
from pipeline.generate.schedulers.base import SchedulerOptions, SeededNoise, first_step

if TYPE_CHECKING:
    from pipeline.bundle.bundle import Bundle


class PixelModel:
    """A PictureModel; its engine is loaded once, and stays."""

    batches = 1

    def __init__(self, bundle: Bundle, target: str = "auto") -> None:
        """Raises RecipeError for a model of latents, and what `Bundle.engine` raises."""
        if not makes_pixels(bundle):
            raise RecipeError(
                f"{bundle.path}: its model needs the text encoder and VAE of its diffusers pipeline to draw; build "
                "that whole, or set that pipeline's transformer to load(BUNDLE).as_diffusers()"
            )
        self.name = bundle.name
        with bundle.generation() as generation:
            self.generation = generation.loaded()
        self.n_steps, self.guidance_scale = self.generation.n_steps, self.generation.guidance_scale
        self.examples = tuple(self.generation.conditioning.get("examples", ()))
        self.of_classes = self.generation.conditioning["kind"] == "classes"
        self.channels, self.height, self.width = picture_shape(bundle)
        # Classes without a row of their own have no inputs without a batch axis.
        family = FAMILIES.get(bundle.manifest["model"]["family"])
        rows = stated_inputs(family, bundle.config(), bundle.path / "config.json") if family else ()
        self.shared = shared_names(rows)
        self.engine = bundle.engine(target)

    def check(self, request: DrawRequest) -> None:
        """Raise RecipeError for prompts that the model does not know, or steps that its sampler does not have."""
        self.generation.encode(list(request.prompts), request.negative_prompts)
        request.refuse_noise((self.channels, self.height, self.width))
        self._sampler(request.n_steps)
        self.calls(request.n_steps, request.strength if request.images else 1.0)

    def warnings(self, request: DrawRequest) -> tuple[str, ...]:
        """As of PictureModel: none, for a prompt that it does not know is refused."""
        return ()

    def calls(self, n_steps: int | None = None, strength: float = 1.0) -> int:
        """As of PictureModel."""
        return self._sampler(n_steps).n_steps - self._first(n_steps, strength)

    def start(
        self,
        batches: Sequence[Sequence[Picture]],
        n_steps: int | None = None,
        guidance_scale: float | None = None,
        strength: float = 1.0,
    ) -> list[Drawing]:
        """As of PictureModel."""
        return [self._start(batch, n_steps, guidance_scale, strength) for batch in batches]

    def _start(
        self, pictures: Sequence[Picture], n_steps: int | None, guidance_scale: float | None, strength: float
    ) -> Drawing:
        encoded = self.generation.encode(
            [picture.prompt for picture in pictures], [picture.negative_prompt for picture in pictures]
        )
        sampler = self._sampler(n_steps)
        noise = SeededNoise([picture.seed for picture in pictures])
        x = first_noise(pictures, (self.channels, self.height, self.width), noise)
        images = [picture.image for picture in pictures if picture.image is not None]
        first = self._first(n_steps, strength) if images else 0
        if images:
            x = sampler.noised(np.stack(images), x, first)
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        seconds: dict[str, float] = {}
        run = timed(self.engine.run, "transformer", seconds)
        return Drawing(pictures, Trajectory(run, encoded, x, sampler, scale, self.shared, first=first), seconds)

    def turn(self) -> AbstractContextManager[None]:
        """Nothing is loaded in turn."""
        return nullcontext()

    def close(self) -> None:
        """As of PictureModel."""
        self.engine.close()

    def _sampler(self, n_steps: int | None) -> Sampler:
        own = self.generation
        return make_sampler(own.sampler, self.n_steps if n_steps is None else n_steps, own.timestep_scale)

    def _first(self, n_steps: int | None, strength: float) -> int:
        """The step to begin with. Raises RecipeError for a strength that is none."""
        options = SchedulerOptions(self.n_steps if n_steps is None else n_steps, strength)
        return first_step(options.n_steps, options.strength)


def makes_pixels(bundle: Bundle) -> bool:
    """Whether the bundle describes how it makes pictures, and its engine makes them without a VAE."""
    if GENERATION_FILE not in bundle.manifest["files"]:
        return False
    with bundle.generation() as generation:
        return generation.output == "pixels"


def picture_shape(bundle: Bundle) -> tuple[int, int, int]:
    """Channels, height and width that the engine of a pixel model was made for."""
    config, size = bundle.config(), bundle.recipe.sampling
    own = config["sample_size"]
    return config["in_channels"], size.height or own, size.width or own
