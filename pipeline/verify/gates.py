"""From results to gates: which number is compared with which limit, and why that limit."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.distance import PIXEL_RANGE, Array, psnr_db
from pipeline.generate.case import Case
from pipeline.recipe import Recipe
from pipeline.verify.call_patterns import (
    CALL_TRAITS,
    EQUAL_DB,
    PICTURE_TRAITS,
    SETTING_CAUSES,
    STEP_TRAITS,
    Setting,
    TraitTable,
    diagnose,
    sign_of,
)
from pipeline.verify.calls import SampleError, StateResult
from pipeline.verify.extremes import FACTORS, ExtremeResult
from pipeline.verify.report import AttentionResult, Gate, LayerResult, SegmentResult, StepResult
from pipeline.verify.study import Realisations, StepErrors, Study

# An engine and a float32 run of the reference are two draws of one experiment: the float64 result, plus what flipped
# codes do to it. Every flip adds about the same power and their number grows in proportion to the rounding error before
# the quantizers, so a factor of 2 in amplitude (4 in power) allows an engine whose operations between two quantizers
# round four times as coarsely as PyTorch's (approximate exponentials and GELU, other orders of summation).
FACTOR = 2.0
FACTOR_DB = 20 * math.log10(FACTOR)
# Without any flip a right engine is still off by the rounding of its float operations: some 10 in a row per linear and
# 10 linears in a row per layer, each a few units in the last place. For tens of layers this stays under 2^-24 * 170, or
# 100 dB, and no flip-free engine is asked for more.
ROUNDED_DB = 100.0
# That a right engine with few samples fails for how they fell.
CHANCE = 0.01


@dataclass(frozen=True)
class LayerRule:
    """A gate over all linears of a target: the field of LayerResult it reads, and how the layers are combined.

    cause: what is likely wrong where it fails. may_be_absent: nan in the field stands for nothing to compare. idle:
    what the report says of layers where it is nan.
    """

    name: str
    key: str
    limit: float
    unit: str
    why: str
    cause: str
    total: bool = False
    may_be_absent: bool = False
    idle: str | None = None

    def absent(self, value: float) -> bool:
        """Is there nothing to compare in a layer with this number?"""
        return self.may_be_absent and math.isnan(value)

    def fails(self, value: float) -> bool:
        """Is a layer's number beyond the limit? nan is, but where it stands for nothing to compare."""
        return not value <= self.limit and not self.absent(value)


# nan in place of a difference marks such a path.
NO_SUM = (
    "a GEMM with real scales per group, of formats too wide for integers, or of operands that are scaled beforehand, "
    "has no single integer sum; linear_output bounds its product"
)
LAYER_RULES = (
    LayerRule(
        "gemm_exact",
        "gemm_max_abs_diff",
        0,
        "",
        "every GEMM equals the exact integer sum of its own codes",
        "its weight codes are other ones or in another order, or sums overflow or round",
        may_be_absent=True,
        idle=NO_SUM,
    ),
    LayerRule(
        "operands_exact",
        "operand_max_abs_diff",
        0,
        "",
        "both operands of every GEMM are its own codes times their scales, rounded as the dialect says, to the bit",
        "an operand is decoded by another table, scale or zero point, or rounded to fewer bits",
        may_be_absent=True,
    ),
    LayerRule(
        "codes_inadmissible",
        "codes_inadmissible",
        0,
        "codes",
        "an activation code may differ from the oracle's only within float32 rounding of a midpoint",
        "it quantizes by another format, scale, clip or rule of rounding, or what it reads is not its input",
        total=True,
    ),
    LayerRule(
        "scale_error",
        "scale_error",
        1,
        "x bound",
        "token scales within two float32 roundings of the oracle's",
        "absmax is of other numbers (of all tokens, of a part), has another floor, or is kept in fewer bits",
    ),
    LayerRule(
        "linear_output",
        "output_error",
        1,
        "x bound",
        "channel scales, bias and branches: every output within the float32 roundings that follow the integer sum",
        "a channel scale, token scale, bias, zero point or branch is another, or is applied in fewer bits",
    ),
)

# How many names a gate lists.
NAMED = 3
NOT_COVERED = "they are not in the checkpoint, or lowering lost what they compute"
NONFINITE = "a number overflows the type that holds it, or is divided by zero"


