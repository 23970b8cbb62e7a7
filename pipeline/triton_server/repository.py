"""Writes the repository: NAME/config.pbtxt, NAME/1/model.py and NAME/bundle/, for the server's --model-repository."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from export.errors import RecipeError
from pipeline.bundle.snapshot import read_verified
from pipeline.files import MANIFEST_FILE
from pipeline.generate.pixel_model import makes_pixels, picture_shape

if TYPE_CHECKING:
    from pipeline.bundle.bundle import Bundle

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
    document: dict[str, Value] = {
        "name": name,
        "backend": "python",
        "max_batch_size": 0,
        "input": inputs,
        "output": [pictures],
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


def model_name(bundle: Bundle) -> str:
    """The engine's, in characters that a folder may have."""
    return re.sub(r"[^\w.-]", "_", bundle.name)


def refuse(bundle: Bundle) -> None:
    """Raise RecipeError for a bundle that the model's script does not draw with."""
    if not makes_pixels(bundle):
        raise RecipeError(f"{bundle.path} draws no pixels by itself; `Pipeline` does not take it, nor does a server")


def write(bundle: Bundle, folder: Path, threads: int | None = None) -> str:
    """Write the repository into a new folder; returns the model's name. The bundle's files are hashed on their way.

    Raises RecipeError for a bundle that the server could not draw with.
    """
    refuse(bundle)
    name = model_name(bundle)
    place = folder / name
    (place / SCRIPT).parent.mkdir(parents=True)
    stated = config(name, *picture_shape(bundle), threads)
    (place / CONFIG).write_text(f"# {NOT_RUN}\n{text_format(stated)}\n", encoding="utf-8")
    script = resources.files("pipeline.triton_server") / "model.py"
    (place / SCRIPT).write_text(script.read_text(encoding="utf-8"), encoding="utf-8")
    for file, row in bundle.manifest["files"].items():
        (place / BUNDLE / file).parent.mkdir(parents=True, exist_ok=True)
        with (place / BUNDLE / file).open("xb") as output:
            read_verified(bundle.path, file, row, output)
    shutil.copyfile(bundle.path / MANIFEST_FILE, place / BUNDLE / MANIFEST_FILE)
    return name
