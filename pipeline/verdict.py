"""From results to gates: which number is compared with which limit, and why that limit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.gates import psnr_db
from pipeline.recipe import Recipe
from pipeline.report import Gate, LayerResult, StepResult
from pipeline.study import Study

# An engine and a float32 run of the reference are two draws of one experiment: the float64 result, plus what flipped
# codes do to it. Every flip adds about the same power and their number grows in proportion to the rounding error before
# the quantizers, so a factor of 2 in amplitude (4 in power) allows an engine whose operations between two quantizers
# round four times as coarsely as PyTorch's (approximate exponentials and GELU, other orders of summation).
FACTOR = 2.0
FACTOR_DB = 20 * math.log10(FACTOR)
# Pictures of pixel models lie in [-1, 1]; latents are compared by the range that the reference's have.
PIXEL_RANGE = 2.0


@dataclass(frozen=True)
class LayerRule:
    """A gate over all linears of a target: the field of LayerResult it reads, and how the layers are combined."""

    name: str
    key: str
    limit: float
    unit: str
    why: str
    total: bool = False


LAYER_RULES = (
    LayerRule("gemm_exact", "gemm_max_abs_diff", 0, "", "every GEMM equals the exact integer sum of its own codes"),
    LayerRule(
        "codes_inadmissible",
        "codes_inadmissible",
        0,
        "codes",
        "an activation code may differ from the oracle's only within float32 rounding of a midpoint",
        total=True,
    ),
    LayerRule("scale_error", "scale_error", 1, "x bound", "token scales within two float32 roundings of the oracle's"),
    LayerRule(
        "linear_output",
        "output_error",
        1,
        "x bound",
        "channel scales and bias: every output within the float32 roundings that follow the integer sum",
    ),
)


def coverage_gate(target: str, count: int, expected: int) -> Gate:
    why = "quantized linears that the target's graph computes, of all that the model's family quantizes"
    return Gate(f"{target}/coverage", count, expected, "linears", why, at_most=False)


def layer_gates(target: str, rows: Sequence[LayerResult], bad_outputs: int) -> list[Gate]:
    """Gates over all linears of a target; a gate names the worst layer."""
    nonfinite = sum(row.nonfinite for row in rows) + bad_outputs
    why = "no NaN or Inf in any quantized layer, step or picture"
    finite = Gate(f"{target}/finite", nonfinite, 0, "values", why + _culprit(rows, "nonfinite"))
    return [finite, *(_layer_gate(target, rule, rows) for rule in LAYER_RULES), _codes_gate(target, rows)]


def _layer_gate(target: str, rule: LayerRule, rows: Sequence[LayerResult]) -> Gate:
    if rule.key == "gemm_max_abs_diff":  # nan marks a path that is no integer embedding; linear_output covers it
        rows = [row for row in rows if not math.isnan(row.gemm_max_abs_diff)]
    values = np.array([getattr(row, rule.key) for row in rows], np.float64)
    combined = values.sum() if rule.total else values.max(initial=0)
    return Gate(f"{target}/{rule.name}", float(combined), rule.limit, rule.unit, rule.why + _culprit(rows, rule.key))


def _culprit(rows: Sequence[LayerResult], key: str) -> str:
    """The layer with the largest number, if any layer has one above zero."""
    worst = max(rows, key=lambda row: np.nan_to_num(getattr(row, key), nan=np.inf), default=None)
    return f"; most in {worst.name}" if worst is not None and getattr(worst, key) != 0 else ""


def _codes_gate(target: str, rows: Sequence[LayerResult]) -> Gate:
    share = float(np.mean([row.codes_equal_share for row in rows])) if rows else math.nan
    limit = float(np.mean([row.codes_limit_share for row in rows])) if rows else 1.0
    why = "share of activation codes equal to the oracle's; the limit is the share that no float32 rounding can change"
    return Gate(f"{target}/codes_equal", share, limit, "share", why, at_most=False)


def step_results(target: str, steps_db: Sequence[float], found: Study) -> list[StepResult]:
    """One row per denoising step."""
    worst = [min(run[step] for run in found.fp32_db) for step in range(len(steps_db))]
    rows = zip(steps_db, worst, found.quant_db, strict=True)
    return [StepResult(target, step, *numbers) for step, numbers in enumerate(rows)]


def end_gates(target: str, steps_db: Sequence[float], images: NDArray[Any], found: Study) -> list[Gate]:
    """Engine against the float64 reference: every step on the same inputs, and the pictures of its own trajectory."""
    runs = f"the reference's {len(found.fp32_db)} float32 run(s)"
    why = f"the worst of {{}} by {runs}, less {FACTOR_DB:.0f} dB; or the quantization error"
    step_limit = max(min(min(run) for run in found.fp32_db) - FACTOR_DB, min(found.quant_db))
    fp32 = [
        value for name in found.images if name.startswith("fp32") for value in pictures_db(found, found.images[name])
    ]
    image_limit = max(min(fp32) - FACTOR_DB, min(pictures_db(found, found.images["float"])))
    step, image = _lowest(steps_db), _lowest(pictures_db(found, images))
    return [
        Gate(f"{target}/step_sqnr_db", step, step_limit, "dB", why.format("all steps"), at_most=False),
        Gate(f"{target}/final_psnr_db", image, image_limit, "dB", why.format("all pictures"), at_most=False),
    ]


def _lowest(values: Sequence[float]) -> float:
    return math.nan if any(math.isnan(value) for value in values) else min(values)


def pictures_db(found: Study, images: NDArray[Any]) -> list[float]:
    """PSNR of each picture against the float64 reference's."""
    reference = found.images["reference"]
    peak = PIXEL_RANGE if found.case.output == "pixels" else float(np.ptp(reference))
    return [psnr_db(one, other, peak) for one, other in zip(reference, images, strict=True)]


def quantization_gates(found: Study, recipe: Recipe) -> list[Gate]:
    """What quantization costs: the reference against the float model, within the recipe's budgets."""
    noise = sum(10 ** (-value / 10) for value in found.quant_db) / len(found.quant_db)
    sqnr = -10 * math.log10(noise) if noise > 0 else math.inf
    psnr = float(np.median(pictures_db(found, found.images["float"])))
    budget = "what quantization costs against the float model; the limit is the recipe's budget"
    return [
        Gate("quant_sqnr_db", sqnr, recipe.budgets.quant_sqnr_db, "dB", f"steps: {budget}", at_most=False),
        Gate("final_psnr_fp_db", psnr, recipe.budgets.final_psnr_fp_db, "dB", f"pictures: {budget}", at_most=False),
    ]
