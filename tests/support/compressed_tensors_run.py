"""Run by a Python that has compressed-tensors: have it compress the matrices of a model's file, and give them back.

    python -m tests.support.compressed_tensors_run FILE.safetensors FOLDER

FOLDER/FORMAT.safetensors is the file as it compresses it, FOLDER/FORMAT-back.safetensors what it decompresses the
matrices to.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file
from torch import Tensor

FLOAT: dict[str, Any] = {"type": "float", "symmetric": True}
# A scale for each tensor or channel, or for each block beside one for the tensor.
SCHEMES = {
    "float-quantized": QuantizationArgs(num_bits=8, strategy="channel", **FLOAT),
    "nvfp4-pack-quantized": QuantizationArgs(
        num_bits=4, strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn, **FLOAT
    ),
}


def compressed(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The parts of a weight [N, K] by what they are called behind a layer's name, and the weight that they give."""
    arguments = SCHEMES[name]
    blocks = weight if arguments.group_size is None else weight.unflatten(1, (-1, arguments.group_size))
    low, high = blocks.amin(-1), blocks.amax(-1)
    if arguments.group_size is None:
        low, high = low[:, None], high[:, None]
    parts = {"weight": weight}
    whole = None
    if arguments.group_size is not None:
        whole = parts["weight_global_scale"] = generate_gparam(low.min().reshape(1), high.max().reshape(1))
    parts["weight_scale"], _ = calculate_qparams(low, high, arguments, global_scale=whole)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = BaseCompressor.get_value_from_registry(name)
    made = compressor.compress(parts, scheme)
    return made, compressor.decompress(made, scheme)["weight"]


def main(path: Path, folder: Path) -> None:
    state = load_file(path)
    matrices = [key for key in state if "blocks" in key and key.endswith(".weight") and state[key].ndim == 2]
    for name in SCHEMES:
        made, back = {key: value for key, value in state.items() if key not in matrices}, {}
        for key in matrices:
            parts, back[key] = compressed(name, state[key])
            made |= {f"{key.removesuffix('weight')}{part}": value.contiguous() for part, value in parts.items()}
        save_file(made, folder / f"{name}.safetensors")
        save_file(back, folder / f"{name}-back.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
