"""Pictures of a report: arrays to PNG files, and amplified differences."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.distance import Array

GAINS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10_000, 100_000)


@dataclass(frozen=True)
class Column:
    """One column of the gallery: a file name stem, a heading, and a PNG for each prompt."""

    stem: str
    heading: str
    pngs: tuple[bytes, ...]

    def file_name(self, row: int) -> str:
        """The file of one picture, below the report's images/."""
        return f"{self.stem}-{row}.png"


def gallery(pictures: Mapping[str, Array], engines: Mapping[str, Array], pixels: bool) -> list[Column]:
    """Columns float, reference, engines, then what separates them, amplified; pictures [B, C, H, W] by name.

    An engine may have drawn the first few only, or none. Latents (`pixels` False) are shown by their first three
    channels, all in the reference's range.
    """
    reference, drawn = pictures["reference"], {target: engine for target, engine in engines.items() if len(engine)}
    low, high = (-1.0, 1.0) if pixels else (float(reference.min()), float(reference.max()))
    columns = [_column(name, name, pictures[name], low, high) for name in ("float", "reference")]
    columns += [_column(target, f"{target} engine", engine, low, high) for target, engine in drawn.items()]
    columns.append(_difference("quantization", "reference - float", reference - pictures["float"], high - low))
    for target, engine in drawn.items():
        difference = engine - reference[: len(engine)]
        columns.append(_difference(f"{target}-difference", f"{target} - reference", difference, high - low))
    return columns


def _column(stem: str, heading: str, pictures: Array, low: float, high: float) -> Column:
    unit = (np.nan_to_num(pictures) - low) / max(high - low, 1e-30)
    return Column(stem, heading, tuple(png(picture) for picture in unit))


def _difference(stem: str, heading: str, difference: Array, span: float) -> Column:
    gain = amplification(difference, span)
    unit = 0.5 + np.nan_to_num(difference) * gain / max(span, 1e-30)
    return Column(stem, f"{heading}, x{gain:,} around grey", tuple(png(picture) for picture in unit))


def amplification(difference: Array, span: float) -> int:
    """The largest gain of the table with which the difference stays within half of `span`."""
    largest = float(np.abs(np.nan_to_num(difference)).max(initial=0))
    fitting = [gain for gain in GAINS if largest * gain <= span / 2]
    return fitting[-1] if fitting and largest > 0 else GAINS[0]


def png(picture: Array) -> bytes:
    """[C, H, W] in [0, 1] -> PNG bytes; one channel is grey, of more than three the first three are shown.

    Of a video [C, frames, H, W] the first frame; tokens [rows, C] are shown as they are, one below the other.
    """
    from PIL import Image

    if picture.ndim != 3:
        picture = picture[:, 0] if picture.ndim == 4 else picture[None]
    channels = picture[:3] if len(picture) >= 3 else np.repeat(picture[:1], 3, axis=0)
    bytes_ = np.rint(np.clip(channels, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    stream = io.BytesIO()
    Image.fromarray(bytes_).save(stream, "PNG")
    return stream.getvalue()
