"""Low-rank adapters (LoRA) that become part of a float model before anything is quantized.

A layer of weight W becomes W + scale * alpha / rank * up @ down, computed in float32 and rounded once to the type
that W is read as: the file's own, fp16 of a float8 weight, float32 of one with scales (float8, NVFP4). Several adapters
of one layer are added up before that. As diffusers does it by `fuse_lora`, and PEFT by
`merge_and_unload`, an adapter without alphas has scale 1.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from export.documents import Rules, check_json, read_json, sha256, shown
from export.errors import ModelError, RecipeError
from export.models.adapter_names import (
    KINDS_REMEDY,
    PEFT_PREFIX,
    Part,
    by_layer,
    is_pefts_own,
    refuse_other_kinds,
)
from export.models.weights import ADAPTER_FILES, NOT_READ, REFETCH, weights_file

if TYPE_CHECKING:
    from torch import Tensor, nn

# Where diffusers writes what PEFT knows of an adapter: in the header of its file, and PEFT itself beside it.
METADATA, PEFT_CONFIG = "lora_adapter_metadata", "adapter_config.json"
# Starts of training that leave the base model as it is; others (PiSSA, OLoRA, ...) take something out of it first.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# Keys of PEFT with what differs by layer.
PATTERNS = ("alpha_pattern", "rank_pattern")
# Keys of PEFT that make something else of the two factors, where they are set.
OTHER_RULES = ("use_dora", "use_qalora", "alora_invocation_tokens", "layer_replication")


@dataclass(frozen=True)
class Adapter:
    """A file of an adapter, and how much of it is merged. As text, FILE:SCALE."""

    path: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Adapter:
        """Of FILE or FILE:SCALE. Raises RecipeError for a scale that is no finite number, or zero, and for
        what is no path.

        >>> Adapter.parse("style.safetensors:0.8").scale, Adapter.parse("style.safetensors").scale
        (0.8, 1.0)
        """
        if "\0" in text:
            raise RecipeError(f"--lora {text!r}: no path has a null character; give FILE or FILE:SCALE")
        name, colon, end = text.rpartition(":")
        if not colon or "/" in end or Path(end).suffix in (".safetensors", *NOT_READ):
            name, end = text, "1"
        try:
            scale = float(end)
        except ValueError:
            raise RecipeError(f"--lora {text!r}: {end!r} is not a number; give FILE or FILE:SCALE") from None
        if not name or not math.isfinite(scale) or scale == 0:
            raise RecipeError(
                f"--lora {text!r}: scale {scale:g} of file {name!r}; a scale is a finite number other than 0"
            )
        return cls(Path(name).expanduser(), scale)

    def __str__(self) -> str:
        return f"{self.path}:{self.scale!r}"

    @cached_property
    def sha256(self) -> str:
        """Hash of the file; of one that PEFT wrote, and of the scale that it wrote beside it."""
        digest, beside = sha256(self.path, ModelError, REFETCH), self.path.with_name(PEFT_CONFIG)
        names = (key for _, key, _ in weights_file(self.path).tensors())
        if not beside.is_file() or not any(name.startswith(PEFT_PREFIX) for name in names):
            return digest
        return hashlib.sha256(f"{digest} {sha256(beside, ModelError, REFETCH)}\n".encode()).hexdigest()

    def row(self) -> dict[str, object]:
        """What is said of it in a manifest."""
        return {"file": self.path.name, "sha256": self.sha256, "scale": self.scale}


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one layer: factor * up @ down; `bias` [N], times factor, to the layer's own bias.

    down: [rank, K] of a linear, [rank, C, ...] of a convolution; up: [N, rank], or [N, rank, 1, ...].
    """

    factor: float
    down: Tensor
    up: Tensor
    bias: Tensor | None

    def of_weight(self) -> Tensor:
        """[N, K], float32; of a convolution [N, C, ...]."""
        rows = self.factor * (self.up.flatten(1) @ self.down.flatten(1))
        return rows.reshape(len(self.up), *self.down.shape[1:])

    def of_bias(self) -> Tensor | float:
        """[N], float32; 0 where there is none."""
        return 0.0 if self.bias is None else self.factor * self.bias


