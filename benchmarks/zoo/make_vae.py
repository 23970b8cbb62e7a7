"""Write an autoencoder of Stable Diffusion's form with random weights: `python -m benchmarks.zoo.make_vae -o work/vae`.

For measuring memory and time where the real weights are not at hand: both halves, 84 M parameters, 167 MB in fp16. The
same arguments give the same bytes.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from benchmarks import record
from benchmarks.zoo.make_xl import SHARD_BYTES, write_shards
from export.models.weights import STEM

CHANNELS, BLOCKS, LATENTS, GROUPS, PIXELS = (128, 256, 512, 512), 2, 4, 32, 512
SMALL = 0.1


def config_of(channels: Sequence[int] = CHANNELS, blocks: int = BLOCKS, groups: int = GROUPS) -> dict[str, object]:
    """The published configuration of Stable Diffusion's autoencoder, or a smaller one of its kind."""
    levels = len(channels)
    return {
        "_class_name": "AutoencoderKL",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(channels),
        "layers_per_block": blocks,
        "latent_channels": LATENTS,
        "norm_num_groups": groups,
        "sample_size": PIXELS,
    }


def tensor(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float16]:
    """The random weight called `name`: norms near 1, small biases, sums of a standard deviation of about one."""
    values = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape, np.float32)
    if len(shape) > 1:
        values /= math.sqrt(math.prod(shape[1:]))
    else:
        values = values * SMALL + float("norm" in name and name.endswith(".weight"))
    return values.astype(np.float16)


def write(folder: Path, config: dict[str, object], seed: int = 0) -> int:
    """Write the diffusers folder and return the number of parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        module = AutoencoderKL(**{key: value for key, value in config.items() if key != "_class_name"})
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return write_shards(shapes, lambda name: tensor(name, shapes[name], seed), folder, STEM, SHARD_BYTES)


def main() -> None:
    parser = record.parser("benchmarks.zoo.make_vae", __doc__)
    parser.add_argument("-o", "--output-dir", type=Path, required=True)
    parser.add_argument("--channels", default=",".join(map(str, CHANNELS)), help="of each level")
    parser.add_argument("--seed", type=int, default=0)
    arguments = record.parsed(parser)
    channels = [int(text) for text in arguments.channels.split(",")]
    parameters = write(arguments.output_dir, config_of(channels), arguments.seed)
    print(f"{arguments.output_dir}: AutoencoderKL, {parameters / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
