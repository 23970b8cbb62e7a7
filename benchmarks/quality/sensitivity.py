"""Which layers cost most: one kind of linear quantized at a time, its weights, its activations, or both.

Measured by the error of the denoiser's output in every step, on the float model's own inputs, so that errors do not
add up over steps. Round to nearest, per channel; everything else stays as in the float model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from benchmarks.quality.drawing import Subject, Trajectory
from benchmarks.quality.engines import row_recipe
from benchmarks.quality.rows import ACTIVATIONS, ALL, CHANNEL, FP, INT, PARTS, WEIGHTS, Line
from benchmarks.record import Json
from export.checkpoint import QuantizedLinear
from export.models.load import LinearRef, denoiser
from pipeline.backends.reference import FakeQuantLinear, ReferenceEngine
from pipeline.calibrate.methods.rtn import quantize_linear
from pipeline.calibrate.plan import make_plans
from pipeline.progress import track

LINES = (Line("FP", "fp", CHANNEL, FP), Line("INT", "int", CHANNEL, INT))  # so that weights are equal at all widths


@dataclass(frozen=True)
class Measurement:
    """One measurement: row name ("fp-w4a6"), layer kind or "all", part, and the quantized layers of that kind."""

    row: str
    kind: str
    part: str
    layers: Sequence[QuantizedLinear]

    @property
    def same_as(self) -> tuple[str, ...]:
        """What decides the result of a weights-only case, which does not depend on the activations; () for others."""
        return (self.kind, *(layer.weight_format for layer in self.layers)) if self.part == WEIGHTS else ()


def sensitivity(subject: Subject, trajectory: Trajectory) -> list[Json]:
    """One record for each case, with step_sqnr_db, and sqnr_db of the mean noise share of the steps."""
    known: dict[tuple[str, ...], list[float]] = {}
    all_cases, records = cases(subject), []
    for case in track(all_cases, len(all_cases), f"{subject.name} sensitivity"):
        key = case.same_as or (case.row, case.kind, case.part)
        known[key] = known.get(key) or _steps_db(subject, trajectory, case)
        stated = {"row": case.row, "kind": case.kind, "part": case.part, "layers": len(case.layers)}
        records.append(stated | {"sqnr_db": mean_noise_db(known[key]), "step_sqnr_db": known[key]})
    return records


def cases(subject: Subject) -> list[Measurement]:
    """Every line and width, every layer kind and all kinds together, every part."""
    all_cases = []
    for row in (row for line in LINES for row in line.rows(subject.name)):
        recipe = row_recipe(row)
        plans = make_plans(subject.model.linears(), recipe)
        layers = [quantize_linear(plan, recipe.weights.search) for plan in plans]
        for kind in (*dict.fromkeys(layer.kind for layer in layers), ALL):
            chosen = [layer for layer in layers if kind in (layer.kind, ALL)]
            all_cases += [Measurement(row.name, kind, part, chosen) for part in PARTS]
    return all_cases


def _steps_db(subject: Subject, trajectory: Trajectory, case: Measurement) -> list[float]:
    linears = {ref.name: ref for ref in subject.model.linears()}
    replacements = {layer.name: PartlyQuantized(linears[layer.name], layer, case.part) for layer in case.layers}
    return trajectory.errors_db(ReferenceEngine(denoiser(subject.model, replacements), torch.float32).run)


def mean_noise_db(steps_db: Sequence[float]) -> float:
    """SQNR of the mean of the steps' noise shares.

    >>> round(mean_noise_db([20.0, 10.0]), 2)
    12.6
    """
    return float(-10 * np.log10(np.mean([10 ** (-value / 10) for value in steps_db])))


class PartlyQuantized(nn.Module):
    """A linear with its weight quantized, its input, or both."""

    def __init__(self, linear: LinearRef, layer: QuantizedLinear, part: str) -> None:
        super().__init__()
        self.quantized, self.part = FakeQuantLinear(layer, torch.float32), part
        self.weight = self.quantized.weight if part != ACTIVATIONS else linear.module.weight.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rounded = x if self.part == WEIGHTS else self.quantized.rounded_input(x)
        return nn.functional.linear(rounded, self.weight, self.quantized.bias)
