"""From prompts to pictures with a bundle, called as a diffusers pipeline is.

Names of arguments and of what is returned are those of diffusers. Whatever kind of bundle it is: `__call__` is for
people, `start` for whoever shares out the steps of a batch, as pipeline/serve does.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from export.documents import shown
from export.errors import RecipeError
from pipeline import load, machine
from pipeline.backends.base import Arrays
from pipeline.bundle import memory
from pipeline.bundle.hub import located
from pipeline.bundle.pipeline_bundle import PipelineBundle, is_pipeline, load_pipeline
from pipeline.generate.draw import (
    BATCH_SIZE,
    Drawing,
    DrawRequest,
    Picture,
    PictureModel,
    Pictures,
    to_floats,
)
from pipeline.generate.input_picture import as_input
from pipeline.generate.latent_model import LatentModel
from pipeline.generate.pixel_model import PixelModel
from pipeline.generate.sampling import FloatArray

if TYPE_CHECKING:
    from PIL.Image import Image

    from pipeline.bundle.bundle import Bundle

logger = logging.getLogger(__name__)
# (the batch that is drawn, number of the step that ended, its timestep, {"latents": [B, C, H, W] float32}) -> other
# latents to go on with under the same name, or None.
Callback = Callable[[Drawing, int, float, Arrays], Arrays | None]
# Of the free memory, what the weights of all parts may take where all are kept. Calls need the rest: a decoder takes
# several times its weights for a tile, a denoiser some hundreds of megabytes for a batch, whatever the model's size.
KEPT_SHARE = 0.5
# What image-to-image changes a picture by, as diffusers has it.
STRENGTH = 0.8


@dataclass(frozen=True)
class PipelineOutput:
    """images: a list of PIL pictures, or [B, H, W, C] float32 from 0 to 1, or latents [B, C, h, w]; prompt by prompt.
    seeds: of each picture. interrupted: whether a callback ended the drawing, so that the last pictures are unfinished,
    or absent. seconds: what each part of the model took, with loading it, by its name. warnings: a sentence on each
    thing that was asked for and left out, as the end of a long prompt."""

    images: list[Image] | NDArray[np.float32]
    seeds: tuple[int, ...]
    interrupted: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class Pipeline:
    """A model that draws, with its engines. May be called from any number of threads.

    name, height, width: of the bundle, and of its pictures in pixels; n_steps, guidance_scale: the model's own;
    examples: prompts that it knows.

    with Pipeline.load("engines/pixart_w4a6") as pipeline:
        pipeline("a red circle on white", seed=3).images[0].save("out.png")
    """

    def __init__(self, model: PictureModel, bundle: Bundle | PipelineBundle | None = None) -> None:
        """bundle: that the model is from, for those who show its report."""
        self.model, self.bundle = model, bundle
        self.name, self.examples = model.name, model.examples
        self.height, self.width = model.height, model.width
        self.n_steps, self.guidance_scale = model.n_steps, model.guidance_scale

    @classmethod
    def load(
        cls,
        path: str | Path,
        target: str = "auto",
        threads: int | None = None,
        keep_loaded: bool | None = False,
        batch_size: int | None = 1,
    ) -> Pipeline:
        """The pipeline of a bundle folder, whose files are verified; target and threads as `generate` takes them.

        keep_loaded: of a whole pipeline, keep all of its parts in memory; else each is loaded when it is needed, and
        let go before the next one is. None: keep them where memory suffices, which is for servers: they draw again and
        again, and whoever draws once may want the memory for something else. batch_size: pictures that will be drawn
        at a time, by which a whole pipeline's need of memory is known: where it is short that is said in the log, and
        raises ResourceError where the weights alone do not fit; None: nothing will be drawn here.
        """
        with located(path) as folder:
            if not is_pipeline(folder):
                bundle = load(folder, threads)
                return cls(PixelModel(bundle, target), bundle)
            whole = load_pipeline(folder, threads)
            kept = keeps_loaded(whole, target) if keep_loaded is None else keep_loaded
            with whole.source(target) as source:
                model = LatentModel(source, kept)
            if batch_size is not None:
                memory.refuse_too_large(whole, model, target, batch_size)
            return cls(model, whole)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        class_labels: Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        seed: int = 0,
        latents: FloatArray | None = None,
        image: Image | NDArray[np.generic] | Sequence[Image | NDArray[np.generic]] | None = None,
        strength: float | None = None,
        callback_on_step_end: Callback | None = None,
        output_type: Literal["pil", "np", "latent"] = "pil",
        **unknown: object,
    ) -> PipelineOutput:
        """Draw `num_images_per_prompt` pictures of each prompt, with the seeds `seed`, `seed` + 1, ...

        None stands for the model's own. class_labels: numbers of classes, in the place of prompts. latents: noise to
        begin with, [B, C, h, w], in the place of the seeds'. image: what to begin with, one picture or one for each
        prompt (PIL, or [H, W, C] uint8 or floats from 0 to 1), of which the share `strength` of the steps is done
        (default: 0.8). The callback sees every step of every batch of up to BATCH_SIZE pictures; it may look at
        `drawing.previews()`, and end the drawing by `drawing.interrupt()`. It must not wait for another thread that
        draws with this pipeline, which without `keep_loaded` waits for this call to end. guidance_scale: from
        -MOST_GUIDANCE to MOST_GUIDANCE. Raises RecipeError for what the engine cannot draw, and ContractError where it
        is broken.
        """
        self._refuse(height, width, output_type, unknown)
        prompts = self._prompts(prompt, class_labels)
        negative = () if negative_prompt is None else _texts("negative_prompt", negative_prompt)
        negative = negative * len(prompts) if isinstance(negative_prompt, str) else negative
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise RecipeError(f"callback_on_step_end {shown(callback_on_step_end)} is no function")
        if strength is not None and image is None:
            raise RecipeError(f"strength {shown(strength)} without an image; it is of image-to-image alone")
        request = DrawRequest(
            prompts,
            seed,
            num_images_per_prompt,
            num_inference_steps,
            guidance_scale,
            negative,
            self.input_images(image),
            STRENGTH if strength is None else strength,
            _noise(latents),
        )
        images: list[Image] = []
        arrays: list[FloatArray] = []
        seeds: list[int] = []
        seconds, interrupted = defaultdict[str, float](float), False
        for drawing in self.drawings(request, callback_on_step_end):
            if output_type == "pil":
                images += [as_image(picture) for picture in drawing.result()]
            else:
                arrays.append(to_floats(drawing.decoded) if output_type == "np" else drawing.latents)
            seeds += [picture.seed for picture in drawing.pictures]
            interrupted = drawing.is_interrupted
            for name, taken in drawing.seconds.items():
                seconds[name] += taken
        shown_images = np.concatenate(arrays) if arrays else images
        return PipelineOutput(shown_images, tuple(seeds), interrupted, dict(seconds), self.warnings(request))

    def _refuse(self, height: int | None, width: int | None, output_type: str, unknown: dict[str, object]) -> None:
        """Raise RecipeError for arguments that this pipeline does not have, or not with these values."""
        if unknown:
            known = [name for name in Pipeline.__call__.__annotations__ if name not in ("unknown", "return")]
            raise RecipeError(f"argument {min(unknown)!r} is unknown to this pipeline; it takes {', '.join(known)}")
        asked = (self.height if height is None else height, self.width if width is None else width)
        if asked != (self.height, self.width):
            raise RecipeError(
                f"height x width {shown(asked[0])} x {shown(asked[1])}; the engine draws {self.height} x {self.width} "
                "pixels: leave both away, or build another for other sizes"
            )
        if output_type not in ("pil", "np", "latent"):
            raise RecipeError(f"output_type {shown(output_type)}; use 'pil', 'np' or 'latent'")

    def _prompts(self, prompt: object, class_labels: object) -> tuple[str, ...]:
        """What is drawn, in words. Raises RecipeError unless it is said once, in the way of the model."""
        if class_labels is None:
            if prompt is None:
                raise RecipeError("no prompt was given; give at least one")
            return _texts("prompt", prompt)
        if prompt is not None:
            raise RecipeError("prompt and class_labels both say what to draw; give one of them")
        if not self.model.of_classes:
            raise RecipeError(f"class_labels {shown(class_labels)}: {self.name} draws from text; give a prompt")
        if not isinstance(class_labels, list | tuple | np.ndarray):
            raise RecipeError(f"class_labels {shown(class_labels)}; give a list of numbers")
        return tuple(str(label) for label in class_labels)

    def input_images(self, image: object) -> tuple[FloatArray, ...]:
        """Pictures to begin with as a DrawRequest has them. Raises RecipeError for what this pipeline cannot take."""
        if image is None:
            return ()
        several = image if isinstance(image, list | tuple) else (image,)
        return tuple(as_input(one, (self.height, self.width, self.model.channels)) for one in several)

    def drawings(self, request: DrawRequest, on_step: Callback | None = None) -> Iterator[Drawing]:
        """The pictures of a request, in batches of up to BATCH_SIZE, each denoised to its end; none after one that was
        interrupted. As many as the model says are denoised before the first is given to be decoded."""
        self.model.check(request)
        pictures, at_once = request.pictures, BATCH_SIZE * self.model.batches
        with self.model.turn():
            for first in range(0, len(pictures), at_once):
                some = pictures[first : first + at_once]
                batches = [some[start : start + BATCH_SIZE] for start in range(0, len(some), BATCH_SIZE)]
                done = []
                for drawing in self.model.start(batches, request.n_steps, request.guidance_scale, request.strength):
                    done.append(drawing)
                    _draw(drawing, on_step)
                    if drawing.is_interrupted:
                        break
                yield from done
                if done[-1].is_interrupted:
                    return

    def check(self, request: DrawRequest) -> None:
        """Raise RecipeError for what the model cannot draw, as a prompt that it does not know."""
        self.model.check(request)

    def warnings(self, request: DrawRequest) -> tuple[str, ...]:
        """Sentences on what the model leaves out of a request, see PictureModel; the log has them when it is drawn."""
        return self.model.warnings(request)

    def start(
        self, pictures: Sequence[Picture], n_steps: int | None = None, guidance_scale: float | None = None
    ) -> Drawing:
        """A batch before its first step; see PictureModel."""
        return self.model.start([pictures], n_steps, guidance_scale)[0]

    def close(self) -> None:
        """Free the engines, when the calls that are running have ended; later calls raise RecipeError."""
        self.model.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def keeps_loaded(bundle: PipelineBundle, target: str = "auto") -> bool:
    """Is there memory for all parts of a whole pipeline at once? Also says so in the log, where it is decided."""
    weights, free = bundle.engine_bytes(target), machine.free_memory()
    sizes = f"{weights / 2**30:.2f} GiB of weights, {free.size_bytes / 2**30:.1f} GiB of memory are free{free.within}"
    if weights <= KEPT_SHARE * free.size_bytes:
        logger.info("%s: all parts stay in memory (%s)", bundle.name, sizes)
        return True
    logger.warning(
        "%s: parts are loaded anew for every batch, and let go in turn, as their weights would take more than half of "
        "the free memory (%s); %s, or keep them all the same by --keep-loaded",
        bundle.name,
        sizes,
        free.remedy,
    )
    return False


def _draw(drawing: Drawing, on_step: Callback | None) -> None:
    """All steps of a batch, of which a callback may be told."""
    while not drawing.is_over:
        timestep = drawing.timestep
        drawing.step()
        if on_step is not None:
            _heed(drawing, on_step(drawing, drawing.steps_done - 1, timestep, {"latents": drawing.latents}))


def _heed(drawing: Drawing, answer: object) -> None:
    """Go on as a callback answers. Raises RecipeError for what cannot be exchanged."""
    if answer is None:
        return
    if not isinstance(answer, Mapping):
        raise RecipeError(f"the callback answers {shown(answer)}; it may give None, or a dictionary with latents")
    for name, value in answer.items():
        if name != "latents":
            raise RecipeError(f"the callback answers {shown(name)}; it may exchange latents alone")
        drawing.replace(value)


def _texts(name: str, texts: object) -> tuple[str, ...]:
    """An argument that is a text, or a list of them. Raises RecipeError for what is neither."""
    several = (texts,) if isinstance(texts, str) else texts
    if not isinstance(several, list | tuple):
        raise RecipeError(f"{name} {shown(texts)} is no text; give a sentence, or a list of them")
    for text in several:
        if not isinstance(text, str):
            raise RecipeError(f"{name}: {shown(text)} is no text; give a sentence")
    return tuple(several)


def _noise(latents: object) -> tuple[FloatArray, ...]:
    """Of each picture, [C, h, w] float32. Raises RecipeError for what is no batch of numbers."""
    if latents is None:
        return ()
    if not isinstance(latents, np.ndarray) or latents.ndim != 4 or latents.dtype.kind != "f":
        kind = f"{latents.dtype} {latents.shape}" if isinstance(latents, np.ndarray) else type(latents).__name__
        raise RecipeError(f"latents of {kind}; give an array of floats [B, C, h, w]")
    if not (np.abs(latents) <= np.finfo(np.float32).max).all():
        raise RecipeError("latents with NaN, Inf or numbers beyond float32; give finite noise")
    return tuple(latents.astype(np.float32))


def as_image(picture: Pictures) -> Image:
    """A PIL picture of [H, W, 1 or 3] uint8."""
    from PIL import Image

    return Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)
