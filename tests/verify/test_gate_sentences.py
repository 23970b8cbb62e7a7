"""What a failed gate says: the layer or stretch, the call, and what is likely wrong."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.verify.calls import SampleError
from pipeline.verify.extremes import ExtremeResult
from pipeline.verify.gates import (
    LAYER_RULES,
    NONFINITE,
    NOT_COVERED,
    coverage_gate,
    first_nonfinite,
    layer_gates,
    quantizers_gate,
    segments_gate,
)
from pipeline.verify.oracle import activation_oracle, check_linear, joined
from pipeline.verify.probe import ProbedGraph
from pipeline.verify.proof import worst_calls
from pipeline.verify.report import Gate, LayerResult
from pipeline.verify.study import StepErrors
from tests.support.hand_lowered import linear, lower
from tests.verify.test_report import layer

CALL = "batch of 3 (1 of 7 calls are wrong)"


def gates_of(rows: list[LayerResult], bad_outputs: int = 0, where: str = "") -> dict[str, Gate]:
    return {gate.name.removeprefix("cpu/"): gate for gate in layer_gates("cpu", rows, bad_outputs, where)}


@pytest.mark.parametrize("rule", LAYER_RULES, ids=lambda rule: rule.name)
def test_a_gate_over_layers_names_layer_call_and_cause(rule: Any) -> None:
    right = layer("a", operand_max_abs_diff=0.0)
    wrong = replace(right, name="b", **{rule.key: 7}, calls={rule.key: CALL})
    gate = gates_of([right, wrong])[rule.name]
    assert not gate.passed and gate.why == f"{rule.why}; most in b, in {CALL}: {rule.cause}"
    assert rule.cause not in gates_of([right])[rule.name].why


def test_wrong_codes_name_layer_call_and_cause() -> None:
    rows = [layer("a"), layer("b", codes_equal_share=0.9, codes_inadmissible=50, calls={"codes_inadmissible": CALL})]
    gate = gates_of(rows)["codes_equal"]
    assert not gate.passed and f"; most in b, in {CALL}: it quantizes by another format" in gate.why


def test_numbers_that_are_not_finite_name_the_first_layer_or_else_the_call() -> None:
    rows = [layer("a"), layer("b", nonfinite=1, calls={"nonfinite": CALL}), layer("c", nonfinite=90)]
    assert gates_of(rows)["finite"].why.endswith(f"; first in b, in {CALL}: there or before it {NONFINITE}")
    errors = [SampleError("step 1", 0, 50.0, "p", 0), SampleError("step 2", 1, math.nan, "p", 1)]
    pictures = np.zeros((2, 3, 4, 4))
    where = first_nonfinite(StepErrors([], 0, errors), pictures)
    assert where == "step 2, sample 1"
    said = gates_of([layer("a")], 5, where)["finite"].why
    assert said.endswith(f"; in no layer that was looked at, first in {where}: {NONFINITE}")
    pictures[1, 0, 0, 0] = np.inf
    assert first_nonfinite(StepErrors([], 0, errors[:1]), pictures) == "picture 2 that the engine drew by itself"
    assert first_nonfinite(StepErrors([], 0, []), pictures[:1]) is None


def test_missing_linears_are_named() -> None:
    names = ["a", "b", "c", "d", "e"]
    gate = coverage_gate("cpu", {"b"}, names)
    assert (gate.value, gate.limit) == (1, 5) and not gate.passed
    assert gate.why.endswith(f"; without a, c, d and 1 more, in every call: {NOT_COVERED}")
    assert coverage_gate("cpu", set(names), names).passed and "without" not in coverage_gate("cpu", names, names).why


@pytest.mark.parametrize(
    ("factor", "codes", "scale_error", "cause"),
    [
        (1e12, 0, math.inf, "its scale overflows a type such as FP16"),
        (1e-25, 4, 3.0, "the floor of its absmax is another"),
        (0.0, 4, 0.0, "codes are clipped or rounded otherwise"),
        (1e12, 4, math.nan, "its scale overflows"),
    ],
)
def test_a_wrong_quantizer_names_call_and_cause(factor: float, codes: int, scale_error: float, cause: str) -> None:
    rows = [ExtremeResult("a", 1e-6, 0, 0.5), ExtremeResult("b", factor, codes, scale_error)]
    gate = quantizers_gate("cpu", rows, "batch of 1")
    assert gate.value == 1 and not gate.passed
    assert f"first that of b, in batch of 1 times {factor:g}: {codes} codes" in gate.why and f": {cause}" in gate.why


def test_an_attention_s_quantizers_that_are_wrong_say_so() -> None:
    rows = [ExtremeResult("a", 1e-6, output_error=0.9), ExtremeResult("b", 1e12, output_error=3.0)]
    gate = quantizers_gate("cpu", rows, "batch of 1")
    assert gate.value == 1 and "first that of b, in batch of 1 times 1e+12: its output is off by 3 times" in gate.why


def test_stretches_that_were_not_judged_say_why() -> None:
    gate = segments_gate("cpu", [])
    assert not gate.passed and gate.why.endswith("; none was judged: linears are missing, see coverage")


def test_the_worst_call_of_a_layer_is_kept(tmp_path: Path) -> None:
    one, rng = linear("a", 96, 64, 1), np.random.default_rng(0)
    calls = [{"x": rng.standard_normal((50, 64)).astype(np.float32)} for _ in range(3)]
    probes = dict(ProbedGraph(lower([one], tmp_path / "hand.onnx")).probes(["a"], calls))["a"]
    texts = ["step 1", "step 2", "batch of 3"]

    def kept(of: list[Any]) -> dict[str, str]:
        whole = joined(of)
        numbers = check_linear(one, whole, activation_oracle(np.nan_to_num(whole.x), one))
        return worst_calls(one, dict(zip(texts, of, strict=True)), numbers)

    assert kept(probes) == {}
    spoilt = [np.array(probe.gemm) for probe in probes]
    spoilt[1][3, 0], spoilt[2][3, 0] = spoilt[1][3, 0] + 1, spoilt[2][3, 0] + 2
    worst = kept([replace(probe, gemm=gemm) for probe, gemm in zip(probes, spoilt, strict=True)])
    assert worst == {"gemm_max_abs_diff": "batch of 3 (2 of 3 calls are wrong)"}
    outputs = [np.array(probe.output) for probe in probes]
    outputs[1][0, 0] = np.nan
    worst = kept([replace(probe, output=output) for probe, output in zip(probes, outputs, strict=True)])
    assert worst == dict.fromkeys(("output_error", "nonfinite"), "step 2 (1 of 3 calls are wrong)")
