"""What quantized attention costs: `python -m benchmarks.quality.attention_study`.

Two parts, each with K's mean over the tokens taken out, as the op does, and left in:

- drawn numbers: queries, keys and values with the statistics of large DiTs (a large mean in each channel of K, channels
  of outliers in Q, K and V), flat and peaked weights, up to 4096 keys: the signal-to-noise ratio of what comes out;
- pictures of the bundled PixArt with float linears and with quantized ones: the denoiser's output on the float model's
  calls, and each picture beside the float model's of the same noise.

Writes benchmarks/results/attention_study.json arm by arm; about a quarter of an hour on two free cores.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks import record
from benchmarks.quality import drawing
from benchmarks.quality.metrics import median_estimate, psnr_db
from benchmarks.record import Json
from export.checkpoint import QuantizedLinear
from export.formats.attention import AttentionFormats
from export.models.load import denoiser
from pipeline import recipe as recipes
from pipeline.backends.reference import AttentionDenoiser, ReferenceEngine, fake_quant, quantized_attention
from pipeline.calibrate import calibrate
from pipeline.distance import sqnr_db

logger = logging.getLogger("benchmarks.quality.attention_study")
NAME = "attention_study"
FORMATS = tuple(AttentionFormats(name, name) for name in ("INT8", "E2M3", "INT6", "INT4"))
# Formats whose pictures are drawn.
DRAWN = FORMATS[:3]


# --- drawn numbers ---------------------------------------------------------------------------------------------------

KEYS = (256, 1024, 4096)
HEADS, QUERIES, CHANNELS = 4, 256, 72  # 72 channels: heads of PixArt-XL and DiT-XL
# Standard deviation of the scores: of the first nearly all keys have a say, of the second a few in a thousand.
SHAPES = {"flat": 0.5, "peaked": 4.0}
# In standard deviations of a channel: the mean of a channel, which all tokens share; how much larger outliers are.
MEANS, OUTLIERS = {"q": 0.5, "k": 6.0, "v": 0.5}, {"q": 8.0, "k": 8.0, "v": 8.0}
OUTLIER_CHANNELS = 3
SEED = 0


class Case(NamedTuple):
    """One kind of attention. planted: with channels of outliers."""

    keys: int
    shape: str
    planted: bool


def operands(case: Case, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q float64 [1, HEADS, QUERIES, CHANNELS], k and v [1, HEADS, keys, CHANNELS] of the case."""
    rng = np.random.default_rng([seed, case.keys, list(SHAPES).index(case.shape), case.planted])

    def draw(name: str, tokens: int) -> torch.Tensor:
        x = rng.normal(size=(1, HEADS, tokens, CHANNELS)) + MEANS[name] * rng.normal(size=(1, HEADS, 1, CHANNELS))
        if case.planted:
            for head in range(HEADS):
                x[:, head, :, rng.choice(CHANNELS, OUTLIER_CHANNELS, replace=False)] *= OUTLIERS[name]
        return torch.from_numpy(x)

    q, k, v = draw("q", QUERIES), draw("k", case.keys), draw("v", case.keys)
    centred = k - k.mean(dim=-2, keepdim=True)
    spread = (q @ centred.mT * CHANNELS**-0.5).std(dim=-1).mean(dim=-1)[..., None, None]
    return q * SHAPES[case.shape] / spread, k, v


def effective_keys(q: torch.Tensor, k: torch.Tensor) -> float:
    """How many keys of equal weight have the entropy of a row's weights, geometric mean over rows."""
    log_weight = torch.log_softmax(q @ k.mT * CHANNELS**-0.5, dim=-1)
    return float((-(log_weight.exp() * log_weight).sum(dim=-1)).mean().exp())


def drawn_rows() -> Iterator[Json]:
    """One row for each case, format and treatment of K's mean."""
    for case in (Case(keys, shape, planted) for keys in KEYS for shape in SHAPES for planted in (False, True)):
        q, k, v = operands(case, SEED)
        exact = torch.nn.functional.scaled_dot_product_attention(q, k, v).numpy()
        for formats in FORMATS:
            for centre in (True, False):
                out = quantized_attention(formats, q, k, v, None, CHANNELS**-0.5, centre).numpy()
                facts = case._asdict() | {"effective_keys": effective_keys(q, k)}
                yield facts | {"formats": str(formats), "centre": centre, "sqnr_db": sqnr_db(exact, out)}
        logger.info("%s", case)