def coverage_gate(target: str, present: Collection[str], expected: Collection[str]) -> Gate:
    """Names of the linears that a target's graph computes, and of all that the family quantizes."""
    why = "quantized linears that the target's graph computes, of all that the model's family quantizes"
    missing = [name for name in expected if name not in present]
    if missing:
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        why += f"; without {', '.join(missing[:NAMED])}{more}, in every call: {NOT_COVERED}"
    return Gate(f"{target}/coverage", len(expected) - len(missing), len(expected), "linears", why, at_most=False)


def layer_gates(
    target: str,
    rows: Sequence[LayerResult],
    bad_outputs: int,
    where: str | None = None,
    attentions: Sequence[AttentionResult] = (),
    order: Sequence[str] = (),
) -> list[Gate]:
    """Gates over all linears of a target; a failed one names the worst layer, its worst call and the likely cause.

    attentions: whose numbers must be finite, too; order: in which linears and attentions are computed.

    bad_outputs: how many numbers of steps and pictures are not finite; where: the first of these in words. Without
    `gemm_exact` where no layer has anything to compare there, see `notes_on_layers`.
    """
    by_rule = [_layer_gate(target, rule, rows) for rule in LAYER_RULES if not rows or _compared(rule, rows)]
    places = {name: place for place, name in enumerate(order)}
    every: list[LayerResult | AttentionResult] = [*rows, *attentions]
    if attentions:
        every.sort(key=lambda row: places[row.name])
    return [_finite_gate(target, every, bad_outputs, where), *by_rule, _codes_gate(target, rows)]


def _finite_gate(
    target: str, rows: Sequence[LayerResult | AttentionResult], bad_outputs: int, where: str | None
) -> Gate:
    """Names the first layer: from there on NaN goes through all that follow."""
    nonfinite = sum(row.nonfinite for row in rows) + bad_outputs
    why = "no NaN or Inf in any quantized layer, step or picture"
    first = next((row for row in rows if row.nonfinite), None)
    if first is not None:
        why += f"; first in {first.name}{_in_call(first, 'nonfinite')}: there or before it {NONFINITE}"
    elif bad_outputs:
        why += f"; in no layer that was looked at, first in {where or 'the outputs'}: {NONFINITE}"
    return Gate(f"{target}/finite", nonfinite, 0, "values", why)


def first_nonfinite(errors: StepErrors, pictures: Array) -> str | None:
    """The first step, or picture that the engine drew by itself, with a number that is not finite."""
    bad = next((error for error in errors.samples if math.isnan(error.sqnr_db)), None)
    if bad is not None:
        return f"{bad.call}, sample {bad.sample}"
    place = next((i for i, picture in enumerate(pictures) if not np.isfinite(picture).all()), None)
    return None if place is None else f"picture {place + 1} that the engine drew by itself"


def notes_on_layers(target: str, rows: Sequence[LayerResult]) -> list[str]:
    """What a report says where a gate over layers would pass without having compared any."""
    idle = [rule for rule in LAYER_RULES if rule.idle and rows and not _compared(rule, rows)]
    return [f"{target}: {rule.name} compares 0 of {len(rows)} layers and is no gate here: {rule.idle}" for rule in idle]


def _compared(rule: LayerRule, rows: Sequence[LayerResult]) -> list[LayerResult]:
    return [row for row in rows if not rule.absent(getattr(row, rule.key))]


def _layer_gate(target: str, rule: LayerRule, rows: Sequence[LayerResult]) -> Gate:
    """nan, which never passes, where the target has no layer at all."""
    compared = _compared(rule, rows)
    values = np.array([getattr(row, rule.key) for row in compared] or [math.nan], np.float64)
    combined = values.sum() if rule.total else values.max()
    why = rule.why
    if len(compared) < len(rows):
        why += f"; {len(compared)} of {len(rows)} layers" + (f": {rule.idle}" if rule.idle else "")
    gate = Gate(f"{target}/{rule.name}", float(combined), rule.limit, rule.unit, why)
    return replace(gate, why=why + _culprit(compared, rule, gate.passed))


def _culprit(rows: Sequence[LayerResult], rule: LayerRule, passed: bool) -> str:
    """The layer with the largest number, if any layer has one above zero; where that fails, in which call, and why."""
    worst = max(rows, key=lambda row: np.nan_to_num(getattr(row, rule.key), nan=np.inf), default=None)
    if worst is None:
        return "; there is no layer at all: see coverage"
    if passed:
        return f"; most in {worst.name}" if getattr(worst, rule.key) != 0 else ""
    return f"; most in {worst.name}{_in_call(worst, rule.key)}: {rule.cause}"


