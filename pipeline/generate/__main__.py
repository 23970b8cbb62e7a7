"""`python -m pipeline.generate BUNDLE --prompt "..." -o out.png`: draw with an engine.

A bundle of a pixel model or of a whole pipeline draws by itself, in NumPy and its engines alone. A latent model by
itself needs the text encoder and VAE of its diffusers pipeline, whose transformer the engine replaces.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.documents import open_file
from export.errors import RecipeError
from pipeline.bundle.hub import located
from pipeline.bundle.pipeline_bundle import is_pipeline
from pipeline.command import Answer, Parser, add_threads, parser, run
from pipeline.files import refuse_unwritable
from pipeline.generate.draw import BATCH_SIZE, DrawRequest, Pictures
from pipeline.generate.input_picture import refuse_frames
from pipeline.generate.pixel_model import PixelModel, makes_pixels
from pipeline.progress import track
from pipeline.signals import leave
from pipeline.text_to_image import STRENGTH, Pipeline, as_image

if TYPE_CHECKING:
    from PIL.Image import Image

    from pipeline.bundle.bundle import Bundle

DESCRIPTION = "Draw pictures with an engine bundle."
# Small pictures are enlarged by a whole factor, so that they can be seen: to at least this many pixels a side.
SHOWN_PIXELS = 256
GAP = 1  # pixels between the pictures of a sheet
# Of one sheet, so that a slip of the finger is refused at once.
MOST_SHEET_PIXELS = 2**28


def open_pixels(bundle: Bundle, prompts: Sequence[str], target: str = "auto") -> Pipeline:
    """A pixel model. Raises RecipeError for prompts that it does not know, before its engine is loaded."""
    with bundle.generation() as generation:
        generation.encode(list(prompts))
    return Pipeline(PixelModel(bundle, target), bundle)


def draw(pipeline: Pipeline, request: DrawRequest) -> tuple[Pictures, dict[str, float]]:
    """Pictures [prompts * num_images, H, W, 1 or 3] uint8, and the seconds that each part of the model took."""
    pipeline.check(request)
    batches = math.ceil(len(request.pictures) / BATCH_SIZE)
    calls = batches * pipeline.model.calls(request.n_steps, request.strength if request.images else 1.0)
    steps = track(range(calls), calls, "draw")

    def count(*_: object) -> None:
        next(steps)

    drawn, seconds = [], defaultdict[str, float](float)
    for drawing in pipeline.drawings(request, count):
        drawn.append(drawing.result())
        for name, taken in drawing.seconds.items():
            seconds[name] += taken
    return np.concatenate(drawn), dict(seconds)


def arrange(pictures: Pictures, columns: int) -> Pictures:
    """One sheet [H', W', C]: rows of `columns` pictures with white lines of GAP pixels between them."""
    count, height, width, channels = pictures.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels), 255, np.uint8)
    for index, picture in enumerate(pictures):
        top, left = index // columns * (height + GAP), index % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def default_scale(height: int, width: int) -> int:
    """The whole factor that makes the shorter side at least SHOWN_PIXELS.

    >>> default_scale(32, 32), default_scale(512, 512)
    (8, 1)
    """
    return math.ceil(SHOWN_PIXELS / min(height, width))


def save(pictures: Pictures, path: Path, columns: int, scale: int, facts: Mapping[str, object]) -> tuple[int, int]:
    """Write one PNG, every pixel enlarged to scale x scale; `facts` go into it as text. Returns (width, height)."""
    from PIL import PngImagePlugin

    sheet = arrange(pictures, columns)
    height, width = sheet.shape[0] * scale, sheet.shape[1] * scale
    if height * width > MOST_SHEET_PIXELS:
        raise RecipeError(f"a sheet of {width} x {height} pixels is too large; use a smaller --scale or fewer pictures")
    sheet = sheet.repeat(scale, axis=0).repeat(scale, axis=1)
    information = PngImagePlugin.PngInfo()
    for key, value in facts.items():
        information.add_itxt(key, str(value))
    image = as_image(sheet)
    place = path.resolve()  # a link is written through
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".ditc-", dir=place.parent) as partial:
        image.save(Path(partial) / "picture.png", format="PNG", pnginfo=information)
        os.replace(Path(partial) / "picture.png", place)
    return image.size


# --- command -------------------------------------------------------------------------------------------------------


def make_parser() -> Parser:
    """All flags of `generate`."""
    flags = parser("generate", DESCRIPTION)
    flags.add_argument("bundle", help="engine folder written by build, or hf://OWNER/NAME[@REVISION]")
    flags.add_argument("--prompt", action="append", required=True, help="what to draw; several give a sheet")
    flags.add_argument("-o", "--output", type=Path, default=Path("out.png"), metavar="FILE.png")
    flags.add_argument("--negative-prompt", help="what guidance leads away from, of every prompt (default: none)")
    flags.add_argument("--image", type=Path, metavar="FILE", help="picture to begin with, of the size that is drawn")
    flags.add_argument("--strength", type=float, help="with --image: the share of the steps that it is changed by, "
                       f"above 0 and up to 1 (default: {STRENGTH:g})")  # fmt: skip
    flags.add_argument("--seed", type=int, default=0, help="of the first picture of each prompt; the next has seed + 1")
    flags.add_argument("--n-steps", type=int, help="denoising steps (default: the model's)")
    flags.add_argument("--guidance-scale", type=float, help="1 is without guidance (default: the model's)")
    flags.add_argument("--target", default="auto", help="cpu, rtx, cuda, trt, onnx (the portable "
                      "model, slow); auto: the fastest that this machine can run")  # fmt: skip
    flags.add_argument("--num-images", type=int, default=1, help="pictures of each prompt")
    text = f"enlarge every pixel this many times (default: to at least {SHOWN_PIXELS} pixels a side)"
    flags.add_argument("--scale", type=int, default=0, help=text)
    flags.add_argument("--pipeline", metavar="ID_OR_DIR", help="diffusers pipeline with text encoder and VAE, for a "
                      "latent model only (default: the one the engine's model came from)")  # fmt: skip
    text = "keep all parts of a whole pipeline in memory; else each is let go before the next one is loaded"
    flags.add_argument("--keep-loaded", action="store_true", help=text)
    add_threads(flags)
    return flags


def work(args: argparse.Namespace, answer: Answer) -> int:
    """Draw and say where the picture is."""
    if args.scale < 0 or args.output.suffix.lower() != ".png":
        raise RecipeError(f"--scale must not be negative, and {args.output} must end in .png")
    refuse_unwritable(args.output, False, "--output")
    if args.strength is not None and args.image is None:
        raise RecipeError(f"--strength {args.strength:g} without --image; it is of image-to-image alone")
    with located(args.bundle) as folder:
        name, pictures, seconds, request = _drawn(args, folder)
    scale = args.scale or default_scale(*pictures.shape[1:3])
    facts = {"engine": name, "prompts": json.dumps(request.prompts), "seed": request.seed}
    # One row for each prompt; with one picture of each, a sheet that is about square.
    columns = request.num_images if request.num_images > 1 else math.ceil(math.sqrt(len(request.prompts)))
    width, height = save(pictures, args.output, columns, scale, facts)
    text = f"{args.output}: {len(pictures)} picture(s), {width} x {height} pixels"
    text += f", every pixel shown {scale} x {scale} (--scale)" if scale > 1 else ""
    if len(seconds) > 1:
        text += "".join(f"\n{part}: {taken:.1f} s" for part, taken in seconds.items())
    result = {"event": "result", "path": str(args.output), "width": width, "height": height, "scale": scale}
    answer.document(result | {"seconds": seconds}, text)
    return 0


def _drawn(args: argparse.Namespace, folder: Path) -> tuple[str, Pictures, dict[str, float], DrawRequest]:
    """The bundle's name, the pictures, the seconds that each part took, and what was asked for."""
    from pipeline import load

    request = DrawRequest(
        tuple(args.prompt),
        args.seed,
        args.num_images,
        args.n_steps,
        args.guidance_scale,
        () if args.negative_prompt is None else (args.negative_prompt,) * len(args.prompt),
        strength=STRENGTH if args.strength is None else args.strength,
    )
    image = None if args.image is None else read_image(args.image)
    bundle = None if is_pipeline(folder) else load(folder, args.threads)
    if bundle is not None:
        bundle.refuse_other_part()
    if bundle is not None and not makes_pixels(bundle):
        from pipeline.generate.latent import draw_latent

        if image is not None:
            raise RecipeError(f"--image: {args.bundle} is a denoiser alone; build its pipeline whole to draw from one")
        return bundle.name, draw_latent(bundle, request, args.pipeline, args.target), {}, request
    if args.pipeline is not None:
        raise RecipeError(f"{args.bundle} draws by itself, without a pipeline; leave --pipeline {args.pipeline} away")
    if bundle is None:
        opened = Pipeline.load(
            folder, args.target, args.threads, args.keep_loaded, min(len(request.pictures), BATCH_SIZE)
        )
    else:
        opened = open_pixels(bundle, args.prompt, args.target)
    with opened as pipeline:
        request = replace(request, images=pipeline.input_images(image))
        return pipeline.name, *draw(pipeline, request), request


def read_image(path: Path) -> Image:
    """The picture in a file. Raises RecipeError for a file that is none."""
    from PIL import Image, UnidentifiedImageError

    open_file(path, RecipeError, "give a picture").close()
    try:
        with Image.open(path) as image:
            refuse_frames(image)  # of which a copy would have the first
            return image.copy()
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        raise RecipeError(f"--image {path} cannot be read ({error}); give a PNG or JPEG file") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(make_parser(), work, argv)


if __name__ == "__main__":
    leave(main)
