"""Schema of generation.json: how a model makes pictures, and how prompts become its inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from annotated_types import Ge, Gt, Le, MinLen
from typing_extensions import TypedDict

from export.documents import Rules, shown, validated
from export.errors import ContractError
from export.models.description import GENERATION_FILE
from export.names import inside
from pipeline.generate.scene_grammar import ALONE, NONE, SLOT_NAMES, Slot

RULES = Rules()
# Elements of one sample of a made-up input.
MOST_ELEMENTS = 2**24

Index = Annotated[int, Ge(0), Le(2**31)]
Words = Annotated[list[str], MinLen(1)]


class Vocabulary(TypedDict):
    """embedding: a safetensors file beside this one; tensor: its table [words, D]."""

    kind: Literal["vocabulary"]
    embedding: str
    tensor: str
    null_token: Index
    slots: list[Slot]
    examples: NotRequired[list[str]]


class Classes(TypedDict):
    """names: of the classes, by index."""

    kind: Literal["classes"]
    names: Words
    null_class: Index
    examples: NotRequired[list[str]]


class SyntheticInput(TypedDict):
    """shape: without the batch. value: of all elements; without it normal numbers."""

    shape: list[Annotated[int, Ge(0), Le(MOST_ELEMENTS)]]
    dtype: NotRequired[Literal["float32", "float16", "float64", "int64", "int32", "bool"]]
    value: NotRequired[float | bool]


class Synthetic(TypedDict):
    """Random inputs by name."""

    kind: Literal["synthetic"]
    inputs: dict[str, SyntheticInput]
    examples: NotRequired[list[str]]


Conditioning = Vocabulary | Classes | Synthetic


class GenerationFile(TypedDict):
    """Without `conditioning`, whose schema goes by its kind."""

    sampler: str
    conditioning: dict[str, object]
    timestep_scale: NotRequired[Annotated[float, Gt(0), Le(1e6)]]
    guidance_scale: NotRequired[Annotated[float, Ge(-1e4), Le(1e4)]]
    n_steps: NotRequired[Annotated[int, Ge(1), Le(1000)]]
    output: NotRequired[Literal["pixels", "latents"]]


SCHEMAS: dict[str, type[Conditioning]] = {"vocabulary": Vocabulary, "classes": Classes, "synthetic": Synthetic}
SUFFIX = ".safetensors"


def check(document: Mapping[str, Any], folder: Path) -> None:
    """Raise ContractError for what a generation.json in `folder` may not say."""
    path = folder / GENERATION_FILE
    validated(document, str(path), GenerationFile, RULES)
    conditioning = document["conditioning"]
    kind = conditioning.get("kind")
    if not isinstance(kind, str) or kind not in SCHEMAS:
        raise ContractError(f"{path}: kind {kind!r}; use one of {', '.join(SCHEMAS)}")
    validated(conditioning, f"{path}: conditioning", SCHEMAS[kind], RULES)
    if kind == "vocabulary":
        embedding_path(folder, conditioning["embedding"])
        _check_slots(conditioning["slots"], path)
    if kind == "synthetic":
        _check_sizes(conditioning["inputs"], path)


def embedding_path(folder: Path, name: str) -> Path:
    """The file of the token embedding: beside generation.json, and by its ending none of a bundle's other files."""
    path = folder / GENERATION_FILE
    if "/" in name or not name.endswith(SUFFIX):
        raise ContractError(f"{path}: embedding {name!r} leaves the folder, or is no {SUFFIX} file; name one beside it")
    return inside(folder, name, path)


def _check_slots(slots: Sequence[Slot], path: Path) -> None:
    """A scene has these six slots, some of which may stay empty."""
    names = [slot["name"] for slot in slots]
    if sorted(names) != sorted(SLOT_NAMES):
        raise ContractError(f"{path}: slots are {shown(names)}; a scene has {', '.join(SLOT_NAMES)}, each once")
    words = {slot["name"]: set(slot["words"]) - {ALONE, NONE} for slot in slots}
    if bare := [name for name, known in words.items() if not known]:
        raise ContractError(f"{path}: slot {bare[0]!r} has no word; give at least one")
    empty = {"relation": ALONE, "second colour": NONE, "second shape": NONE}
    for slot in slots:
        if slot["name"] in empty and empty[slot["name"]] not in slot["words"]:
            raise ContractError(f"{path}: slot {slot['name']!r} has no word {empty[slot['name']]!r} for an empty place")


def _check_sizes(inputs: Mapping[str, SyntheticInput], path: Path) -> None:
    for name, row in inputs.items():
        if math.prod(row["shape"]) > MOST_ELEMENTS:
            raise ContractError(f"{path}: input {name} of shape {row['shape']} has more than {MOST_ELEMENTS} elements")