def merged_sha256(model: str, adapters: Sequence[Adapter]) -> str:
    """The hash that stands for a model with adapters; without any, the model's own."""
    if not adapters:
        return model
    lines = [model, *(f"{adapter.sha256} {adapter.scale!r}" for adapter in adapters)]
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def merged(
    tensors: Mapping[str, Tensor], adapters: Sequence[Adapter], module: nn.Module, class_name: str
) -> dict[str, Tensor]:
    """`tensors`, some or all of those of the model `module`, with the adapters' updates in them, each in its own type;
    none is changed in place. Raises ModelError for an adapter that cannot be merged whole.
    """
    from export.models.read_weights import is_finite

    updates: dict[str, list[Update]] = {}
    for adapter in adapters:
        for layer, update in _updates(adapter, module, class_name).items():
            updates.setdefault(layer, []).append(update)
    _refuse_tied(updates, module, ", ".join(str(adapter) for adapter in adapters))
    result = dict(tensors)
    for layer, of_layer in updates.items():
        for name, change in ((f"{layer}.weight", Update.of_weight), (f"{layer}.bias", Update.of_bias)):
            if name not in tensors:
                continue
            own = tensors[name]
            whole = own.float()
            for update in of_layer:
                whole = whole + change(update)
            result[name] = whole.to(own.dtype)
            if not is_finite(result[name]):
                named = ", ".join(str(adapter) for adapter in adapters)
                raise ModelError(
                    f"adapter {named}: merged, {name} leaves the range of {own.dtype}; give a smaller scale"
                )
    return result


def _updates(adapter: Adapter, module: nn.Module, class_name: str) -> dict[str, Update]:
    """By layer. Every tensor of the file is in one of them, with every number finite."""
    source, layers = f"adapter {adapter.path}", _layers(module)
    tensors, header = _read(adapter)
    placed = by_layer(tensors, layers, class_name, source)
    config = _peft_config(adapter, header, is_pefts_own(tensors, layers))
    alphas = {layer for layer, parts in placed.items() if "alpha" in parts}
    if alphas and config is not None:
        raise ModelError(f"{source}: both alphas of layers and PEFT's settings state a scale; keep one of them")
    if without := sorted(placed.keys() - alphas) if alphas else []:
        raise ModelError(f"{source}: layer {without[0]} has no alpha, though {len(alphas)} others have; {REFETCH}")
    return {
        layer: _update(parts, layers[layer], layer, adapter.scale, config, source) for layer, parts in placed.items()
    }


def _layers(module: nn.Module) -> dict[str, nn.Module]:
    """Modules with a weight, by path; one that has two paths, by both."""
    parts = module.named_modules(remove_duplicate=False)
    return {path: part for path, part in parts if getattr(part, "weight", None) is not None}


def _refuse_tied(layers: Collection[str], module: nn.Module, adapters: str) -> None:
    """Raise ModelError for a parameter of an adapted layer that has another name in the model, too, by which it would
    be read without the update."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for tied in names.values():
        if len(tied) > 1 and any(name.rpartition(".")[0] in layers for name in tied):
            raise ModelError(
                f"adapter {adapters}: {' and '.join(tied)} are one parameter of the model, and an update of it is not "
                f"merged here; {KINDS_REMEDY}"
            )


# --- the file --------------------------------------------------------------------------------------------------------


def _read(adapter: Adapter) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """The tensors in float32, checked for NaN, and the texts of the file's header."""
    from export.models.read_weights import is_finite

    path = adapter.path
    if path.is_dir():
        held = [name for name in ADAPTER_FILES if name.endswith(".safetensors") and (path / name).is_file()]
        raise ModelError(f"adapter {path} is a folder; give its file" + f", {path / held[0]}" * bool(held))
    files = weights_file(path)
    if not path.is_file():
        raise ModelError(f"adapter {path} is not a file here; check the path, or say where it is with --lora")
    files.refuse_damaged()
    source, tensors = f"adapter {path}", {}
    stored = {key: tensor for _, key, tensor in files.tensors()}
    if not stored:
        raise ModelError(f"{source} holds no tensors; {REFETCH}")
    refuse_other_kinds(stored, source)
    for key, tensor in stored.items():
        tensors[key] = tensor.float()
        if not tensor.is_floating_point() and not key.endswith(".alpha"):
            raise ModelError(f"{source}: tensor {key} is {tensor.dtype}; factors are floating-point numbers")
        if not is_finite(tensors[key]):
            raise ModelError(f"{source}: tensor {key} holds NaN or Inf; the training run or the file is broken")
    return tensors, files.metadata()


