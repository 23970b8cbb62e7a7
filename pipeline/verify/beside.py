"""Two bundles side by side: what they are made of, layer by layer, where they differ, and their pictures."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.errors import ContractError, RecipeError
from pipeline.bundle.bundle import Bundle
from pipeline.bundle.manifest_schema import Layer, Manifest
from pipeline.verify.pictures import amplification, png
from pipeline.verify.record import AnyBundle, components

IMAGE = re.compile(r"report/images/([\w.-]+)-(\d+)\.png")
# Columns of a report that are differences themselves.
DERIVED = re.compile(r"quantization|.+-difference")
ABSENT = "-"
# Of a picture of a report: 8192 x 8192, larger than any that is drawn.
MOST_PIXELS = 2**26


@dataclass(frozen=True)
class Pair:
    """Something that two bundles say, in words; "-" where one says nothing."""

    name: str
    a: str
    b: str

    @property
    def differs(self) -> bool:
        return self.a != self.b


@dataclass(frozen=True)
class Beside:
    """A component of both, "" of bundles of one model. facts: of each, equal ones too; formats: "weights x activations"
    to the number of linears; layers, recipe: where they differ alone."""

    component: str
    facts: Sequence[Pair]
    formats: Sequence[Pair]
    layers: Sequence[Pair]
    recipe: Sequence[Pair]


@dataclass(frozen=True)
class Drawn:
    """One picture of both reports as PNG, None where a bundle has none; difference: of B from A, amplified by `gain`,
    around grey; largest: of it, in 255ths."""

    column: str
    row: int
    a: bytes | None
    b: bytes | None
    difference: bytes | None
    gain: int
    largest: int


def beside(a: AnyBundle, b: AnyBundle) -> list[Beside]:
    """Each component of either bundle. Raises RecipeError where one is a pipeline and the other is not."""
    if isinstance(a, Bundle) != isinstance(b, Bundle):
        pipeline, single = (b, a) if isinstance(a, Bundle) else (a, b)
        raise RecipeError(
            f"{pipeline.path} is a pipeline and {single.path} a bundle of one model; give a component of it, as "
            f"{pipeline.path / 'transformer'}"
        )
    ours, theirs = components(a), components(b)
    return [_beside(name, ours.get(name), theirs.get(name)) for name in dict.fromkeys((*ours, *theirs))]


def _beside(name: str, a: Bundle | None, b: Bundle | None) -> Beside:
    sides = (a, b)
    manifests = [None if side is None else side.manifest for side in sides]
    recipes = [{} if side is None else dict(_flat(side.recipe.document())) for side in sides]
    return Beside(
        component=name,
        facts=_pairs(*({} if side is None else _facts(side) for side in sides)),
        formats=_pairs(*map(_formats, manifests)),
        layers=[row for row in _pairs(*map(_layers, manifests)) if row.differs],
        recipe=[row for row in _pairs(*recipes) if row.differs],
    )


def _pairs(a: Mapping[str, str], b: Mapping[str, str]) -> list[Pair]:
    return [Pair(name, a.get(name, ABSENT), b.get(name, ABSENT)) for name in dict.fromkeys((*a, *b))]


def _facts(bundle: Bundle) -> dict[str, str]:
    manifest = bundle.manifest
    model, counts, sizes = manifest["model"], manifest["counts"], manifest["bytes"]
    return {
        "recipe": manifest["engine"],
        "model": model["source"],
        "weights of the model": model["sha256"][:16],
        "targets": ", ".join(bundle.targets),
        "linears quantized, kept": f"{counts['quantized']}, {counts['kept']}",
        "attention": bundle.recipe.attention.text(),
        "quantized weights, bytes": f"{sizes['quantized_weights']:,}",
        "all files, bytes": f"{sizes['all_files']:,}",
        "built": manifest["created"],
        "on": str(manifest["machine"].get("cpu", ABSENT)),
        **manifest["tools"],
    }


def _formats(manifest: Manifest | None) -> dict[str, str]:
    return {} if manifest is None else {pair: str(count) for pair, count in manifest["counts"]["formats"].items()}


def _layers(manifest: Manifest | None) -> dict[str, str]:
    return {} if manifest is None else {row["name"]: _layer_text(row) for row in manifest["layers"]}


def _layer_text(row: Layer) -> str:
    group = f" {row['group_size']}" if row["group_size"] else ""
    text = f"{row['weight_format']} {row['granularity']}{group} x {row['activation_format']}"
    scaling = row.get("activation_scaling", "per_token")
    return f"{text}{'' if scaling == 'per_token' else f' {scaling}'}, {row['size_bytes']:,} bytes"


def _flat(table: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The keys of a nested table with dots, and their values as texts."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


# --- pictures ---------------------------------------------------------------------------------------------------------


def drawn_from_equal_noise(a: Bundle, b: Bundle) -> bool:
    """Do the reports of both show the same prompts, from the same noise, by as many steps?"""
    same = (a.recipe.sampling, a.manifest["model"]["family"]) == (b.recipe.sampling, b.manifest["model"]["family"])
    return same and a.manifest["model"]["sha256"] == b.manifest["model"]["sha256"]


def drawn(a: Bundle, b: Bundle) -> list[Drawn]:
    """The pictures of both reports, by column (float, reference, a target) and row; none of a model without any."""
    ours, theirs = report_pictures(a), report_pictures(b)
    return [_drawn(*place, ours.get(place), theirs.get(place)) for place in {**ours, **theirs}]


def report_pictures(bundle: Bundle) -> dict[tuple[str, int], bytes]:
    """The PNG files of a report, in the order of rows, by column and row."""
    with bundle.copied(IMAGE.fullmatch) as private:
        found = {}
        for name in private.manifest["files"]:
            match = IMAGE.fullmatch(name)
            if match and not DERIVED.fullmatch(match[1]):
                path = private.path / name
                found[match[1], int(match[2])] = path.read_bytes()
                _refuse_no_picture(path)
    return dict(sorted(found.items(), key=lambda item: item[0][1]))


def _drawn(column: str, row: int, a: bytes | None, b: bytes | None) -> Drawn:
    one, other = (None if picture is None else _array(picture) for picture in (a, b))
    if one is None or other is None or one.shape != other.shape:
        return Drawn(column, row, a, b, None, 1, 0)
    difference = other - one
    gain = amplification(difference, 1.0)
    largest = int(np.rint(np.abs(difference).max(initial=0) * 255))
    return Drawn(column, row, a, b, png(0.5 + difference * gain), gain, largest)


def _refuse_no_picture(path: Path) -> None:
    """Raise ContractError for a file that is no PNG of a bearable size: a bundle may come from a stranger."""
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as image:
            small = image.width * image.height <= MOST_PIXELS
            if small:
                image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ContractError(f"{path} is no picture that can be read ({error}); build the bundle again") from error
    if not small:
        raise ContractError(
            f"{path} has more than {MOST_PIXELS:,} pixels, which no build makes; build the bundle again"
        )


def _array(picture: bytes) -> NDArray[np.float64]:
    """[3, H, W] from 0 to 1."""
    from PIL import Image

    with Image.open(io.BytesIO(picture)) as image:
        return np.asarray(image.convert("RGB"), np.float64).transpose(2, 0, 1) / 255
