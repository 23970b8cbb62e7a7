"""A picture to begin a drawing with, as models have it: its values in their own range, turned as it is to be seen.

PIL's `convert("RGB")` gives a picture for every mode, and a wrong one for some: it clips numbers of more than 8 bits,
and drops transparency, below which colours are anything. So what a mode does not say is refused by name.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from export.errors import RecipeError

if TYPE_CHECKING:
    from PIL.Image import Image

FloatArray = NDArray[np.float32]
# Modes of PIL that are of 8 bits, or of one, and that it converts by their own meaning.
EIGHT_BITS = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
WITH_ALPHA = ("LA", "PA", "RGBA", "La", "RGBa")
# What PIL raises for files, and for EXIF data, that are cut off or no such thing.
DAMAGED = (LookupError, OSError, SyntaxError, TypeError, ValueError, struct.error)


def as_input(image: object, shape: tuple[int, int, int]) -> FloatArray:
    """A picture to begin with as models have it, [C, H, W] float32 from -1 to 1.

    image: PIL, or [H, W, C] (of one channel also [H, W]), uint8 or floats from 0 to 1. shape: H, W and C of the model.
    A PIL picture is turned as its EXIF data say; its colour profile is not applied. Raises RecipeError for a picture of
    another size or number of channels, for one that is transparent, of several frames or of a mode whose range is not
    known, or for what is none.
    """
    from PIL import Image

    if isinstance(image, Image.Image):
        pixels = _pixels(image, shape[2])
    elif isinstance(image, np.ndarray):
        pixels = image[:, :, None] if image.ndim == 2 else image
    else:
        raise RecipeError(f"image of {type(image).__name__}; give a PIL picture or an array [H, W, C]")
    _refuse_shape(pixels.shape, shape)
    if pixels.dtype == np.uint8:
        floats = pixels.astype(np.float32) / np.float32(255)
    elif pixels.dtype.kind == "f" and np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1:
        floats = pixels.astype(np.float32)
    else:
        raise RecipeError(f"image of {pixels.dtype}; give uint8, or floats from 0 to 1")
    return np.ascontiguousarray((floats * np.float32(2) - np.float32(1)).transpose(2, 0, 1))


def _pixels(image: Image, channels: int) -> NDArray[np.generic]:
    """[H, W, channels] of a PIL picture: uint8, or float32 from 0 to 1 where it has 16 bits."""
    refuse_frames(image)
    turned = _turned(image)
    if turned.mode in SIXTEEN_BITS:
        grey = np.asarray(turned)
        if (grey == turned.info.get("transparency")).any():
            raise _transparent(turned)
        return np.repeat(grey[:, :, None].astype(np.float32) / np.float32(2**16 - 1), channels, axis=2)
    if turned.mode not in (*EIGHT_BITS, *WITH_ALPHA):
        raise RecipeError(
            f"image of PIL's mode {turned.mode!r}, which does not say what is black and white; convert it to 'RGB' or "
            "'L' by its own range, or give an array of floats from 0 to 1"
        )
    if turned.mode in WITH_ALPHA or "transparency" in turned.info:
        turned = _opaque(turned)
    pixels = np.asarray(turned.convert("L" if channels == 1 else "RGB"))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def refuse_frames(image: Image) -> None:
    """Raise RecipeError for an animation, or a file of several pages."""
    try:
        n_frames = getattr(image, "n_frames", 1)  # PIL may go through the whole file for it
    except DAMAGED as error:
        raise RecipeError(f"image whose frames cannot be read ({error}); save it again") from error
    # Of a camera's MPO the first picture is the photograph, and the others are previews or views beside it.
    if n_frames > 1 and image.format != "MPO":
        raise RecipeError(f"image of {n_frames} frames; give one picture, as the copy() of the frame that is sought")


def _turned(image: Image) -> Image:
    """As its EXIF data say. Raises RecipeError where they, or the file that it is read from by now, are damaged."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except DAMAGED as error:
        raise RecipeError(f"image that cannot be read, or not its EXIF data ({error}); save it again") from error


def _opaque(image: Image) -> Image:
    """The colours of a picture that could be transparent. Raises RecipeError if it is somewhere."""
    # Of colours that were multiplied with alpha PIL converts each mode to its plain one alone.
    plain = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)).convert("RGBA")
    if plain.getchannel("A").getextrema() != (255, 255):
        raise _transparent(image)
    return plain.convert("RGB")


def _transparent(image: Image) -> RecipeError:
    return RecipeError(
        f"image of PIL's mode {image.mode!r} is transparent in places; put it on a background first, as "
        "Image.alpha_composite does"
    )


def _refuse_shape(own: tuple[int, ...], shape: tuple[int, int, int]) -> None:
    """Raise RecipeError for a picture that is not of the model's shape."""
    drawn = f"the engine draws {shape} (height, width, channels)"
    if len(own) != 3:
        raise RecipeError(f"image of shape {own}; {drawn}: give one picture [H, W, C]")
    if own[2] != shape[2]:
        remedy = "repeat the one it has" if own[2] == 1 else "give its colours without alpha or other channels"
        raise RecipeError(f"image of {own} has {own[2]} channel(s); {drawn}: {remedy}")
    if own != shape:
        raise RecipeError(f"image of {own}; {drawn}: resize it first")
