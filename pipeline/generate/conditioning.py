"""generation.json, beside a model or in a bundle: how the model makes pictures, and how prompts become its inputs.

Its schema, whose part for the conditioning goes by its kind, and the inputs that it describes. NumPy only.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, NotRequired

import numpy as np
from annotated_types import Ge, Gt, Le, MinLen
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file
from typing_extensions import TypedDict

from export.documents import Rules, read_json, shown, validated
from export.errors import ContractError, RecipeError
from export.models.description import GENERATION_FILE
from export.names import inside
from pipeline.backends.base import Arrays
from pipeline.generate.scene_grammar import ALONE, NONE, SLOT_NAMES, Slot, token_ids
from pipeline.recipe import MOST_STEPS

RULES = Rules()
CLASS_PREFIXES = ("a", "an", "the", "class", "digit")
# Elements of one sample of a made-up input.
MOST_ELEMENTS = 2**24

Index = Annotated[int, Ge(0), Le(2**31)]
Words = Annotated[list[str], MinLen(1)]
# Beyond what any model was drawn with; no product with a prediction overflows.
MOST_GUIDANCE = 100.0
GuidanceScale = Annotated[float, Ge(0), Le(MOST_GUIDANCE)]  # that a model may state as its own
StepCount = Annotated[int, Ge(1), Le(MOST_STEPS)]
Table = NDArray[np.float32]


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
    guidance_scale: NotRequired[GuidanceScale]
    n_steps: NotRequired[StepCount]
    output: NotRequired[Literal["pixels", "latents"]]


SCHEMAS: dict[str, type[Conditioning]] = {"vocabulary": Vocabulary, "classes": Classes, "synthetic": Synthetic}
SUFFIX = ".safetensors"


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


def _check_elements(inputs: Mapping[str, SyntheticInput], path: Path) -> None:
    for name, row in inputs.items():
        if math.prod(row["shape"]) > MOST_ELEMENTS:
            raise ContractError(f"{path}: input {name} of shape {row['shape']} has more than {MOST_ELEMENTS} elements")


# --- what it describes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Generation:
    """How a model makes pictures: sampler, guidance, kind of output ("pixels" or "latents") and conditioning.

    `folder` holds the files that `conditioning` names.
    """

    folder: Path
    sampler: str
    conditioning: Conditioning
    timestep_scale: float = 1000.0
    guidance_scale: float = 2.0
    n_steps: int = 20
    output: str = "pixels"

    def encode(self, prompts: list[str], negative_prompts: Sequence[str | None] = ()) -> tuple[Arrays, Arrays]:
        """Model inputs of B prompts, and of B negative ones. (), None and "" among them are the empty prompt.

        Raises RecipeError for a prompt outside the grammar.
        """
        if not prompts:
            raise RecipeError("no prompt was given; give at least one")
        negative = [prompt or None for prompt in negative_prompts or [None] * len(prompts)]
        return self._inputs(prompts), self._inputs(negative)

    def _inputs(self, prompts: Sequence[str | None]) -> Arrays:
        """Of B prompts; None is the empty one."""
        if self.conditioning["kind"] == "vocabulary":
            return _vocabulary(self.conditioning, prompts, self.table, self.folder)
        if self.conditioning["kind"] == "classes":
            return _classes(self.conditioning, prompts)
        return _synthetic(self.conditioning, prompts)

    @cached_property
    def table(self) -> Table | None:
        """The token embedding [words, D] of a vocabulary, read once; None of other kinds. Raises ContractError."""
        if self.conditioning["kind"] != "vocabulary":
            return None
        return _table(embedding_path(self.folder, self.conditioning["embedding"]), self.conditioning["tensor"])

    def loaded(self) -> Generation:
        """This description with the contents of its files in memory, so that they may go."""
        _ = self.table
        return self

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files that a copy of this description needs beside it."""
        if self.conditioning["kind"] == "vocabulary":
            return GENERATION_FILE, self.conditioning["embedding"]
        return (GENERATION_FILE,)


def load_generation(folder: Path) -> Generation:
    """Read `generation.json` of a model folder or bundle. Raises ContractError if it is missing or damaged."""
    path = folder / GENERATION_FILE
    if not path.is_file():
        raise ContractError(f"{path} is missing; it says how prompts become inputs. Build the bundle again")
    return from_dict(read_json(path, dict[str, object], RULES), folder)


