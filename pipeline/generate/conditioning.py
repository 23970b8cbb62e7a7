"""Prompts to model inputs, as the `generation.json` beside a model or in a bundle describes it. NumPy only."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from export.documents import read_json
from export.errors import ContractError, RecipeError
from export.models.description import GENERATION_FILE
from pipeline.backends.base import Arrays
from pipeline.generate.generation_file import (
    RULES,
    Classes,
    Conditioning,
    Synthetic,
    SyntheticInput,
    Vocabulary,
    check,
    embedding_path,
)
from pipeline.generate.scene_grammar import token_ids

CLASS_PREFIXES = ("a", "an", "the", "class", "digit")


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

    def encode(self, prompts: list[str]) -> tuple[Arrays, Arrays]:
        """Model inputs of B prompts, and of B empty prompts. Raises RecipeError for a prompt outside the grammar."""
        if not prompts:
            raise RecipeError("no prompt was given; give at least one")
        if self.conditioning["kind"] == "vocabulary":
            return _vocabulary(self.conditioning, prompts, self.folder)
        if self.conditioning["kind"] == "classes":
            return _classes(self.conditioning, prompts)
        return _synthetic(self.conditioning, prompts)

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
    return from_dict(read_json(path, dict[str, Any], RULES), folder)


def from_dict(document: Mapping[str, Any], folder: Path) -> Generation:
    """The description in `document`; keys that generating does not need are left alone. Raises ContractError."""
    check(document, folder)
    known = {
        key: value for key, value in document.items() if key in Generation.__dataclass_fields__ and key != "folder"
    }
    return Generation(folder=folder, **known)


def _vocabulary(conditioning: Vocabulary, prompts: list[str], folder: Path) -> tuple[Arrays, Arrays]:
    """Token embeddings: encoder_hidden_states [B, slots, D] and a mask of ones; `null_token` is the empty prompt."""
    path, null_token = embedding_path(folder, conditioning["embedding"]), conditioning["null_token"]
    table = _table(path, conditioning["tensor"])
    ids = np.stack([token_ids(prompt, conditioning["slots"]) for prompt in prompts])
    if ids.max() >= len(table):
        raise ContractError(f"{path}: {len(table)} rows, but the vocabulary reaches token {ids.max()}")
    if null_token >= len(table):
        raise ContractError(f"{path}: {len(table)} rows, but null_token is {null_token}")
    mask = np.ones(ids.shape, np.float32)
    prompted, plain = table[ids], table[np.full_like(ids, null_token)]
    return _captions(prompted, mask), _captions(plain, mask)


def _table(path: Path, tensor: str) -> NDArray[np.float32]:
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


def _captions(states: NDArray[np.float32], mask: NDArray[np.float32]) -> Arrays:
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


def _classes(conditioning: Classes, prompts: list[str]) -> tuple[Arrays, Arrays]:
    """Class indices: class_labels [B] int64; `null_class` is the empty prompt."""
    labels = np.array([_class_index(prompt, conditioning["names"]) for prompt in prompts], np.int64)
    return {"class_labels": labels}, {"class_labels": np.full_like(labels, conditioning["null_class"])}


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


def _synthetic(conditioning: Synthetic, prompts: list[str]) -> tuple[Arrays, Arrays]:
    """Random inputs of the right shapes, seeded by the prompt: for models whose text encoder is not here."""
    inputs = conditioning["inputs"]
    prompted = {name: _random_rows(row, prompts) for name, row in inputs.items()}
    return prompted, {name: _random_rows(row, [""] * len(prompts)) for name, row in inputs.items()}


def _random_rows(row: SyntheticInput, prompts: list[str]) -> NDArray[np.generic]:
    """One row for each prompt: {"shape": without the batch, "dtype"} normal numbers, or all equal to "value"."""
    shape, dtype = tuple(row["shape"]), np.dtype(row.get("dtype", "float32"))
    if "value" in row:
        return np.broadcast_to(np.asarray(row["value"], dtype), (len(prompts), *shape)).copy()
    seeds = [zlib.crc32(prompt.encode()) for prompt in prompts]
    return np.stack([np.random.default_rng(seed).standard_normal(shape) for seed in seeds]).astype(dtype)
