"""Weights files: safetensors in one file or in shards, of one variant, memory-mapped.

Pickles (.bin, .pt) are refused, because reading one runs code from the file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from typing_extensions import TypedDict

from export.documents import Rules, open_file, read_json, sha256
from export.errors import ModelError
from export.names import inside

if TYPE_CHECKING:
    import torch

STEM = "diffusion_pytorch_model"
WEIGHTS_FILE, INDEX_FILE = f"{STEM}.safetensors", f"{STEM}.safetensors.index.json"
# The files of a folder in order of preference, a single file before its shards. "*": a dot and the variant, or nothing;
# diffusers has named the index of a variant's shards in both ways.
FILES = (
    f"{STEM}*.safetensors",
    "model*.safetensors",
    f"{STEM}*.safetensors.index.json",
    f"{STEM}.safetensors.index*.json",
    "model*.safetensors.index.json",
    "model.safetensors.index*.json",
)
# A name such as fp16 or non_ema; "fp16-00001-of-00002" is a shard of one.
VARIANT = r"(?!.*\d-of-\d)[A-Za-z0-9][\w-]*"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
NOT_READ = (*PICKLES, ".gguf")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors")
MERGE = (
    "merge the adapter: load its base into a diffusers pipeline, pipe.load_lora_weights(adapter), pipe.fuse_lora(), "
    "pipe.unload_lora_weights(), pipe.save_pretrained(folder), and give that folder"
)
GIVE_ADAPTER = f"give the folder of its base model, and the adapter with --lora FILE; or {MERGE}"
NO_GGUF = "it holds weights that are quantized already; give the float model that it was made from, as safetensors"
NO_PICKLE = (
    "is a pickle, which can run code when read; load it where you trust it and save it again with "
    "model.save_pretrained(folder, safe_serialization=True), or safetensors.torch.save_file(state_dict, path)"
)
REFETCH = "copy or download the file again"


class Index(TypedDict):
    """An index of shards: tensor to the name of its file."""

    weight_map: dict[str, str]


@dataclass(frozen=True)
class WeightsFiles:
    """The files of one model. `shard_of` names the file of every tensor in a sharded model; empty for one file."""

    folder: Path
    names: tuple[str, ...]
    shard_of: Mapping[str, str]

    @cached_property
    def size_bytes(self) -> int:
        return sum((self.folder / name).stat().st_size for name in self.names)

    def sha256(self) -> str:
        """sha256 of the file; for shards, of the lines "name sha256" in order of names."""
        digests = {name: sha256(self.folder / name, ModelError, REFETCH) for name in self.names}
        if len(digests) == 1:
            return next(iter(digests.values()))
        lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
        return hashlib.sha256(lines.encode()).hexdigest()

    def refuse_damaged(self) -> None:
        """Raise ModelError for a file that is no whole safetensors file, by its header and length."""
        for name in self.names:
            with _open(self.folder / name):
                pass

    def metadata(self) -> dict[str, str]:
        """The texts in the header of the first file."""
        with _open(self.folder / self.names[0]) as tensors:
            return dict(tensors.metadata() or {})

    def tensors(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Yield (file name, tensor name, torch tensor backed by the mapped file)."""
        for name in self.names:
            path = self.folder / name
            with _open(path) as tensors:
                held = set(tensors.keys())
                stated = {key for key, shard in self.shard_of.items() if shard == name}
                if stated - held:
                    raise ModelError(f"{path}: tensor {min(stated - held)} is missing; {REFETCH}")
                for key in sorted(held):
                    yield name, key, _tensor(tensors, path, key)


def _open(path: Path) -> safe_open:
    open_file(path, ModelError, REFETCH).close()  # refuses what is no file, for which safe_open would wait
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a whole safetensors file ({error}); {REFETCH}") from error


