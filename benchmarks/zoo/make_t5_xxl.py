"""Write a T5-XXL encoder with random weights: `python -m benchmarks.zoo.make_t5_xxl -o work/t5_xxl --layers 2`.

For measuring memory, time and formats where the real weights are not at hand: 4.7 B parameters, 9.5 GB in fp16 shards
of all 24 layers. Outliers are planted where trained T5 encoders have them: a few channels of the stream between blocks
are much larger than all others (a row of a block's last linears writes to each), norms have channels of large weight,
and the feed-forward's gated product has channels far beyond the rest, by which sums of float16 overflow. The same
arguments give the same bytes, in the memory of one shard.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import T5Config, T5EncoderModel

from benchmarks import record
from benchmarks.zoo.make_xl import SHARD_BYTES, write_shards

LAYERS, WIDTH, FF, HEADS, HEAD_DIM, VOCABULARY = 24, 4096, 10240, 64, 64, 32128
# Channels with outliers, of a tensor's; how much larger they are than the others. Of trained transformers from 6.7 B
# parameters on LLM.int8() (arXiv 2208.07339) reports about 0.1 % of the channels and up to 20 times; these are a little
# more of both.
SHARE = 1 / 512
STREAM, NORM, GATED = 24.0, 6.0, 6.0
SMALL = 0.1
# So that scores of attention, which T5 does not scale, have a standard deviation of a few.
SCORES = 0.5


def config_of(
    layers: int, width: int = WIDTH, ff: int = FF, heads: int = HEADS, vocabulary: int = VOCABULARY
) -> T5Config:
    """The published configuration of T5 v1.1 XXL, or a smaller one of its kind."""
    return T5Config(
        vocab_size=vocabulary, d_model=width, d_kv=HEAD_DIM, d_ff=ff, num_layers=layers, num_heads=heads,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip


def tensor(name: str, shape: tuple[int, ...], layers: int, seed: int, planted: bool = True) -> NDArray[np.float16]:
    """The random weight called `name`; outlier channels of the stream and of the gated product are the same in all.

    planted: with outliers.
    """
    stream, norm, gated = (STREAM, NORM, GATED) if planted else (1.0, 1.0, 1.0)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    values = rng.standard_normal(shape, np.float32)
    part = name.removesuffix(".weight").rpartition(".")[2]
    if part.endswith("layer_norm"):
        values = 1 + SMALL * values
        if part != "final_layer_norm":
            values[outliers(shape[0], seed + 1)] *= norm
    elif part in ("q", "k", "v", "o", "wi_0", "wi_1", "wo"):
        values /= math.sqrt(shape[1])
        if part == "q":
            values *= SCORES / math.sqrt(HEAD_DIM)  # keys have a standard deviation of one
        elif part in ("o", "wo"):
            values /= math.sqrt(2 * layers)
            values[outliers(shape[0], seed)] *= stream
        elif part in ("wi_0", "wi_1"):
            values[outliers(shape[0], seed + 2)] *= gated
    return values.astype(np.float16)


def outliers(channels: int, seed: int) -> NDArray[np.int64]:
    """Places of the outlier channels, the same for the same arguments."""
    return np.random.default_rng(seed).choice(channels, max(1, round(channels * SHARE)), replace=False)


def write(folder: Path, config: T5Config, seed: int = 0, shard_bytes: int = SHARD_BYTES, planted: bool = True) -> int:
    """Write the transformers folder and return the number of parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        module = T5EncoderModel(config)
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    del shapes["encoder.embed_tokens.weight"]  # is shared.weight
    stated = {**config.to_dict(), "architectures": ["T5EncoderModel"], "dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(stated, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def make(name: str) -> NDArray[np.float16]:
        return tensor(name, shapes[name], config.num_layers, seed, planted)

    return write_shards(shapes, make, folder, "model", shard_bytes)


def main() -> None:
    parser = record.parser("benchmarks.zoo.make_t5_xxl", __doc__)
    parser.add_argument("-o", "--output-dir", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=LAYERS, help="blocks (default: all 24, which are 9.5 GB)")
    parser.add_argument("--width", type=int, default=WIDTH, help="d_model")
    parser.add_argument("--ff", type=int, default=FF, help="d_ff")
    parser.add_argument("--heads", type=int, default=HEADS, help="attention heads of 64 channels")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--shard-mb", type=int, default=SHARD_BYTES // 1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = record.parsed(parser)
    config = config_of(arguments.layers, arguments.width, arguments.ff, arguments.heads, arguments.vocabulary)
    parameters = write(arguments.output_dir, config, arguments.seed, arguments.shard_mb * 1_000_000)
    print(f"{arguments.output_dir}: T5EncoderModel, {config.num_layers} layers, {parameters / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
