"""Write a PixArt-alpha pipeline of true size with random weights: `python -m benchmarks.zoo.make_pipeline -o DIR`.

For measuring memory and time where the real weights are not at hand: PixArt-XL/2 at 512 pixels (make_xl.py), a T5-XXL
encoder (make_t5_xxl.py; 9.5 GB), the autoencoder of Stable Diffusion as diffusers makes it anew, a tokenizer of as many
pieces, and the published scheduler. `--text-layers 2` leaves most of the encoder away. `--count` takes no memory and
makes no weights: it counts the parameters of each part, for benchmarks/results/pipeline_parameters.json.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
from transformers import T5EncoderModel, T5Tokenizer

from benchmarks import record
from benchmarks.shapes import WORKLOADS, Workload
from benchmarks.zoo import make_t5_xxl, make_xl

PIECES, SYLLABLES = 32_000, 60
RESULT = "pipeline_parameters"
# Of the autoencoder of Stable Diffusion 1, which PixArt-alpha has.
AUTOENCODER = dict(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    latent_channels=4,
    sample_size=512,
)
INDEX = {
    "_class_name": "PixArtAlphaPipeline",
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "PixArtTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def pieces(count: int, seed: int = 0) -> list[tuple[str, float]]:
    """A unigram vocabulary of made-up syllables, with their scores; every letter is a piece, so that texts have ids."""
    rng = np.random.default_rng(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    syllables = ["".join(rng.choice(list(letters), 2)) for _ in range(SYLLABLES)]
    texts = dict.fromkeys(["<pad>", "</s>", "<unk>", "▁", *letters, *letters.upper(), *"0123456789.,-'"])
    while len(texts) < count:
        word = "".join(rng.choice(syllables, rng.integers(1, 5)))
        texts["▁" + word if rng.random() < 0.5 else word] = None
    return [(text, -float(rank) / 1000) for rank, text in enumerate(texts)]


def workload(layers: int | None = None) -> Workload:
    """The denoiser. layers: None: all."""
    return WORKLOADS["pixart"].changed(sample_size=64, **({"num_layers": layers} if layers else {}))


def parameters() -> dict[str, int]:
    """Of each part of true size, of diffusers' and transformers' own classes; no memory is taken for them."""
    shapes, _ = make_xl.shapes_of(workload())
    with torch.device("meta"):
        encoder = T5EncoderModel(make_t5_xxl.config_of(make_t5_xxl.LAYERS))
        autoencoder = AutoencoderKL(**AUTOENCODER)
    counts = {
        name: sum(value.numel() for value in module.parameters())  # what is shared counts once
        for name, module in (("text_encoder", encoder), ("vae", autoencoder))
    }
    return counts | {"transformer": sum(math.prod(shape) for shape in shapes.values())}


def write(folder: Path, layers: int | None = None, text_layers: int = make_t5_xxl.LAYERS, seed: int = 0) -> None:
    """The whole folder. layers: of the denoiser; None: all."""
    make_xl.write(workload(layers), folder / "transformer", seed)
    make_t5_xxl.write(folder / "text_encoder", make_t5_xxl.config_of(text_layers), seed)
    torch.manual_seed(seed)
    AutoencoderKL(**AUTOENCODER).half().save_pretrained(folder / "vae")
    T5Tokenizer(vocab=pieces(PIECES), model_max_length=120).save_pretrained(folder / "tokenizer")
    DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=2e-2, beta_schedule="linear").save_pretrained(
        folder / "scheduler"
    )
    (folder / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = record.parser("benchmarks.zoo.make_pipeline", __doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("-o", "--output-dir", type=Path)
    where.add_argument("--count", action="store_true", help="count parameters alone")
    parser.add_argument("--layers", type=int, help="blocks of the denoiser (default: all 28)")
    parser.add_argument("--text-layers", type=int, default=make_t5_xxl.LAYERS, help="blocks of the text encoder")
    parser.add_argument("--seed", type=int, default=0)
    arguments = record.parsed(parser)
    if arguments.count:
        print(record.write(RESULT, {"class_name": INDEX["_class_name"], "parameters": parameters()}))
        return
    write(arguments.output_dir, arguments.layers, arguments.text_layers, arguments.seed)
    print(f"{arguments.output_dir}: {INDEX['_class_name']} with random weights")


if __name__ == "__main__":
    main()