def _in_call(row: LayerResult | AttentionResult, key: str) -> str:
    if isinstance(row, AttentionResult):
        return f", in {row.call}"
    return f", in {row.calls[key]}" if key in row.calls else ""


def _codes_gate(target: str, rows: Sequence[LayerResult]) -> Gate:
    """A code that no rounding explains is what takes the share below its limit, so that the cause is that rule's."""
    share = float(np.mean([row.codes_equal_share for row in rows])) if rows else math.nan
    limit = float(np.mean([row.codes_limit_share for row in rows])) if rows else 1.0
    why = "share of activation codes equal to the oracle's; the limit is the share that no float32 rounding can change"
    gate = Gate(f"{target}/codes_equal", share, limit, "share", why, at_most=False)
    rule = next(rule for rule in LAYER_RULES if rule.key == "codes_inadmissible")
    return gate if gate.passed else replace(gate, why=f"{why}{_culprit(rows, rule, passed=False)}")


def step_results(
    target: str, errors: StepErrors, study: Study, single: Realisations, steps: Sequence[int]
) -> list[StepResult]:
    """One row per denoising step; `errors` are those of `steps`, and the others' is nan."""
    measured = dict(zip(steps, errors.steps_db, strict=True))
    worst = [min(run.steps_db[step] for run in single.errors) for step in range(len(study.calls))]
    rows = enumerate(zip(worst, study.quant_db, strict=True))
    return [StepResult(target, step, measured.get(step, math.nan), *numbers) for step, numbers in rows]


def end_gates(target: str, errors: StepErrors, pictures: Array, study: Study, single: Realisations) -> list[Gate]:
    """Engine against the float64 reference: steps on the same inputs, and the pictures of its own trajectory.

    `single`: float32 runs of the reference in the target's arithmetic. The worst step bounds how bad it can get; the
    median sample tells a fault that touches every sample from flips that hit few. No limit is looser than the error of
    quantization itself, unless that is under ROUNDED_DB: none asks for more. A target that draws no picture has no gate
    for it.
    """
    worst_step = np.min([value for run in single.hit_errors for value in run.steps_db])
    quarter = _quarter([sample.sqnr_db for run in single.errors for sample in run.samples])
    worst_picture = np.min([value for drawn in single.hit_pictures for value in pictures_db(study, drawn)])
    step_cost, picture_cost = np.min(study.quant_db), np.min(pictures_db(study, study.pictures["float"]))
    samples_db = [sample.sqnr_db for sample in errors.samples]
    rows = [
        ("step_sqnr_db", np.min(errors.steps_db), (worst_step, step_cost), "worst step"),
        ("median_sqnr_db", _median(samples_db), (quarter, step_cost), "lower quartile"),
    ]
    gates = [_end_gate(f"{target}/{name}", value, limits, statistic) for name, value, limits, statistic in rows]
    gates = [_with_cause(gate, errors.samples, STEP_TRAITS) for gate in gates]
    if len(pictures):
        psnr = np.min(pictures_db(study, pictures))
        gate = _end_gate(f"{target}/final_psnr_db", psnr, (worst_picture, picture_cost), "worst picture")
        later = "; " + NOT_IN_STEPS if not gate.passed and all(step.passed for step in gates) else ""
        gates.append(replace(gate, why=gate.why + later))
        gates[-1] = _with_cause(gates[-1], picture_errors(study, pictures), PICTURE_TRAITS)
    return gates


NOT_IN_STEPS = "every step is right on the reference's own inputs: errors grow from step to step, or something is kept"


def picture_errors(study: Study, pictures: Array) -> list[SampleError]:
    """Each picture as a sample of one call; the number is its PSNR."""
    reference, rows = study.pictures["reference"], tuple(range(len(pictures)))
    signs = [sign_of(picture, row, reference, rows) for row, picture in enumerate(pictures)]
    pairs = zip(pictures_db(study, pictures), signs, strict=True)
    return [SampleError("pictures", i, value, "pictures", i, sign=sign) for i, (value, sign) in enumerate(pairs)]


def _with_cause(gate: Gate, errors: Sequence[SampleError], traits: TraitTable) -> Gate:
    """A failed gate with what is likely wrong."""
    if gate.passed or not errors:
        return gate
    return replace(gate, why=f"{gate.why}; {diagnose(errors, gate.limit, traits)}")


