"""Write a model folder of true size with random weights: `python -m benchmarks.zoo.make_xl -o work/pixart_xl`.

For measuring memory and speed where the real weights are not at hand. The weights are scaled so that signals neither
die nor grow over the layers, and outlier channels are planted, as trained transformers have them: some input columns
of every linear of a block, and some channels of the adaLN scales (so that activations have outliers as well). Every
tensor is drawn from a generator seeded by (seed, its name) and written shard by shard: the same arguments give the
same bytes, in the memory of one shard.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import torch
from huggingface_hub import split_state_dict_into_shards_factory
from numpy.typing import NDArray
from safetensors.numpy import save_file

from benchmarks import record
from benchmarks.record import Json
from benchmarks.shapes import WORKLOADS, Workload
from export.models.weights import STEM
from pipeline.progress import track

SHARD_BYTES = 400_000_000
OUTLIER_SHARE = 1 / 96  # 12 of 1152 channels
WEIGHT_OUTLIER, ACTIVATION_OUTLIER = 8.0, 5.0
SMALL = 0.02
ADALN_ROWS, ADALN_SCALES = 6, (1, 4)  # shift, scale, gate of the attention, then of the feed-forward
RESIDUAL = ("to_out.0.weight", "ff.net.2.weight")


def shapes_of(workload: Workload) -> tuple[dict[str, tuple[int, ...]], Json]:
    """Shape of every tensor of the model, and its diffusers configuration; no memory is taken for the weights."""
    with torch.device("meta"):
        model = getattr(diffusers, workload.class_name)(**workload.config)
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    config |= {"_class_name": workload.class_name, "_diffusers_version": diffusers.__version__}
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}, config


def _outliers(rng: np.random.Generator, channels: int) -> NDArray[np.int64]:
    return rng.choice(channels, max(1, round(channels * OUTLIER_SHARE)), replace=False)


def tensor(name: str, shape: tuple[int, ...], layers: int, seed: int) -> NDArray[np.float16]:
    """The random weight called `name`."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    values = rng.standard_normal(shape, np.float32)
    in_block = "blocks." in name
    if name.endswith("scale_shift_table") or (in_block and name.endswith("norm1.linear.bias")):
        values = _adaln(values, rng)
    elif len(shape) == 1 and re.search(r"norm[^.]*\.weight$", name):
        values = 1 + SMALL * values
    elif len(shape) == 1 or "embedding" in name:
        values *= SMALL
    else:
        values *= (1 / math.sqrt(2 * layers) if name.endswith(RESIDUAL) else 1) / math.sqrt(math.prod(shape[1:]))
        if in_block and len(shape) == 2:
            values[:, _outliers(rng, shape[1])] *= WEIGHT_OUTLIER
    return values.astype(np.float16)


def _adaln(values: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Modulation offsets, small, with outlier channels in the rows that scale."""
    if values.size % ADALN_ROWS:
        return values * SMALL  # the shift and scale of the output layer, or HunyuanDiT's shift alone
    rows = values.reshape(ADALN_ROWS, -1) * SMALL
    chosen = _outliers(rng, rows.shape[1])
    for row in ADALN_SCALES:
        rows[row, chosen] += ACTIVATION_OUTLIER
    return rows.reshape(values.shape)


def write(workload: Workload, folder: Path, seed: int = 0, shard_bytes: int = SHARD_BYTES) -> int:
    """Write the diffusers folder and return the number of parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes, config = shapes_of(workload)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    layers = workload.config["num_layers"]
    return write_shards(shapes, lambda name: tensor(name, shapes[name], layers, seed), folder, STEM, shard_bytes)


def write_shards(
    shapes: dict[str, tuple[int, ...]], make: Callable[[str], NDArray[np.float16]], folder: Path, stem: str,
    shard_bytes: int,
) -> int:  # fmt: skip
    """Write the tensors that `make` makes of their names, a shard at a time, and return how many numbers they have."""
    split = split_state_dict_into_shards_factory(
        shapes,
        get_storage_size=lambda shape: 2 * math.prod(shape),  # in fp16
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=shard_bytes,
    )
    for file, names in track(split.filename_to_tensors.items(), len(split.filename_to_tensors), "shards"):
        save_file({name: make(name) for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        path = folder / f"{stem}.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return sum(math.prod(shape) for shape in shapes.values())


def main() -> None:
    parser = record.parser("benchmarks.zoo.make_xl", __doc__)
    parser.add_argument("--model", default="pixart", choices=list(WORKLOADS))
    parser.add_argument("-o", "--output-dir", type=Path, required=True)
    parser.add_argument("--layers", type=int, help="transformer blocks (default: the true number)")
    parser.add_argument("--heads", type=int, help="attention heads; the width follows (default: the true number)")
    parser.add_argument("--sample-size", type=int, help="latent cells per edge: 32 is 256 pixels")
    parser.add_argument("--shard-mb", type=int, default=SHARD_BYTES // 1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = record.parsed(parser)
    chosen = {
        "num_layers": arguments.layers,
        "num_attention_heads": arguments.heads,
        "sample_size": arguments.sample_size,
    }
    workload = WORKLOADS[arguments.model].changed(**{key: value for key, value in chosen.items() if value})
    parameters = write(workload, arguments.output_dir, arguments.seed, arguments.shard_mb * 1_000_000)
    print(
        f"{arguments.output_dir}: {workload.class_name}, {parameters / 1e6:.1f} M parameters, {workload.pixels} pixels"
    )


if __name__ == "__main__":
    main()