# --- pictures --------------------------------------------------------------------------------------------------------

MODEL, RECIPE, SETTINGS = "pixart_mini", "pixart_w4a6", ("method=rtn", "weights.granularity=exact_group")
FLOAT, QUANTIZED = "float", "W4A6, round to nearest"
# Steps in which outputs are compared, of as many as the model draws with, and pictures in them.
COMPARED_STEPS, COMPARED_PICTURES = 5, 4


def arms() -> Iterator[tuple[str, AttentionFormats | None, bool]]:
    """(linears, formats of attention, whether K's mean is taken out), float attention first."""
    for linears in (FLOAT, QUANTIZED):
        yield linears, None, True
        for formats in DRAWN:
            for centre in (True, False):
                yield linears, formats, centre


def engine(
    subject: drawing.Subject, layers: Sequence[QuantizedLinear], formats: AttentionFormats | None, centre: bool
) -> ReferenceEngine:
    """The float32 reference; layers: the quantized linears, empty for float ones."""
    module = fake_quant(subject.model, layers, torch.float32) if layers else denoiser(subject.model)
    return ReferenceEngine(module if formats is None else AttentionDenoiser(module, formats, centre).eval())


def picture_rows(count: int, seed: int, work: Path) -> Iterator[Json]:
    """One row for each arm. psnr_db: of each picture to the float model's, the median."""
    subject = drawing.make_subject(MODEL, count, seed)
    recipe = recipes.with_settings(recipes.load(RECIPE), list(SETTINGS))
    layers = calibrate(subject.model, recipe, work / "calibrated")
    trajectory = drawing.float_trajectory(drawing.make_subject(MODEL, COMPARED_PICTURES, seed))
    steps = np.linspace(0, len(trajectory.calls) - 1, COMPARED_STEPS).round().astype(int).tolist()
    plain = drawing.draw(subject, drawing.float_engine(subject).run, "float")
    for linears, formats, centre in arms():
        run = engine(subject, layers if linears == QUANTIZED else (), formats, centre).run
        label = f"{linears}, {formats or 'float'}, {'without' if centre else 'with'} K's mean"
        pictures = plain if linears == FLOAT and formats is None else drawing.draw(subject, run, label)
        outputs = [sqnr_db(trajectory.outputs[step], run(trajectory.calls[step])["sample"]) for step in steps]
        psnr = None if pictures is plain else asdict(median_estimate(psnr_db(pictures, plain)))
        logger.info("%s: PSNR %s, steps %s", label, psnr and round(psnr["value"], 1), np.round(outputs, 1).tolist())
        yield {
            "linears": linears,
            "formats": None if formats is None else str(formats),
            "centre": centre,
            "psnr_db": psnr,
            "step_sqnr_db": None if psnr is None else outputs,
        }


def main() -> None:
    """Measure and write."""
    parser = record.parser(f"benchmarks.quality.{NAME}", __doc__)
    parser.add_argument("--count", type=int, default=16, help="pictures of each arm")
    parser.add_argument("--seed", type=int, default=SEED, help="of prompts and noise")
    parser.add_argument("--work-dir", type=Path, default=Path("work/attention_study"))
    parser.add_argument("-o", "--output-dir", type=Path, default=record.RESULTS, help="folder of the result")
    arguments = record.parsed(parser)
    document: Json = {"drawn": list(drawn_rows()), "count": arguments.count, "seed": arguments.seed, "pictures": []}
    document |= {"model": MODEL, "recipe": RECIPE, "settings": list(SETTINGS)}
    record.write(NAME, document, arguments.output_dir)
    for row in picture_rows(arguments.count, arguments.seed, arguments.work_dir):
        document["pictures"].append(row)
        path = record.write(NAME, document, arguments.output_dir)
    print(path)


if __name__ == "__main__":
    main()