def _end_gate(name: str, value: float, limits: tuple[float, float], statistic: str) -> Gate:
    """limits: of the float32 runs, and of quantization; nan where these runs overflowed, which gives no tolerance."""
    float32, quantization = limits
    why = f"{statistic} of the reference's float32 runs, less {FACTOR_DB:.0f} dB; or quantization's own error"
    if any(math.isnan(limit) for limit in limits):
        why += "; the model's own runs overflow in this arithmetic"
    numbers = [limit for limit in (float32 - FACTOR_DB, quantization) if not math.isnan(limit)]
    limit = min(max(numbers, default=ROUNDED_DB), ROUNDED_DB)
    return Gate(name, float(value), float(limit), "dB", why, at_most=False)


def calls_gates(
    target: str,
    errors: Sequence[SampleError],
    study: Study,
    single: Realisations,
    steps: Sequence[SampleError] = (),
) -> list[Gate]:
    """Calls that drawing does not make: the worst of all samples, and the median one. `steps`: the samples of the calls
    that it makes, which a fault of some calls may leave right.

    For the median a sample that several calls make counts once, by its worst: the float32 runs that give the limit made
    each once, and three samples make up two thirds of all calls.
    """
    values, by_sample = [error.sqnr_db for error in errors], dict[tuple[str, int], list[float]]()
    for error in errors:
        by_sample.setdefault((error.pool, error.row), []).append(error.sqnr_db)
    worst_of = [np.min(sample_db) for sample_db in by_sample.values()]
    worst = min(errors, key=lambda error: np.nan_to_num(error.sqnr_db, nan=-np.inf, posinf=np.inf))
    # Of runs that flips hit: a few samples without any flip in plain runs would ask the same luck of the engine.
    quarter = _quarter(single.hit_calls_db)
    rows = (
        ("calls", np.min(values), (np.min(single.hit_calls_db), np.min(study.calls_quant_db)), "worst sample"),
        ("calls_median", np.median(worst_of), (quarter, np.median(study.calls_quant_db)), "lower quartile"),
    )
    gates = [_end_gate(f"{target}/{name}", value, limits, statistic) for name, value, limits, statistic in rows]
    gates = [replace(gate, why=f"{gate.why}; worst in {worst.call}, sample {worst.sample}") for gate in gates]
    return [_with_cause(gate, [*steps, *errors], CALL_TRAITS) for gate in gates]


def quantizers_gate(target: str, rows: Sequence[ExtremeResult], call: str) -> Gate:
    """Quantizers on tokens that no call reaches: very small, zero, very large; made from those of `call`."""
    why = f"quantizers that differ from the oracle on their tokens times {', '.join(f'{f:g}' for f in FACTORS)}"
    wrong = [row for row in rows if not row.passed]
    if wrong:
        row = wrong[0]
        why += f"; first that of {row.layer}, in {call} times {row.factor:g}: "
        if row.output_error:
            why += f"its output is off by {row.output_error:g} times its bound: {_cause_of_extreme(row)}"
        else:
            why += f"{row.codes_inadmissible} codes, scale "
            why += f"off by {row.scale_error:g} times its bound: {_cause_of_extreme(row)}"
    return Gate(f"{target}/quantizers", len(wrong), 0, "quantizers", why)


def _cause_of_extreme(row: ExtremeResult) -> str:
    """What is likely wrong with a quantizer; FACTORS begin below the floor of absmax, and end beyond FP16."""
    if row.scale_error <= 1 and not row.output_error:
        return "codes are clipped or rounded otherwise, or NaN comes from zero times infinity"
    if row.factor > 1:
        return "its scale overflows a type such as FP16, or has an upper bound"
    return "the floor of its absmax is another, or an epsilon is added to it"


def repeats_gate(target: str, state: StateResult) -> Gate:
    """Equal calls, with others between them and beside them in another thread."""
    why = "equal calls give equal numbers to the bit: after other conditions, in place, after many, in two threads"
    if state.first is not None:
        assert isinstance(state.first.setting, Setting)
        why += f"; first other in {state.first.text}: {SETTING_CAUSES[state.first.setting]}"
    return Gate(f"{target}/repeats", state.unequal, 0, "numbers", why)