def _tensor(tensors: safe_open, path: Path, key: str) -> torch.Tensor:
    try:
        return tensors.get_tensor(key)
    except (SafetensorError, AttributeError, ValueError) as error:  # a type that this torch or safetensors lacks
        kind = tensors.get_slice(key).get_dtype()
        raise ModelError(
            f"{path}: tensor {key} is {kind}, which is not a weight's type; give the float model"
        ) from error


def find_weights(folder: Path, variant: str = "") -> WeightsFiles:
    """The weight files of a diffusers model folder. Raises ModelError if there is none that can be read.

    variant: as in diffusers, the "fp16" of diffusion_pytorch_model.fp16.safetensors. Without one, the files without
    one, else those of the only variant there is; two variants may be two models, so that they are not chosen between.
    """
    variants = _variants(folder)
    files = _files(folder, variant) if variant in ("", *variants) else None
    if variant and files is None:
        there = ", ".join(variants) or ("only one without a name" if _files(folder) else "none")
        raise ModelError(f"{folder} has no weights of the variant {variant!r}; the variants there: {there}")
    if files is None and len(variants) > 1:
        raise ModelError(
            f"{folder} has the variants {', '.join(variants)} and no plain file; choose one with --variant"
        )
    files = files or (_files(folder, variants[0]) if variants else None)
    if files is None:
        remedy = what_instead(folder) or "copy or download it again"
        raise ModelError(f"{folder} has no {WEIGHTS_FILE} and no {INDEX_FILE}; {remedy}")
    return files


def _files(folder: Path, variant: str = "") -> WeightsFiles | None:
    """The files of a variant, "" for the plain ones; None if the folder has none."""
    names = (name.replace("*", f".{variant}" if variant else "") for name in FILES)
    name = next((name for name in names if (folder / name).is_file()), None)
    if name is None:
        return None
    return _sharded(folder, name) if name.endswith(".json") else WeightsFiles(folder, (name,), {})


def _variants(folder: Path) -> list[str]:
    """The variants in a folder, by the names of its files."""
    patterns = [re.escape(name).replace(re.escape("*"), rf"\.({VARIANT})") for name in FILES]
    matches = (re.fullmatch(pattern, path.name) for path in folder.iterdir() for pattern in patterns)
    return sorted({match[1] for match in matches if match})


def what_instead(folder: Path) -> str | None:
    """What a folder without a model that can be read holds instead, with the remedy; None if nothing known."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    for names_of_kind, text in (
        ([name for name in names if name in ADAPTER_FILES], f"is an adapter, not a model; {GIVE_ADAPTER}"),
        ([name for name in names if name.endswith(".gguf")], f"is GGUF; {NO_GGUF}"),
        ([name for name in names if name.endswith(PICKLES)], NO_PICKLE),
    ):
        if names_of_kind:
            return f"{folder / names_of_kind[0]} {text}"
    return None


def weights_file(path: Path) -> WeightsFiles:
    """One weights file that is given by itself. Raises ModelError unless it is safetensors."""
    if path.name.endswith(".safetensors"):
        return WeightsFiles(path.parent, (path.name,), {})
    if path.name.endswith(".gguf"):
        raise ModelError(f"{path} is GGUF; {NO_GGUF}")
    if path.name.endswith(PICKLES):
        raise ModelError(f"{path} {NO_PICKLE}")
    raise ModelError(f"{path} is not a .safetensors file; give a diffusers folder or a .safetensors file")


def _sharded(folder: Path, index_name: str) -> WeightsFiles:
    path = folder / index_name
    shard_of = read_json(path, Index, Rules(ModelError, REFETCH))["weight_map"]
    names = tuple(sorted(set(shard_of.values())))
    for name in names:
        inside(folder, name, path, ModelError)
        if "/" in name:
            raise ModelError(f"{path}: shard {name!r} leaves the folder; an index may only name files beside it")
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name}: this shard is missing; {REFETCH}")
    return WeightsFiles(folder, names, shard_of)
