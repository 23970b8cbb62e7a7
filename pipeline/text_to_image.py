"""From prompts to pictures with a bundle, called as a diffusers pipeline is.

Names of arguments and of what is returned are those of diffusers. Whatever draws another kind of bundle serves under
the same names: `__call__` for people, `start` for whoever shares out the steps of a batch, as pipeline/serve does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from export.documents import shown
from export.errors import RecipeError
from export.models.families import FAMILIES, shared_names, stated_inputs
from pipeline import load
from pipeline.backends.base import Arrays
from pipeline.generate.draw import (
    BATCH_SIZE,
    Drawing,
    DrawRequest,
    Picture,
    Pictures,
    makes_pixels,
    noise_of,
    picture_shape,
    to_floats,
)
from pipeline.generate.sampling import Sampler, Trajectory, make_sampler

if TYPE_CHECKING:
    from PIL.Image import Image

    from pipeline.bundle.bundle import Bundle

# (the batch that is drawn, number of the step that ended, its timestep, {"latents": [B, C, H, W] float32}) -> other
# latents to go on with under the same name, or None.
Callback = Callable[[Drawing, int, float, Arrays], Arrays | None]


@dataclass(frozen=True)
class PipelineOutput:
    """images: a list of PIL pictures, or [B, H, W, C] float32 from 0 to 1; prompt by prompt. seeds: of each picture.
    interrupted: whether a callback ended the drawing, so that the last pictures are unfinished, or absent."""

    images: list[Image] | NDArray[np.float32]
    seeds: tuple[int, ...]
    interrupted: bool = False


class Pipeline:
    """A bundle of a pixel model with its engine, which is loaded once. May be called from any number of threads.

    name, height, width: of the engine; n_steps, guidance_scale: the model's own; examples: prompts that it knows.

    with Pipeline.load("engines/pixart_w4a6") as pipeline:
        pipeline("a red circle on white", seed=3).images[0].save("out.png")
    """

    def __init__(self, bundle: Bundle, target: str = "auto") -> None:
        """Raises RecipeError for a model of latents, and what `Bundle.engine` raises."""
        if not makes_pixels(bundle):
            raise RecipeError(
                f"{bundle.path}: its model needs the text encoder and VAE of its diffusers pipeline to draw; set that "
                "pipeline's transformer to load(BUNDLE).as_diffusers()"
            )
        self.bundle, self.name = bundle, bundle.name
        with bundle.generation() as generation:
            self.generation = generation.loaded()
        self.n_steps, self.guidance_scale = self.generation.n_steps, self.generation.guidance_scale
        self.examples = tuple(self.generation.conditioning.get("examples", ()))
        self.channels, self.height, self.width = picture_shape(bundle)
        # Classes without a row of their own have no inputs without a batch axis.
        family = FAMILIES.get(bundle.manifest["model"]["family"])
        rows = stated_inputs(family, bundle.config(), bundle.path / "config.json") if family else ()
        self.shared = shared_names(rows)
        self.engine = bundle.engine(target)

    @classmethod
    def load(cls, path: str | Path, target: str = "auto", threads: int | None = None) -> Pipeline:
        """The pipeline of a bundle folder, whose files are verified; target and threads as `generate` takes them."""
        return cls(load(path, threads), target)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        seed: int = 0,
        callback_on_step_end: Callback | None = None,
        output_type: Literal["pil", "np"] = "pil",
        **unknown: object,
    ) -> PipelineOutput:
        """Draw `num_images_per_prompt` pictures of each prompt, with the seeds `seed`, `seed` + 1, ...

        None stands for the model's own. The callback sees every step of every batch of up to BATCH_SIZE pictures; it
        may look at `drawing.previews()`, and end the drawing by `drawing.interrupt()`. Raises RecipeError for what the
        engine cannot draw, and ContractError where it is broken.
        """
        self._refuse(height, width, output_type, unknown)
        prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
        negative = (
            (negative_prompt,) * len(prompts) if isinstance(negative_prompt, str) else tuple(negative_prompt or ())
        )
        request = DrawRequest(prompts, seed, num_images_per_prompt, num_inference_steps, guidance_scale, negative)
        drawings = list(self.drawings(request, callback_on_step_end))
        images: list[Image] | NDArray[np.float32]
        if output_type == "np":
            images = np.concatenate([to_floats(drawing.latents) for drawing in drawings])
        else:
            images = [as_image(picture) for drawing in drawings for picture in drawing.result()]
        seeds = tuple(picture.seed for drawing in drawings for picture in drawing.pictures)
        return PipelineOutput(images, seeds, drawings[-1].is_interrupted)

    def _refuse(self, height: int | None, width: int | None, output_type: str, unknown: dict[str, object]) -> None:
        """Raise RecipeError for arguments that this pipeline does not have, or not with these values."""
        if unknown:
            known = [name for name in Pipeline.__call__.__annotations__ if name not in ("unknown", "return")]
            raise RecipeError(f"argument {min(unknown)!r} is unknown to this pipeline; it takes {', '.join(known)}")
        if (height or self.height, width or self.width) != (self.height, self.width):
            asked = f"{height or self.height} x {width or self.width}"
            raise RecipeError(
                f"height x width {asked}; the engine draws {self.height} x {self.width}, build another for other sizes"
            )
        if output_type not in ("pil", "np"):
            raise RecipeError(f"output_type {shown(output_type)}; use 'pil' or 'np'")

    def drawings(self, request: DrawRequest, on_step: Callback | None = None) -> Iterator[Drawing]:
        """The pictures of a request, in batches of up to BATCH_SIZE, each drawn to its end; none after one that was
        interrupted."""
        pictures = request.pictures
        self.check(request)
        for first in range(0, len(pictures), BATCH_SIZE):
            drawing = self.start(pictures[first : first + BATCH_SIZE], request.n_steps, request.guidance_scale)
            while not drawing.is_over:
                timestep = float(drawing.trajectory.sampler.timesteps[drawing.steps_done])
                drawing.step()
                if on_step is not None:
                    _heed(drawing, on_step(drawing, drawing.steps_done - 1, timestep, {"latents": drawing.latents}))
            yield drawing
            if drawing.is_interrupted:
                return

    def check(self, request: DrawRequest) -> None:
        """Raise RecipeError for prompts that the model does not know, or steps that its sampler does not have."""
        self.generation.encode(list(request.prompts), request.negative_prompts)
        self._sampler(request.n_steps)

    def start(
        self, pictures: Sequence[Picture], n_steps: int | None = None, guidance_scale: float | None = None
    ) -> Drawing:
        """A batch before its first step. Pictures of one batch may differ in all but steps and guidance.

        A picture is the same whatever is drawn beside it, but for what floating point makes of another batch size.
        """
        encoded = self.generation.encode(
            [picture.prompt for picture in pictures], [picture.negative_prompt for picture in pictures]
        )
        noise = noise_of(pictures, (self.channels, self.height, self.width))
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        trajectory = Trajectory(self.engine.run, encoded, noise, self._sampler(n_steps), scale, self.shared)
        return Drawing(pictures, trajectory)

    def _sampler(self, n_steps: int | None) -> Sampler:
        own = self.generation
        return make_sampler(own.sampler, self.n_steps if n_steps is None else n_steps, own.timestep_scale)

    def close(self) -> None:
        """Free the engine, when the calls that are running have ended; later calls raise RecipeError."""
        self.engine.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _heed(drawing: Drawing, answer: Arrays | None) -> None:
    """Go on as a callback answers. Raises RecipeError for what cannot be exchanged."""
    for name, value in (answer or {}).items():
        if name != "latents":
            raise RecipeError(f"the callback answers {shown(name)}; it may exchange latents alone")
        drawing.replace(value)


def as_image(picture: Pictures) -> Image:
    """A PIL picture of [H, W, 1 or 3] uint8."""
    from PIL import Image

    return Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)