def fp16_gate(target: str, where: tuple[str, object] | None) -> Gate:
    """An engine with FP16 between its steps; `where`: the call and the first number that is too
    large for it, in words."""
    why = "numbers between the engine's steps stay within FP16; found on the CPU, in calls whose inside is looked at"
    why += f"; in {where[0]}: {where[1]}" if where else ""
    return Gate(f"{target}/fp16_range", int(where is not None), 0, "steps", why)


def segments_gate(target: str, rows: Sequence[SegmentResult]) -> Gate:
    """The worst stretch; names the first that is over its limit, whose error those behind it may have inherited."""
    why = "every stretch between quantized linears within what rounding does in it, on the engine's own tensors"
    first = next((row for row in rows if not row.error <= 1), None)
    if first is not None:
        why += f"; first over its limit: the stretch up to {first.end}, in {first.call}: {first.diagnosis}"
    elif not rows:
        why += "; none was judged: linears are missing, see coverage"
    error = max((row.error for row in rows), default=math.nan)
    return Gate(f"{target}/segments", error, 1, "x bound", why)


def _quarter(values: Sequence[float]) -> float:
    """The lower quartile of float32 runs; an overflow counts as the worst there is.

    Equal samples count as EQUAL_DB, and overflows as its negative: between two infinities there is no number.
    """
    return float(np.quantile(np.nan_to_num(np.clip(values, -EQUAL_DB, EQUAL_DB), nan=-EQUAL_DB), 0.25))


def _median(samples: Sequence[float]) -> float:
    """The median of samples of which a quarter is below the limit where nothing is wrong. Of few samples half may be so
    by chance: then the largest of so many as are by a chance of at most CHANCE. nan if any is.

    >>> _median([60.0] * 20 + [120.0] * 21), _median([60.0, 60.0, 60.0, 120.0])
    (120.0, 120.0)
    """
    n = len(samples)
    chances = {
        rank: sum(math.comb(n, k) * 0.25**k * 0.75 ** (n - k) for k in range(rank, n + 1))
        for rank in range((n + 1) // 2, n + 1)
    }
    rank = next((rank for rank, chance in chances.items() if chance <= CHANCE), n)
    if 2 * rank <= n + 1 or np.isnan(samples).any():
        return float(np.median(samples))
    return float(np.sort(samples)[rank - 1])


def pictures_db(study: Study, pictures: Array) -> list[float]:
    """PSNR of each picture against the float64 reference's; `pictures` may be the first few. Latents are compared by
    the range that the reference's have."""
    reference = study.pictures["reference"]
    in_pixels = isinstance(study.case, Case) and study.case.output == "pixels"
    peak = PIXEL_RANGE if in_pixels else float(np.ptp(reference))
    return [psnr_db(one, other, peak) for one, other in zip(reference[: len(pictures)], pictures, strict=True)]


def quantization_gates(study: Study, recipe: Recipe, of_pictures: bool = True) -> list[Gate]:
    """What quantization costs: the reference against the float model, within the recipe's budgets.

    of_pictures: that of pictures too, whose budget is for as many steps as the recipe has.
    """
    noise = sum(10 ** (-value / 10) for value in study.quant_db) / len(study.quant_db)
    sqnr = -10 * math.log10(noise) if noise > 0 else math.inf
    pictures = pictures_db(study, study.pictures["float"])
    psnr = float(np.median(pictures))
    budget = "what quantization costs against the float model; the limit is the recipe's budget"
    rows = [("quant_sqnr_db", sqnr, recipe.budgets.quant_sqnr_db, "step", study.quant_db)]
    if study.case.makes_pictures and of_pictures:
        rows.append(("final_psnr_fp_db", psnr, recipe.budgets.final_psnr_fp_db, "picture", pictures))
    gates = []
    for name, value, limit, unit, values in rows:
        gate = Gate(name, value, limit, "dB", f"{unit}s: {budget}", at_most=False)
        worst = f"; worst in {unit} {_worst_place(values)}: {TOO_COARSE}"
        gates.append(gate if gate.passed else replace(gate, why=gate.why + worst))
    return gates


TOO_COARSE = "formats too narrow or groups too large for this model, or a calibration that went wrong"


def _worst_place(values: Sequence[float]) -> int:
    """Place of the lowest number, from 1; nan is the lowest."""
    return int(np.argmin(np.nan_to_num(values, nan=-np.inf, posinf=np.inf, neginf=-np.inf))) + 1
