"""Pictures to begin with: each mode of PIL read by its own range, turned by EXIF, or refused by name."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from export.errors import RecipeError
from pipeline.generate.__main__ import read_image
from pipeline.generate.input_picture import WITH_ALPHA, as_input

RGB = (2, 2, 3)


def opened(image: Image.Image, kind: str, **settings: Any) -> Image.Image:
    """The picture as it is read from a file."""
    stream = io.BytesIO()
    image.save(stream, kind, **settings)
    stream.seek(0)
    return Image.open(stream)


def test_grey_pictures_have_one_channel() -> None:
    grey = np.arange(4, dtype=np.uint8).reshape(2, 2)
    np.testing.assert_array_equal(as_input(grey, (2, 2, 1)), as_input(Image.fromarray(grey), (2, 2, 1)))
    assert as_input(grey, (2, 2, 1)).shape == (1, 2, 2)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", *WITH_ALPHA])
def test_opaque_pictures_of_8_bits_are_what_they_show(mode: str) -> None:
    white = Image.new("RGB", (2, 2), (255, 255, 255))
    through = {"PA": "LA", "La": "LA", "RGBa": "RGBA"}.get(mode)
    white = white if through is None else white.convert(through)
    np.testing.assert_array_equal(as_input(white.convert(mode), RGB), np.ones((3, 2, 2)))


def test_colours_keep_their_places() -> None:
    colours = np.arange(12, dtype=np.uint8).reshape(RGB) * 20
    own = as_input(Image.fromarray(colours), RGB)
    np.testing.assert_allclose(own.transpose(1, 2, 0), colours / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(own, as_input(colours, RGB))
    np.testing.assert_array_equal(own, as_input(Image.fromarray(colours).convert("RGBA"), RGB))


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_of_grey_are_scaled(channels: int) -> None:
    values = np.array([[0, 32768], [65535, 257]], np.uint16)
    read = opened(Image.fromarray(values), "PNG")
    big = Image.frombytes("I;16B", (2, 2), values.astype(">u2").tobytes())
    for image in (read, big):
        own = as_input(image, (2, 2, channels))
        np.testing.assert_allclose(own, [values / 32767.5 - 1] * channels, atol=1e-6)


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_modes_without_a_range_are_refused(mode: str) -> None:
    image = Image.new(mode, (2, 2))
    with pytest.raises(RecipeError, match=re.escape(f"mode {mode!r}, which does not say what is black and white")):
        as_input(image, RGB)


def transparent() -> dict[str, Image.Image]:
    keyed = opened(Image.new("RGB", (2, 2), (9, 9, 9)), "PNG", transparency=(9, 9, 9))
    return {
        "RGBA": Image.new("RGBA", (2, 2), (9, 9, 9, 254)),
        "LA": Image.new("LA", (2, 2), (9, 0)),
        "RGBa": Image.new("RGBA", (2, 2), (9, 9, 9, 9)).convert("RGBa"),
        "La": Image.new("LA", (2, 2), (9, 9)).convert("La"),
        "PA": Image.new("PA", (2, 2), (9, 9)),
        "RGB": keyed,
        "I;16": opened(Image.fromarray(np.full((2, 2), 9, np.uint16)), "PNG", transparency=9),
        "P": opened(Image.new("P", (2, 2), 0), "PNG", transparency=0),
    }


@pytest.mark.parametrize("mode", transparent())
def test_transparent_pictures_are_refused(mode: str) -> None:
    image = transparent()[mode]
    assert image.mode == mode
    with pytest.raises(RecipeError, match=f"mode '{mode}' is transparent in places; put it on a background first"):
        as_input(image, RGB)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_picture_is_turned_as_its_exif_data_say(kind: str, tmp_path: Path) -> None:
    """By the verb's way, too, which copies it from its file. 6: the camera was turned by a quarter."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(np.array([[0, 0], [0, 0], [255, 255], [255, 255]], np.uint8).repeat(8, 0).repeat(8, 1))
    path = tmp_path / f"it.{kind.lower()}"
    image.save(path, kind, exif=exif)
    with Image.open(path) as lazy:
        for read in (lazy, read_image(path)):
            own = as_input(read, (16, 32, 1))
            assert own[0, :, :12].min() > 0.9 and own[0, :, 20:].max() < -0.9


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_several_frames_are_refused_and_one_of_them_is_a_picture(kind: str) -> None:
    frames = [Image.new("RGB", (2, 2), (level,) * 3) for level in (0, 255)]
    image = opened(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(RecipeError, match=r"^image of 2 frames; give one picture, as the copy\(\) of the frame"):
        as_input(image, RGB)
    image.seek(1)
    np.testing.assert_allclose(as_input(image.copy(), RGB), np.ones((3, 2, 2)), atol=0.05)  # WebP loses a little


def test_a_photograph_with_others_beside_it_is_one_picture() -> None:
    frames = [Image.new("RGB", (8, 8), (level,) * 3) for level in (255, 0)]
    image = opened(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert image.format == "MPO" and image.n_frames == 2  # type: ignore[attr-defined]
    np.testing.assert_array_equal(as_input(image, (8, 8, 3)), np.ones((3, 8, 8)))


def test_damaged_files_and_exif_data_are_refused() -> None:
    image = Image.new("L", (2, 2))
    image.info["exif"] = b"Exif\0\0garbage"
    stream = io.BytesIO()
    Image.effect_noise((64, 64), 9).save(stream, "PNG")
    for damaged in (image, Image.open(io.BytesIO(stream.getvalue()[:999]))):
        with pytest.raises(RecipeError, match=r"cannot be read, or not its EXIF data .*; save it again"):
            as_input(damaged, RGB)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((2, 2, 1), np.uint8), "image of (2, 2, 1) has 1 channel(s); the engine draws (2, 2, 3) (height"),
        (np.zeros((2, 2), np.uint8), "image of (2, 2, 1) has 1 channel(s)"),
        (np.zeros((9, 9, 4), np.uint8), "has 4 channel(s); the engine draws (2, 2, 3) (height, width, channels): give"),
        (np.zeros((1, 2, 2, 3), np.uint8), "image of shape (1, 2, 2, 3); the engine draws (2, 2, 3)"),
        (
            np.zeros((4, 2, 3), np.uint8),
            "image of (4, 2, 3); the engine draws (2, 2, 3) (height, width, channels)",
        ),
        (Image.new("RGBA", (4, 2)), "is transparent in places"),
        (np.zeros((2, 2, 3), np.uint16), "image of uint16; give uint8, or floats from 0 to 1"),
        (np.full((2, 2, 3), np.nan), "image of float64; give uint8, or floats from 0 to 1"),
        (None, "image of NoneType; give a PIL picture"),
    ],
)
def test_what_does_not_fit_is_refused(image: object, words: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(words)):
        as_input(image, RGB)
