"""Weights of a diffusers folder: safetensors in one file or in shards, memory-mapped and checked.

Pickles (.bin, .pt) are refused, because reading one runs code from the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from typing_extensions import TypedDict

from export.documents import Rules, open_file, read_json
from export.errors import ModelError
from export.names import inside

STEM = "diffusion_pytorch_model"
# In order of preference: full precision first, then the fp16 variant; a single file before its shards.
SINGLE_FILES = (f"{STEM}.safetensors", f"{STEM}.fp16.safetensors", "model.safetensors")
INDEX_FILES = (
    f"{STEM}.safetensors.index.json",
    f"{STEM}.fp16.safetensors.index.json",
    f"{STEM}.safetensors.index.fp16.json",
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
REFETCH = "copy or download the file again"
CHUNK_BYTES = 1 << 22


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
        digests = {name: file_sha256(self.folder / name) for name in self.names}
        if len(digests) == 1:
            return next(iter(digests.values()))
        lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
        return hashlib.sha256(lines.encode()).hexdigest()

    def refuse_damaged(self) -> None:
        """Raise ModelError for a file that is no whole safetensors file, by its header and length."""
        for name in self.names:
            with _open(self.folder / name):
                pass

    def tensors(self) -> Iterator[tuple[str, str, Any]]:
        """Yield (file name, tensor name, torch tensor backed by the mapped file)."""
        for name in self.names:
            with _open(self.folder / name) as tensors:
                found = set(tensors.keys())
                stated = {key for key, shard in self.shard_of.items() if shard == name}
                if stated - found:
                    raise ModelError(f"{self.folder / name}: tensor {min(stated - found)} is missing; {REFETCH}")
                for key in sorted(found):
                    yield name, key, tensors.get_tensor(key)


def _open(path: Path) -> Any:
    open_file(path, ModelError, REFETCH).close()  # refuses what is no file, for which safe_open would wait
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a whole safetensors file ({error}); {REFETCH}") from error


def find_weights(folder: Path) -> WeightsFiles:
    """The weight files of a diffusers model folder. Raises ModelError if there is none that can be read."""
    for name in SINGLE_FILES:
        if (folder / name).is_file():
            return WeightsFiles(folder, (name,), {})
    for name in INDEX_FILES:
        if (folder / name).is_file():
            return _sharded(folder, name)
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder / pickles[0]} is a pickle, which can run code when read; load it where you trust it and save it "
            "again with model.save_pretrained(folder, safe_serialization=True)"
        )
    raise ModelError(f"{folder} has no {SINGLE_FILES[0]} and no {INDEX_FILES[0]}; {REFETCH.replace('the file', 'it')}")


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


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, streamed."""
    digest = hashlib.sha256()
    with open_file(path, ModelError, REFETCH) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def load_tensors(files: WeightsFiles, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Every expected tensor by name, checked: present, of the expected shape, floating point and finite.

    The tensors keep the file's dtype and stay mapped. Tensors that the model does not know are left out.
    """
    found: dict[str, Any] = {}
    for name, key, tensor in files.tensors():
        if key in expected:
            _check_tensor(files.folder / name, key, tensor, expected[key])
            found[key] = tensor
    missing = sorted(set(expected) - set(found))
    if missing:
        raise ModelError(
            f"{files.folder / files.names[0]}: tensor {missing[0]} is missing ({len(missing)} of {len(expected)} are); "
            f"config.json and the weights must belong together, {REFETCH}"
        )
    return found


def _check_tensor(path: Path, key: str, tensor: Any, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ModelError(
            f"{path}: tensor {key} has shape {tuple(tensor.shape)}, config.json asks for {shape}; "
            "config.json and the weights must belong together"
        )
    if not tensor.is_floating_point():
        raise ModelError(
            f"{path}: tensor {key} is {tensor.dtype}; weights must be fp16, bf16 or fp32, export them again"
        )
    # aminmax passes NaN and Inf on, reads the tensor once and allocates nothing.
    low, high = tensor.aminmax() if tensor.numel() else (0.0, 0.0)
    if not float(high) - float(low) < float("inf"):
        raise ModelError(
            f"{path}: tensor {key} holds NaN or Inf; the training run or the file is broken, use another one"
        )
