"""The calibrated checkpoint: what calibration hands to export, reference and engines.

One `QuantizedLinear` for each quantized layer, saved as safetensors (codes, scales, multipliers, bias) plus one JSON
of formats. It is all that is needed to rebuild the layer; the float weight is not kept.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from export.embedding import exact_multipliers
from export.errors import ContractError
from export.formats import decode, get_format, pack, packed_size, to_image, unpack

SCHEMA_VERSION = 1
Granularity = Literal["per_channel", "exact_group", "group"]
WEIGHTS_FILE, LAYERS_FILE = "quantized.safetensors", "quantized.json"


@dataclass(frozen=True)
class QuantizedLinear:
    """y = x @ W.T + bias with W [N, K] stored as codes; W[n, k] = value(code) * multiplier * scale.

    codes: packed uint8 [N, ceil(K * bits / 8)]. scales: float32 [N, 1], or [N, K / group_size] for "group".
    multipliers: uint8 [N, K / group_size], small integers, for "exact_group" only. bias: float32 [N] or None.
    """

    name: str
    kind: str
    in_features: int
    weight_format: str
    activation_format: str
    granularity: Granularity
    group_size: int
    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    multipliers: NDArray[np.uint8] | None = None
    bias: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        n, k, fmt = self.out_features, self.in_features, get_format(self.weight_format)
        get_format(self.activation_format)
        if self.granularity not in get_args(Granularity):
            raise ContractError(f"{self.name}: granularity {self.granularity!r}; use {get_args(Granularity)}")
        if self.granularity != "per_channel" and (self.group_size <= 0 or k % self.group_size):
            raise ContractError(f"{self.name}: K={k} is not a multiple of group_size {self.group_size}")
        if self.codes.shape != (n, packed_size(fmt.bits, k)):
            raise ContractError(f"{self.name}: codes {self.codes.shape}, not {(n, packed_size(fmt.bits, k))}")
        if self.scales.shape != (n, self.groups if self.granularity == "group" else 1):
            raise ContractError(f"{self.name}: scales {self.scales.shape} do not fit {self.granularity}")
        if not np.isfinite(self.scales).all():
            raise ContractError(f"{self.name}: a weight scale is NaN or Inf; the float weight is broken")
        if (self.multipliers is not None) != (self.granularity == "exact_group"):
            raise ContractError(f"{self.name}: multipliers go with exact_group and only with it")
        if self.multipliers is not None:
            self._check_multipliers(self.multipliers)

    def _check_multipliers(self, multipliers: NDArray[np.uint8]) -> None:
        if multipliers.shape != (self.out_features, self.groups):
            raise ContractError(f"{self.name}: multipliers {multipliers.shape}, not {(self.out_features, self.groups)}")
        allowed = exact_multipliers(self.weight_format, ("INT8",))
        if not np.isin(multipliers, allowed).all():
            raise ContractError(f"{self.name}: a multiplier is outside {allowed}, so {self.weight_format} is not exact")

    @property
    def out_features(self) -> int:
        return len(self.codes)

    @property
    def groups(self) -> int:
        return self.in_features // self.group_size if self.group_size else 1

    @property
    def size_bytes(self) -> int:
        """Bytes of codes, scales and multipliers (4 bits each) as stored in the portable model."""
        multiplier_bytes = 0 if self.multipliers is None else self.out_features * packed_size(4, self.groups)
        return self.codes.nbytes + self.scales.nbytes + multiplier_bytes

    def unpacked_codes(self) -> NDArray[np.uint8]:
        """[N, K] uint8, one code per element."""
        return unpack(self.codes, get_format(self.weight_format).bits, self.in_features)

    def image(self) -> NDArray[np.int32]:
        """[N, K]: integer image of the codes with group multipliers folded in (exact)."""
        plain = to_image(get_format(self.weight_format), self.unpacked_codes()).astype(np.int32)
        if self.multipliers is None:
            return plain
        return plain * np.repeat(self.multipliers.astype(np.int32), self.group_size, axis=1)

    def dequantized(self) -> NDArray[np.float64]:
        """[N, K] float64: the weight that the quantized layer stands for."""
        value = decode(get_format(self.weight_format), self.unpacked_codes())
        if self.multipliers is not None:
            value = value * np.repeat(self.multipliers.astype(np.float64), self.group_size, axis=1)
        repeats = self.in_features // self.scales.shape[1]
        return value * np.repeat(self.scales.astype(np.float64), repeats, axis=1)


def make_linear(codes: NDArray[np.uint8], *, weight_format: str, **fields: Any) -> QuantizedLinear:
    """QuantizedLinear from unpacked codes [N, K]."""
    packed = pack(codes, get_format(weight_format).bits)
    return QuantizedLinear(codes=packed, weight_format=weight_format, in_features=codes.shape[1], **fields)


ARRAYS = ("codes", "scales", "multipliers", "bias")


def save(layers: list[QuantizedLinear], folder: Path) -> None:
    """Write the checkpoint into `folder`, each file through a temporary name."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {f"{layer.name}/{key}": getattr(layer, key) for layer in layers for key in ARRAYS}
    present = {key: np.ascontiguousarray(value) for key, value in arrays.items() if value is not None}
    save_file(present, folder / f"{WEIGHTS_FILE}.part")
    os.replace(folder / f"{WEIGHTS_FILE}.part", folder / WEIGHTS_FILE)
    rows = [{key: value for key, value in _fields(layer).items() if key not in ARRAYS} for layer in layers]
    text = json.dumps({"schema_version": SCHEMA_VERSION, "layers": rows}, indent=1)
    (folder / f"{LAYERS_FILE}.part").write_text(text)
    os.replace(folder / f"{LAYERS_FILE}.part", folder / LAYERS_FILE)


def _fields(layer: QuantizedLinear) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in layer.__dataclass_fields__}


def load(folder: Path) -> list[QuantizedLinear]:
    """Read a checkpoint. Raises ContractError if it was written by another schema or a tensor is missing."""
    document = json.loads((folder / LAYERS_FILE).read_text())
    if document.get("schema_version") != SCHEMA_VERSION:
        found = document.get("schema_version")
        raise ContractError(f"{folder / LAYERS_FILE}: schema {found}, this version reads {SCHEMA_VERSION}; calibrate again")
    with safe_open(folder / WEIGHTS_FILE, framework="np") as tensors:
        names = set(tensors.keys())
        return [_load_layer(row, tensors, names) for row in document["layers"]]


def _load_layer(row: dict[str, Any], tensors: Any, names: set[str]) -> QuantizedLinear:
    keys = {key: f"{row['name']}/{key}" for key in ARRAYS}
    missing = [keys[key] for key in ("codes", "scales") if keys[key] not in names]
    if missing:
        raise ContractError(f"{WEIGHTS_FILE}: tensor {missing[0]} is missing; the checkpoint is damaged, calibrate again")
    arrays = {key: tensors.get_tensor(name) if name in names else None for key, name in keys.items()}
    return QuantizedLinear(**row, **arrays)
