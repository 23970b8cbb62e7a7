"""What learned rounding gains in each block: `python -m benchmarks.quality.adaround_study [ARM ...] --engine NAME`.

Scale-aware rounding (FP4DiT) and plain AdaRound, with published iterations and rates and with the fast presets',
against rounding to nearest: loss of the block's output (see pipeline/calibrate/learn/reconstruct.py) on the calibration
calls and on calls of other prompts and noise that were not learned from. All arms of a block get the same input, that
of the network whose earlier blocks are rounded to nearest. Writes benchmarks/results/adaround_study.json after every
arm of every block; what is there already is not run again. --share shortens all arms, for a trial.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.record import Json
from export.models import load as models
from pipeline import recipe as recipes
from pipeline.calibrate.blocks import BlockRunner, Observed, group_by_block
from pipeline.calibrate.data import calibration_data
from pipeline.calibrate.learn.adaround import Schedule, SoftRounding
from pipeline.calibrate.learn.reconstruct import LearningSettings, output_loss, reconstruct
from pipeline.calibrate.methods.rtn import float_weight, quantize_linear
from pipeline.calibrate.plan import LayerPlan, make_plans
from pipeline.machine import cpu_name
from pipeline.recipe import Recipe

HELD_OUT_SEED, HELD_OUT_PROMPTS = 1000, 8
STRENGTH = 0.01


@dataclass(frozen=True)
class Arm:
    """One way to round; without `scale_aware` to nearest."""

    scale_aware: bool | None = None
    iterations: int = 0
    learning_rate: float = 0.0
    batch: int = 16


# FP4DiT's code learns at 1e-4 with scale awareness and, switched off, without it ("same"); Q-Diffusion's at 1e-3.
ARMS = {
    "nearest": Arm(),
    "scale_aware_fast": Arm(True, 400, 4e-4, 8),
    "plain_fast": Arm(False, 400, 1e-2, 8),
    "scale_aware_2500": Arm(True, 2500, 1e-4),
    "scale_aware_2500_quick": Arm(True, 2500, 4e-4),
    "plain_2500": Arm(False, 2500, 1e-3),
    "plain_2500_quick": Arm(False, 2500, 1e-2),
    "plain_20000": Arm(False, 20000, 1e-3),
    "plain_2500_same": Arm(False, 2500, 1e-4),
    "plain_20000_same": Arm(False, 20000, 1e-4),
}


@dataclass(frozen=True)
class BlockCase:
    """One block: its plans, and what is observed on calibration data and on held-out data."""

    name: str
    plans: list[LayerPlan]
    learned_from: Observed
    held_out: Observed


def block_cases(recipe: Recipe) -> Iterator[BlockCase]:
    """The model's blocks in order, behind blocks that are rounded to nearest."""
    model = models.load(recipe.model)
    blocks = group_by_block(make_plans(model.linears(), recipe))
    other = replace(recipe.calibrate, seed=recipe.calibrate.seed + HELD_OUT_SEED, size=HELD_OUT_PROMPTS)
    datasets = [calibration_data(model, one) for one in (recipe, replace(recipe, calibrate=other))]
    runners = [BlockRunner(model, data, list(blocks)) for data in datasets]
    for name in runners[0].blocks:
        plans = blocks[name]
        observed = [runner.observe(name, plans) for runner in runners]
        yield BlockCase(name, plans, *observed)
        nearest = [quantize_linear(plan, recipe.weights.search) for plan in plans]
        for runner, seen in zip(runners, observed, strict=True):
            runner.advance(seen, nearest)


def run_arm(case: BlockCase, arm: Arm, recipe: Recipe) -> Json:
    """Learn one block in one way; losses, and how many codes are not the nearest."""
    nearest = [quantize_linear(plan, recipe.weights.search) for plan in case.plans]
    layers = nearest
    if arm.scale_aware is not None:
        weights = [torch.from_numpy(float_weight(plan)) for plan in case.plans]
        softened = [SoftRounding(weight, base, arm.scale_aware) for weight, base in zip(weights, nearest, strict=True)]
        roundings = {base.name: rounding for base, rounding in zip(nearest, softened, strict=True)}
        settings = LearningSettings(Schedule(arm.iterations), arm.learning_rate, STRENGTH, arm.batch)
        reconstruct(case.learned_from, roundings, settings, case.name, recipe.calibrate.seed)
        layers = [rounding.layer() for rounding in softened]
    changed = sum(int((a.unpacked_codes() != b.unpacked_codes()).sum()) for a, b in zip(layers, nearest, strict=True))
    return {
        **asdict(arm),
        "loss": output_loss(case.learned_from, layers),
        "held_out_loss": output_loss(case.held_out, layers),
        "codes_changed": changed / sum(layer.unpacked_codes().size for layer in layers),
    }


class Results:
    """The JSON file: recipe -> block -> arm -> what `run_arm` measured."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, "adaround_study"
        self.recipes: Json = record.read(folder / f"{self.name}.json", {"recipes": {}})["recipes"]

    def missing(self, key: str, block: str, arms: dict[str, Arm]) -> dict[str, Arm]:
        """The arms of a block that are not there, or were run otherwise (--share)."""
        there = self.recipes.get(key, {}).get(block, {})
        return {
            name: arm
            for name, arm in arms.items()
            if {field: there.get(name, {}).get(field, "") for field in asdict(arm)} != asdict(arm)
        }

    def add(self, key: str, block: str, arm: str, row: Json) -> None:
        stamp = {"commit": record.commit(), "cpu": cpu_name()}
        self.recipes.setdefault(key, {}).setdefault(block, {})[arm] = row | stamp
        record.write(self.name, {"recipes": self.recipes, "strength": STRENGTH}, self.folder)


def study(recipe: Recipe, arms: dict[str, Arm], blocks: int, results: Results) -> None:
    """Run what is missing of the first `blocks` blocks (0: all), printing a line for each arm."""
    formats = " ".join(f"{kind}={name}" for kind, name in recipe.formats.weight_of.items())
    weights = f"{recipe.formats.weight} {recipe.weights.granularity} {recipe.weights.group_size}"
    key = f"{recipe.model} {weights} {formats}".strip()  # of this model and these formats
    for case in islice(block_cases(recipe), blocks or None):
        for name, arm in results.missing(key, case.name, arms).items():
            row = run_arm(case, arm, recipe)
            results.add(key, case.name, name, row)
            print(f"{case.name} {name}: loss {row['loss']:.5f}, held out {row['held_out_loss']:.5f}", flush=True)


def shortened(arm: Arm, share: float) -> Arm:
    return replace(arm, iterations=round(arm.iterations * share))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = record.parser("benchmarks.quality.adaround_study", __doc__, ARMS)
    parser.add_argument("--engine", default="pixart_w4a6", metavar="NAME|RECIPE.toml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any recipe key")
    parser.add_argument("--blocks", type=int, default=0, help="only the first so many blocks")
    parser.add_argument("--share", type=float, default=1.0, help="of every arm's iterations")
    parser.add_argument("--results", type=Path, default=record.RESULTS, metavar="DIR")
    args = record.parsed(parser, argv)
    recipe = recipes.with_settings(recipes.load(args.engine), args.set)
    arms = {name: shortened(ARMS[name], args.share) for name in args.names}
    study(recipe, arms, args.blocks, Results(args.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
