"""The quantized attentions of a target: what is looked at, what was found, and the gates over it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from pipeline.verify.attention_oracle import AttentionCheck, AttentionNumbers, AttentionProbe, check_attention
from pipeline.verify.effort import MOST_SCORES
from pipeline.verify.report import AttentionResult, Gate

NAMED = 3


@dataclass
class Attentions:
    """numbers: the attentions to look at, by name. order: of those and the linears, in which they are computed.
    results: what was found so far."""

    numbers: Mapping[str, AttentionNumbers]
    order: Sequence[str]
    results: list[AttentionResult] = field(default_factory=list)

    def judge(self, target: str, name: str, path: str, probes: Mapping[str, AttentionProbe]) -> None:
        """Compare one with the oracle in each call, `probes` by its text."""
        numbers = self.numbers[name]
        checks = {text: check_attention(probe, numbers, MOST_SCORES) for text, probe in probes.items()}
        call = max(checks, key=lambda text: checks[text].output_error)
        worst, rows = checks[call], sum(check.rows for check in checks.values())
        ambiguous = sum(check.ambiguous * check.rows for check in checks.values()) / rows
        result = AttentionResult(
            target=target,
            name=name,
            path=path,
            qk_format=numbers.qk_format,
            pv_format=numbers.pv_format,
            output_error=worst.output_error,
            nonfinite=sum(check.nonfinite for check in checks.values()),
            rows=rows,
            rows_of=sum(check.rows_of for check in checks.values()),
            ambiguous_share=ambiguous,
            call=call,
            diagnosis=diagnose(worst) if worst.output_error > 1 else None,
        )
        self.results.append(result)


def diagnose(check: AttentionCheck) -> str:
    """What is likely wrong, from which samples and heads are. A few that are right say nothing: those with one key are,
    whatever is done to scores."""
    wrong = check.errors > 1
    sample, head, query, channel = check.worst
    text = f"most in sample {sample}, head {head}, query {query}, channel {channel}"
    for axis, name in ((1, "samples"), (0, "heads")):
        of_slice = np.asarray(wrong.any(axis=axis))
        if 2 * np.count_nonzero(of_slice) <= of_slice.size:
            return f"{text}; only in {name} {_listed(of_slice)} of {of_slice.size}: {CAUSES[name]}"
    return f"{text}; in {np.count_nonzero(wrong)} of {wrong.size} heads of all samples: {CAUSES['all']}"


CAUSES = {
    "samples": "the operands or the mask of another sample are used",
    "heads": "heads are in another order, or read another head's operands",
    "all": "a format, a scale, the mean of K, the rounding of exponentials or what divides them is another",
}


def _listed(chosen: NDArray[np.bool_]) -> str:
    places = np.flatnonzero(chosen)
    return ", ".join(map(str, places[:6])) + (", ..." if len(places) > 6 else "")


def attention_gates(target: str, rows: Sequence[AttentionResult], expected: Collection[str]) -> list[Gate]:
    """Of all attentions of the model, `expected`; none where the recipe leaves attention in float."""
    if not expected:
        return []
    why = "quantized attentions that the target's graph computes, of all that the model has"
    missing = [name for name in expected if name not in {row.name for row in rows}]
    if missing:
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        why += f"; without {', '.join(missing[:NAMED])}{more}: lowering lost what they compute"
    count = len(expected)
    coverage = Gate(f"{target}/attention_coverage", count - len(missing), count, "attentions", why, at_most=False)
    why = (
        "8-bit attention on the engine's own q, k, v and mask: within what float32 roundings, and the flips of codes "
        "that they can cause, change of its definition's result"
    )
    worst = max(rows, key=lambda row: row.output_error, default=None)
    error = math.nan if worst is None else worst.output_error
    gate = Gate(f"{target}/attention_output", error, 1, "x bound", why)
    if worst is None:
        return [coverage, replace(gate, why=f"{why}; there is no attention at all: see attention_coverage")]
    place = f"; most in {worst.name}" + ("" if gate.passed else f", in {worst.call}: {worst.diagnosis}")
    return [coverage, replace(gate, why=why + place)]


def note(target: str, rows: Sequence[AttentionResult]) -> str | None:
    """What a report says where not every query was looked at."""
    judged, of = sum(row.rows for row in rows), sum(row.rows_of for row in rows)
    if judged == of:
        return None
    return f"{target}: attention is judged in every head of every call, for {judged:,} of {of:,} queries: it is long"
