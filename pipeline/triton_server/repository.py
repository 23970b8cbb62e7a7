"""Writes the repository: NAME/config.pbtxt, NAME/1/model.py and NAME/bundle/, for the server's --model-repository."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from export.errors import RecipeError
from pipeline.bundle.pipeline_bundle import PipelineBundle
from pipeline.bundle.snapshot import read_verified
from pipeline.files import MANIFEST_FILE, PIPELINE_FILE
from pipeline.generate.latent_model import LatentModel
from pipeline.generate.pixel_model import makes_pixels, picture_shape

if TYPE_CHECKING:
    from pipeline.bundle.bundle import Bundle
    from pipeline.bundle.manifest_schema import File

CONFIG, SCRIPT, BUNDLE = "config.pbtxt", "1/model.py", "bundle"
NOT_RUN = "Written by `ditc export --triton`. Checked against the schema of the server's configuration, not run in one."
INPUTS = (
    ("PROMPT", "TYPE_STRING", [-1], False),
    ("NEGATIVE_PROMPT", "TYPE_STRING", [-1], True),
    ("SEED", "TYPE_INT64", [1], True),
    ("STEPS", "TYPE_INT32", [1], True),
    ("GUIDANCE", "TYPE_FP32", [1], True),
)


@dataclass(frozen=True)
class Word:
    """A word of an enumeration, which the text format does not quote."""

    name: str


Value = str | int | bool | Word | Mapping[str, "Value"] | list["Value"]


def config(name: str, channels: int, height: int, width: int, threads: int | None = None) -> dict[str, Value]:
    """ModelConfig of the model repository's schema (model_config.proto)."""
    inputs: list[Value] = [
        {"name": label, "data_type": Word(kind), "dims": list[Value](dims), **({"optional": True} if optional else {})}
        for label, kind, dims, optional in INPUTS
    ]
    pictures: Value = {"name": "IMAGES", "data_type": Word("TYPE_UINT8"), "dims": [-1, height, width, channels]}
    sentences: Value = {"name": "WARNINGS", "data_type": Word("TYPE_STRING"), "dims": [-1]}
    document: dict[str, Value] = {
        "name": name,
        "backend": "python",
        "max_batch_size": 0,
        "input": inputs,
        "output": [pictures, sentences],
        "instance_group": [{"count": 1, "kind": Word("KIND_CPU")}],
    }
    if threads is not None:
        document["parameters"] = [{"key": "threads", "value": {"string_value": str(threads)}}]
    return document


def text_format(document: Mapping[str, Value], indent: int = 0) -> str:
    """A message in the text format of protocol buffers; a list of messages is the field again and again.

    >>> print(text_format({"name": "a", "dims": [1, 2], "group": [{"kind": Word("KIND_CPU")}]}))
    name: "a"
    dims: [1, 2]
    group {
      kind: KIND_CPU
    }
    """
    lines, space = [], " " * indent
    for key, value in document.items():
        if isinstance(value, list) and not any(isinstance(entry, Mapping) for entry in value):
            lines.append(f"{space}{key}: [{', '.join(map(_scalar, value))}]")
            continue
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, Mapping):
                lines += [f"{space}{key} {{", text_format(entry, indent + 2), f"{space}}}"]
            else:
                lines.append(f"{space}{key}: {_scalar(entry)}")
    return "\n".join(lines)


def _scalar(value: object) -> str:
    if isinstance(value, Word):
        return value.name
    return str(value).lower() if isinstance(value, bool) else json.dumps(value)  # ASCII, as protobuf's own escapes


def model_name(bundle: Bundle | PipelineBundle) -> str:
    """The engine's, in characters that a folder may have."""
    return re.sub(r"[^\w.-]", "_", bundle.name)


def shape_of(bundle: Bundle | PipelineBundle) -> tuple[int, int, int]:
    """Channels, height and width of a picture. Raises RecipeError for a bundle that the model's script does not draw
    with."""
    if isinstance(bundle, PipelineBundle):
        with bundle.source() as source:
            model = LatentModel(source)
        return model.channels, model.height, model.width
    if not makes_pixels(bundle):
        raise RecipeError(f"{bundle.path} draws no pixels by itself; `Pipeline` does not take it, nor does a server")
    return picture_shape(bundle)


def write(bundle: Bundle | PipelineBundle, folder: Path, threads: int | None = None) -> str:
    """Write the repository into a new folder; returns the model's name. The bundle's files are hashed on their way.

    Raises RecipeError for a bundle that the server could not draw with.
    """
    stated = config(model_name(bundle), *shape_of(bundle), threads)
    place = folder / model_name(bundle)
    (place / SCRIPT).parent.mkdir(parents=True)
    (place / CONFIG).write_text(f"# {NOT_RUN}\n{text_format(stated)}\n", encoding="utf-8")
    script = resources.files("pipeline.triton_server") / "model.py"
    (place / SCRIPT).write_text(script.read_text(encoding="utf-8"), encoding="utf-8")
    for name, row in sealed(bundle):
        output = place / BUNDLE / name
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("xb") as opened:
            read_verified(bundle.path, name, row, opened)
    own = PIPELINE_FILE if isinstance(bundle, PipelineBundle) else MANIFEST_FILE
    shutil.copyfile(bundle.path / own, place / BUNDLE / own)  # is what seals the others
    return model_name(bundle)


def sealed(bundle: Bundle | PipelineBundle) -> Iterator[tuple[str, File]]:
    """Every file of a bundle but its manifest, by its name there: size and hash."""
    yield from bundle.manifest["files"].items()
    if not isinstance(bundle, PipelineBundle):
        return
    for name, part in bundle.components.items():
        stated = bundle.manifest["components"][name]["sha256"]
        yield f"{name}/{MANIFEST_FILE}", {"size": (part.path / MANIFEST_FILE).stat().st_size, "sha256": stated}
        yield from ((f"{name}/{file}", row) for file, row in part.manifest["files"].items())