def from_dict(document: Mapping[str, object], folder: Path) -> Generation:
    """The description in `document`; keys that generating does not need are left alone.

    Raises ContractError for what a generation.json in `folder` may not say.
    """
    path = folder / GENERATION_FILE
    stated = validated(document, str(path), GenerationFile, RULES)
    kind = stated["conditioning"].get("kind")
    if not isinstance(kind, str) or kind not in SCHEMAS:
        raise ContractError(f"{path}: kind {kind!r}; use one of {', '.join(SCHEMAS)}")
    conditioning = validated(stated["conditioning"], f"{path}: conditioning", SCHEMAS[kind], RULES)
    if conditioning["kind"] == "vocabulary":
        embedding_path(folder, conditioning["embedding"])
        _check_slots(conditioning["slots"], path)
    elif conditioning["kind"] == "synthetic":
        _check_elements(conditioning["inputs"], path)
    return Generation(
        folder=folder,
        sampler=stated["sampler"],
        conditioning=conditioning,
        timestep_scale=stated.get("timestep_scale", Generation.timestep_scale),
        guidance_scale=stated.get("guidance_scale", Generation.guidance_scale),
        n_steps=stated.get("n_steps", Generation.n_steps),
        output=stated.get("output", Generation.output),
    )


def _vocabulary(conditioning: Vocabulary, prompts: Sequence[str | None], table: Table | None, folder: Path) -> Arrays:
    """Token embeddings: encoder_hidden_states [B, slots, D] and a mask of ones; `null_token` is the empty prompt."""
    assert table is not None
    path, null_token = embedding_path(folder, conditioning["embedding"]), conditioning["null_token"]
    nothing = np.full(len(conditioning["slots"]), null_token, np.int64)
    ids = np.stack([nothing if text is None else token_ids(text, conditioning["slots"]) for text in prompts])
    if null_token >= len(table):
        raise ContractError(f"{path}: {len(table)} rows, but null_token is {null_token}")
    if ids.max() >= len(table):
        raise ContractError(f"{path}: {len(table)} rows, but the vocabulary reaches token {ids.max()}")
    return {"encoder_hidden_states": table[ids], "encoder_attention_mask": np.ones(ids.shape, np.float32)}


def _table(path: Path, tensor: str) -> Table:
    """The token embedding [words, D] float32."""
    if not path.is_file():
        raise ContractError(f"{path} is missing; it holds the token embedding. Build the bundle again")
    try:
        table = load_file(path).get(tensor)
    except (SafetensorError, OSError) as error:
        raise ContractError(f"{path}: not a whole safetensors file ({error}); build the bundle again") from error
    if table is None or table.ndim != 2 or not np.issubdtype(table.dtype, np.floating):
        kind = "no tensor" if table is None else f"a {table.dtype} tensor of shape {table.shape}"
        remedy = "it holds the token embedding [words, D]. Build the bundle again"
        raise ContractError(f"{path}: {kind} {tensor!r}; {remedy}")
    return table.astype(np.float32)


def _classes(conditioning: Classes, prompts: Sequence[str | None]) -> Arrays:
    """Class indices: class_labels [B] int64; `null_class` is the empty prompt."""
    names, nothing = conditioning["names"], conditioning["null_class"]
    return {"class_labels": np.array([nothing if p is None else _class_index(p, names) for p in prompts], np.int64)}


def _class_index(prompt: str, names: list[str]) -> int:
    """Index of the class that `prompt` names, with or without words such as "a" and "digit" before it."""
    known = {name.lower(): index for index, name in enumerate(names)}
    words = prompt.lower().strip(" .").split()
    while " ".join(words) not in known and words and words[0] in CLASS_PREFIXES:
        words = words[1:]
    if " ".join(words) not in known:
        shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
        raise RecipeError(f"prompt {prompt!r} is not a class; use one of {shown}")
    return known[" ".join(words)]


def _synthetic(conditioning: Synthetic, prompts: Sequence[str | None]) -> Arrays:
    """Random inputs of the right shapes, seeded by the prompt: for models whose text encoder is not here."""
    texts = [prompt or "" for prompt in prompts]
    return {name: _random_rows(row, texts) for name, row in conditioning["inputs"].items()}


def _random_rows(row: SyntheticInput, prompts: Sequence[str]) -> NDArray[np.generic]:
    """One row for each prompt: {"shape": without the batch, "dtype"} normal numbers, or all equal to "value"."""
    shape, dtype = tuple(row["shape"]), np.dtype(row.get("dtype", "float32"))
    if "value" in row:
        return np.broadcast_to(np.asarray(row["value"], dtype), (len(prompts), *shape)).copy()
    seeds = [zlib.crc32(prompt.encode()) for prompt in prompts]
    return np.stack([np.random.default_rng(seed).standard_normal(shape) for seed in seeds]).astype(dtype)