def _peft_config(adapter: Adapter, header: Mapping[str, str], own: bool) -> Mapping[str, object] | None:
    """What PEFT states of the adapter; None where there is nothing of it. own: the file is PEFT's own."""
    source = f"adapter {adapter.path}"
    if METADATA in header:
        stated = check_json(header[METADATA], f"{source}: {METADATA}", Rules(ModelError, REFETCH))
        if not isinstance(stated, dict):
            raise ModelError(f"{source}: {METADATA} is {shown(stated)}, not a table; {REFETCH}")
        config = {key.removeprefix("transformer."): value for key, value in stated.items()}
    elif own:
        beside = adapter.path.with_name(PEFT_CONFIG)
        if not beside.is_file():
            raise ModelError(f"{source}: its scale stands in {PEFT_CONFIG}, as PEFT writes it; put it beside it")
        config = dict(read_json(beside, dict[str, object], Rules(ModelError, REFETCH)))
    else:
        return None
    if (kind := config.get("peft_type") or "LORA") != "LORA":
        raise ModelError(f"{source}: peft_type is {shown(kind)}; only LORA is merged here")
    for key in PATTERNS:
        if not isinstance(table := config.get(key) or {}, dict):
            raise ModelError(f"{source}: {key} is {shown(table)}, not a table of layers; {REFETCH}")
    for key in OTHER_RULES:
        if config.get(key):
            raise ModelError(f"{source}: {key} is {shown(config[key])}, which is no product of two factors alone")
    if (start := config.get("init_lora_weights", True)) not in PLAIN_STARTS:
        raise ModelError(
            f"{source}: init_lora_weights is {shown(start)}, which changes the base model, too; save it as an adapter "
            "of the unchanged one (path_initial_model_for_weight_conversion of PEFT)"
        )
    return config


# --- one layer -------------------------------------------------------------------------------------------------------


def _update(
    parts: Mapping[Part, Tensor],
    layer: nn.Module,
    path: str,
    scale: float,
    config: Mapping[str, object] | None,
    source: str,
) -> Update:
    """Raises ModelError, naming the layer and the shapes, where the parts are no update of it."""
    import torch

    convolutions = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    if not isinstance(layer, torch.nn.Linear) and not (isinstance(layer, convolutions) and layer.groups == 1):
        kind = type(layer).__name__
        raise ModelError(f"{source}: layer {path} is a {kind}; low-rank products are of linears and whole convolutions")
    if missing := [name for name in ("down", "up") if name not in parts]:
        raise ModelError(f"{source}: layer {path} has no {missing[0]} factor; {REFETCH}")
    down, up, shape = parts["down"], parts["up"], tuple(layer.weight.shape)
    rank = down.shape[0] if down.ndim else 0
    if rank == 0:
        raise ModelError(f"{source}: layer {path}: factors of rank 0, which say nothing; {REFETCH}")
    wanted = (rank, *shape[1:]), (shape[0], rank, *(1 for _ in shape[2:]))
    if (tuple(down.shape), tuple(up.shape)) != wanted:
        raise ModelError(
            f"{source}: layer {path} of shape {list(shape)} takes factors of {list(wanted[0])} and {list(wanted[1])}, "
            f"the adapter has {list(down.shape)} and {list(up.shape)}; give it with the model that it was trained on"
        )
    bias, own = parts.get("bias"), layer.bias
    if bias is not None and (own is None or bias.shape != own.shape):
        held = "no bias" if own is None else f"a bias of {list(own.shape)}"
        raise ModelError(f"{source}: layer {path} has {held}, the adapter one of {list(bias.shape)}; {REFETCH}")
    alpha = parts.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise ModelError(f"{source}: alpha of layer {path} is of shape {list(alpha.shape)}, not one number; {REFETCH}")
    own_scale = float(alpha) / rank if alpha is not None else _stated_scale(config, path, rank, source)
    return Update(scale * own_scale, down, up, bias)


def _stated_scale(config: Mapping[str, object] | None, path: str, rank: int, source: str) -> float:
    """alpha / rank of a layer as PEFT states it; 1 where nothing is stated."""
    if config is None:
        return 1.0
    patterns = config.get("alpha_pattern") or {}
    assert isinstance(patterns, dict)
    alpha = config.get("lora_alpha", 8)  # PEFT's own default
    alpha = next((value for key, value in patterns.items() if _fits(key, path, source)), alpha)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ModelError(f"{source}: lora_alpha of layer {path} is {shown(alpha)}, not a number; {REFETCH}")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _fits(key: str, path: str, source: str) -> bool:
    """Is a key of alpha_pattern the layer's path, or the end of it? With ^, as diffusers writes, it is all of it."""
    name = key.removeprefix("^")
    if not re.fullmatch(r"[\w.]+", name):  # no stranger's regular expression is run
        raise ModelError(f"{source}: alpha_pattern has {shown(key)}, which is no layer's path; write the paths out")
    return path == name or (name == key and path.endswith(f".{name}"))
