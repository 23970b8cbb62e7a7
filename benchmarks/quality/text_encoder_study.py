"""Which formats T5, CLIP, BERT, Gemma and Qwen encoders take: `python -m benchmarks.quality.text_encoder_study`.

Encoders of random weights, small ones of the published forms, plain and with the outliers that trained ones have (see
benchmarks/zoo/make_t5_xxl.py and random_encoders.py), rounded to nearest in pairs of formats: the signal-to-noise ratio
of the embeddings of random prompts against the float encoder, all tokens together and of the worst token. Activations
stand beside the recipe's weights, and beside weights of 8 bits, which cost little, so that their own cost shows.

Writes benchmarks/results/text_encoder_study.json (with `--encoder NAME` of another one another file); minutes on two
free cores.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import record
from benchmarks.record import Json
from benchmarks.zoo.make_t5_xxl import config_of, write
from benchmarks.zoo.random_encoders import write_bert, write_clip, write_gemma2, write_qwen3
from export.models.families import IDS, MASK
from export.models.load import LoadedModel, denoiser, load, sample_inputs
from pipeline import recipe as recipes
from pipeline.backends.reference import ReferenceEngine, fake_quant
from pipeline.calibrate import calibrate
from pipeline.distance import sqnr_db
from pipeline.recipe import Recipe

NAME, T5 = "text_encoder_study", "t5"
RECIPES = {T5: "t5_w4a8", "clip": "clip_w4a8", "bert": "bert_w4a8", "gemma2": "gemma_w4a8", "qwen3": "qwen_w4a8"}
WRITERS = {"clip": write_clip, "bert": write_bert, "gemma2": write_gemma2, "qwen3": write_qwen3}
LAYERS, WIDTH, FF, HEADS, VOCABULARY = 8, 512, 1280, 8, 1000
# Tokens of a prompt at most, where an encoder's pipelines give it more.
PROMPTS, TOKENS, SEED = 16, 120, 0
ACTIVATIONS = ("INT8", "E4M3", "E3M4", "E2M3", "INT6")
WEIGHTS = ("E2M1", "INT4", "E2M3")  # beside the recipe's activations
WIDE = "INT8"
# Group sizes of the recipe's weights.
GROUPS = (32, 64, 128)


def rows(model: LoadedModel, recipe: Recipe, work_dir: Path) -> Iterator[Json]:
    """An arm for each: formats, group size and decibels."""
    usual = recipe.formats
    arms = [(replace(usual, activation=name), 64) for name in ACTIVATIONS]
    arms += [(replace(usual, weight=WIDE, activation=name), 64) for name in ACTIVATIONS]
    arms += [(replace(usual, weight=name), 64) for name in WEIGHTS if name != usual.weight]
    arms += [(usual, size) for size in GROUPS if size != 64]
    inputs = sample_inputs(model, PROMPTS, SEED, tokens=min(model.tokens, TOKENS))
    expected = _counted(ReferenceEngine(denoiser(model)), inputs)
    for place, (formats, size) in enumerate(arms):
        arm = replace(recipe, formats=formats, weights=replace(recipe.weights, group_size=size))
        layers = calibrate(model, arm, work_dir / str(place))
        output = _counted(ReferenceEngine(fake_quant(model, layers, torch.float32)), inputs)
        tokens = [sqnr_db(one, other) for one, other in zip(expected, output, strict=True)]
        yield {
            "weight": formats.weight,
            "activation": formats.activation,
            "group_size": size,
            "sqnr_db": round(sqnr_db(expected, output), 2),
            "worst_token_db": round(min(tokens), 2),
        }


def _counted(engine: ReferenceEngine, inputs: dict[str, NDArray[np.int64]]) -> NDArray[np.float32]:
    """[tokens of all prompts, C]: without those of padding."""
    output: NDArray[np.float32] = engine.run({name: inputs[name] for name in (IDS, MASK)})["last_hidden_state"]
    return output[inputs[MASK].astype(bool)]


def write_encoder(name: str, folder: Path, planted: bool) -> None:
    """The encoder called `name` in RECIPES."""
    if name == T5:
        write(folder, config_of(LAYERS, WIDTH, FF, HEADS, VOCABULARY), SEED, planted=planted)
    else:
        WRITERS[name](folder, LAYERS, WIDTH, 4 * WIDTH, HEADS, VOCABULARY, planted)


def main() -> None:
    """Measure and write."""
    parser = record.parser(f"benchmarks.quality.{NAME}", __doc__)
    parser.add_argument("-o", "--output-dir", type=Path, default=record.RESULTS, help="folder of the result")
    parser.add_argument("--encoder", choices=RECIPES, default=T5, help=f"which of them (default: {T5})")
    arguments = record.parsed(parser)
    name = arguments.encoder
    recipe = recipes.load(RECIPES[name])
    document: Json = {"recipe": recipe.name, "layers": LAYERS, "width": WIDTH, "prompts": PROMPTS}
    for kind, planted in (("plain", False), ("outliers", True)):
        with tempfile.TemporaryDirectory(prefix="ditc-") as scratch:
            folder = Path(scratch) / "text_encoder"
            write_encoder(name, folder, planted)
            document[kind] = list(rows(load(str(folder)), recipe, Path(scratch)))
    print(record.write(NAME if name == T5 else f"{NAME}_{name}", document, arguments.output_dir))


if __name__ == "__main__":
    main()
