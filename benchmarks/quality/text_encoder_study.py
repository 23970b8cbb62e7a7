"""Which formats a T5 encoder takes: `python -m benchmarks.quality.text_encoder_study`.

Encoders of random weights, small ones of T5-XXL's form, plain and with the outliers that trained ones have (see
benchmarks/zoo/make_t5_xxl.py), rounded to nearest in pairs of formats: the signal-to-noise ratio of the embeddings of
random prompts against the float encoder, all tokens together and of the worst token. Activations stand beside the
recipe's weights, and beside weights of 8 bits, which cost little, so that their own cost shows.

Writes benchmarks/results/text_encoder_study.json; some minutes on two free cores.
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
from export.models.families import IDS, MASK
from export.models.load import LoadedModel, denoiser, load, sample_inputs
from pipeline import recipe as recipes
from pipeline.backends.reference import ReferenceEngine, fake_quant
from pipeline.calibrate import calibrate
from pipeline.distance import sqnr_db

NAME, RECIPE = "text_encoder_study", "t5_w4a8"
LAYERS, WIDTH, FF, HEADS, VOCABULARY = 8, 512, 1280, 8, 1000
PROMPTS, SEED = 16, 0
ACTIVATIONS = ("INT8", "E4M3", "E3M4", "E2M3", "INT6")
WEIGHTS = ("E2M1", "INT4", "E2M3")  # beside the recipe's activations
WIDE = "INT8"
# Group sizes of the recipe's weights.
GROUPS = (32, 64, 128)


def rows(model: LoadedModel, work_dir: Path) -> Iterator[Json]:
    """An arm for each: formats, group size and decibels."""
    recipe = recipes.load(RECIPE)
    usual = recipe.formats
    arms = [(replace(usual, activation=name), 64) for name in ACTIVATIONS]
    arms += [(replace(usual, weight=WIDE, activation=name), 64) for name in ACTIVATIONS]
    arms += [(replace(usual, weight=name), 64) for name in WEIGHTS if name != usual.weight]
    arms += [(usual, size) for size in GROUPS if size != 64]
    inputs = sample_inputs(model, PROMPTS, SEED)
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


def main() -> None:
    """Measure and write."""
    parser = record.parser(f"benchmarks.quality.{NAME}", __doc__)
    parser.add_argument("-o", "--output-dir", type=Path, default=record.RESULTS, help="folder of the result")
    arguments = record.parsed(parser)
    document: Json = {"recipe": RECIPE, "layers": LAYERS, "width": WIDTH, "prompts": PROMPTS}
    for name, planted in (("plain", False), ("outliers", True)):
        with tempfile.TemporaryDirectory(prefix="ditc-") as scratch:
            folder = Path(scratch) / "text_encoder"
            write(folder, config_of(LAYERS, WIDTH, FF, HEADS, VOCABULARY), SEED, planted=planted)
            document[name] = list(rows(load(str(folder)), Path(scratch)))
    print(record.write(NAME, document, arguments.output_dir))


if __name__ == "__main__":
    main()
