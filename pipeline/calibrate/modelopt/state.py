"""What ModelOpt leaves behind: tensors by name, and the settings of every quantizer; of a file, a folder, or a module.

A file is what `mto.save(model, FILE)` writes. A folder is what `model.save_pretrained(DIR)` writes after
`mto.enable_huggingface_checkpointing()`: settings in modelopt_state.pth, tensors in safetensors files. Both are read by
torch's restricted unpickler, which makes tensors and plain values and runs no code, so ModelOpt need not be installed.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from export.documents import sha256
from export.errors import ModelError, RecipeError
from export.models.weights import find_weights
from pipeline.files import sha256_json

Settings = Mapping[str, Any]
# Modes of ModelOpt that leave plain quantizers behind; others prune, compress or distil.
CALIBRATED, QUANTIZING = "_calibrate", ("quantize", "auto_quantize")
REMEDY = "save the quantized model with modelopt.torch.opt.save(model, FILE)"
STATE_FILE = "modelopt_state.pth"
SAVE_AGAIN = (
    "call modelopt.torch.opt.enable_huggingface_checkpointing() before model.save_pretrained(DIR), or "
    "modelopt.torch.opt.save(model, FILE) instead of it"
)


@dataclass(frozen=True)
class State:
    """tensors: those of the module's state dict. quantizers: by path, such as "blocks.0.fc.weight_quantizer", the
    settings of each under ModelOpt's names, "_num_bits" for example. source: for messages."""

    tensors: Mapping[str, Tensor]
    quantizers: Mapping[str, Settings]
    source: str

    def __post_init__(self) -> None:
        """Raises ModelError for a tensor without numbers, or whose numbers are not its elements."""
        for name, tensor in self.tensors.items():
            if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
                kind = f"{tensor.dtype}, {tensor.layout}, device {tensor.device}"
                raise ModelError(f"{self.source}: {name} is no plain tensor of real numbers ({kind}); {REMEDY}")

    def tensor(self, path: str, name: str) -> Tensor | None:
        """The buffer `name` of the quantizer or module at `path`."""
        return self.tensors.get(f"{path}.{name}")


def read_state(path: Path) -> State:
    """The state in a file that `mto.save` wrote, or in a folder of `save_pretrained`.

    Raises ModelError if it is no such file or folder, RecipeError naming the mode if the model is more than quantized.
    """
    file = _state_file(path)
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        conversions, stored = (saved, {}) if path.is_dir() else (saved["modelopt_state"], saved["model_state_dict"])
        modes = [(str(name), mode) for name, mode in conversions["modelopt_state_dict"]]
        tensors = {str(name): tensor for name, tensor in stored.items() if _is_tensor(tensor)}
        quantizers = _last_quantizers(modes, str(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ModelError(
            f"{file}: cannot be read as tensors and plain values ({_first_line(error)}); {REMEDY}"
        ) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file}: it is not what ModelOpt saves ({error!r}); {REMEDY}") from error
    if path.is_dir():
        tensors = {name: tensor for _, name, tensor in find_weights(path).tensors()}
    return State(tensors, quantizers, str(path))


def state_sha256(path: Path) -> str:
    """Hash of a file, or of all that is read of a folder. Raises ModelError where there is none."""
    digest = sha256(_state_file(path), ModelError)
    return sha256_json([digest, find_weights(path).sha256()]) if path.is_dir() else digest


def _state_file(path: Path) -> Path:
    """The file itself, or the one of a folder. Raises ModelError where there is none."""
    if not path.is_dir():
        if not path.is_file():
            raise ModelError(f"{path}: no such file; {REMEDY}")
        return path
    if not (path / STATE_FILE).is_file():
        inside = sorted(place.parent.name for place in path.glob(f"*/{STATE_FILE}"))
        remedy = f"give its folder {inside[0]}" if inside else SAVE_AGAIN
        raise ModelError(f"{path} has no {STATE_FILE}; {remedy}")
    return path / STATE_FILE


def live_state(module: nn.Module) -> State:
    """The state of a module that `mtq.quantize` has returned. Raises RecipeError if it has no quantizers."""
    from modelopt.torch.quantization.conversion import quantizer_state

    quantizers = quantizer_state(module)
    if not quantizers:
        raise RecipeError("the module has no quantizers; give what modelopt.torch.quantization.quantize returned")
    return State(module.state_dict(), quantizers, "the live module")


def _last_quantizers(modes: list[tuple[str, Any]], source: str) -> dict[str, Settings]:
    """Those of the last mode, which has them all."""
    others = [name for name, _ in modes if name not in QUANTIZING and not name.endswith(CALIBRATED)]
    if others:
        raise RecipeError(f"{source}: ModelOpt's mode {others[0]!r} changed more than quantizers; save before it")
    if not modes:
        raise RecipeError(f"{source}: nothing is quantized; {REMEDY}")
    return {str(name): dict(settings) for name, settings in modes[-1][1]["metadata"]["quantizer_state"].items()}


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
