"""Gate arithmetic against brute force, probing of a graph lowered by hand, tolerances, and a whole verification."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from export.dialect.ops import OPS
from export.formats.format import FORMATS, decode, get_format
from export.formats.operands import ROUNDING
from export.models import load as models
from export.to_onnx import export_portable
from pipeline import recipe as recipes
from pipeline.backends import BACKENDS
from pipeline.backends.base import LoweredGraph
from pipeline.distance import psnr_db, sqnr_db
from pipeline.generate.case import Case, example_prompts
from pipeline.generate.conditioning import from_dict
from pipeline.verify import probe as probing
from pipeline.verify.call_patterns import Setting
from pipeline.verify.calls import SampleError
from pipeline.verify.effort import quick_note, quick_recipe
from pipeline.verify.gates import FACTOR_DB, NOT_IN_STEPS, ROUNDED_DB, TOO_COARSE, end_gates, quantization_gates
from pipeline.verify.oracle import LinearProbe, LinearWeight, activation_oracle, check_linear, exact_sums
from pipeline.verify.probe import ProbedGraph
from pipeline.verify.proof import verify
from pipeline.verify.reference_hooks import Comparison, Recorder, half_parts, hooked, jittered
from pipeline.verify.report import Gate
from pipeline.verify.study import Realisations, StepErrors, Study
from tests.support import tiny
from tests.support.hand_lowered import linear, lower
from tests.support.portable import random_linear
from tests.support.report_file import read_report


def oracle_of(x: Any, name: str) -> Any:
    """What a layer with one scale for each token gives for x [M, K]."""
    return activation_oracle(x, random_linear(activation=name, k=x.shape[1]))


SIGNED = [name for name, fmt in FORMATS.items() if fmt.sign_bits]


# --- error measures -------------------------------------------------------------------------------------------------


def test_sqnr_and_psnr_of_known_errors() -> None:
    assert sqnr_db(np.full(4, 10.0), np.full(4, 11.0)) == pytest.approx(20)
    assert psnr_db(np.zeros(4), np.full(4, 0.02), peak=2.0) == pytest.approx(40)


def test_equal_arrays_are_infinitely_close_and_nan_is_nan() -> None:
    x = np.arange(3.0)
    assert sqnr_db(x, x) == math.inf
    assert math.isnan(sqnr_db(x, np.array([0, np.nan, 2])))
    assert math.isnan(psnr_db(x, np.array([0, np.inf, 2]), 1.0))


# --- oracle of the activation quantizer -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIGNED)
def test_oracle_agrees_with_the_op_except_within_rounding_of_a_midpoint(name: str) -> None:
    x = np.random.default_rng(1).standard_normal((64, 96)).astype(np.float32)
    oracle = oracle_of(x, name)
    codes, scale = OPS["QuantizeActivation"].numpy(x, format=name)
    image = get_format(name).integers[codes]
    assert np.all((image >= oracle.lowest) & (image <= oracle.highest))
    assert np.count_nonzero(image != oracle.integers) <= oracle.ambiguous <= x.size // 1000
    assert np.all(np.abs(scale - oracle.scale) <= 2 * ROUNDING * oracle.scale)


@pytest.mark.parametrize("name", SIGNED)
def test_oracle_keeps_every_value_of_the_grid(name: str) -> None:
    fmt = get_format(name)
    codes = np.flatnonzero(np.isfinite(fmt.values) & (np.abs(fmt.values) <= fmt.max_value))
    x = decode(fmt, codes.astype(np.uint8))[None]
    assert np.array_equal(oracle_of(x, name).integers, fmt.integers[codes][None])


def test_only_numbers_next_to_a_midpoint_are_ambiguous() -> None:
    top, midpoint = 7.5, 0.1875  # E2M3 has 0.125 and 0.25
    near, far = midpoint * (1 + 2 * ROUNDING), midpoint * (1 + 20 * ROUNDING)
    oracle = oracle_of(np.array([[top, midpoint, near, far]]), "E2M3")
    assert oracle.ambiguous == 2
    assert oracle.integers.tolist() == [[60, 2, 2, 2]]
    assert oracle.lowest.tolist() == [[60, 1, 1, 2]]


def test_a_row_of_zeros_has_codes_zero() -> None:
    oracle = oracle_of(np.zeros((2, 8)), "E2M3")
    assert not oracle.integers.any() and oracle.ambiguous == 0


# --- exact GEMM -----------------------------------------------------------------------------------------------------


def _weight(integers: np.ndarray) -> LinearWeight:
    return LinearWeight(cast(Any, SimpleNamespace(integers=lambda: integers)))


@pytest.mark.parametrize("largest", [3, 4000, 2**20])
def test_exact_sums_equals_int64(largest: int) -> None:
    rng = np.random.default_rng(0)
    image, weight = rng.integers(-largest, largest, (33, 257)), rng.integers(-127, 128, (19, 257)).astype(np.int32)
    sums = exact_sums(image.astype(np.float64), _weight(weight), 1)
    assert np.array_equal(sums, image @ weight.T.astype(np.int64))


def test_exact_sums_refuses_what_float64_cannot_hold() -> None:
    with pytest.raises(ValueError, match="not exact in float64"):
        exact_sums(np.full((1, 4), 2.0**50), _weight(np.full((1, 4), 8, np.int32)), 1)


# --- probing a graph lowered by hand --------------------------------------------------------------------------------


@pytest.fixture
def hand(tmp_path: Path) -> tuple[list[Any], LoweredGraph, list[dict[str, Any]]]:
    layers = [linear("a", 96, 64, 1), linear("b", 64, 96, 2)]
    rng = np.random.default_rng(0)
    calls = [{"x": rng.standard_normal((50, 64)).astype(np.float32)} for _ in range(2)]
    return layers, lower(layers, tmp_path / "hand.onnx"), calls


def test_a_right_graph_passes_every_check(hand: Any) -> None:
    layers, graph, calls = hand
    probed = ProbedGraph(graph)
    assert probed.complete == {"a", "b"}
    probes_of = dict(probed.probes(["a", "b"], calls))
    for layer in layers:
        assert len(probes_of[layer.name]) == 2
        for probe in probes_of[layer.name]:
            numbers = check_linear(layer, probe, activation_oracle(probe.x, layer))
            assert (numbers.gemm_max_abs_diff, numbers.codes_inadmissible, numbers.nonfinite) == (0, 0, 0)
            assert numbers.codes_different <= numbers.codes_ambiguous
            assert 0 < numbers.scale_error <= 1 and 0 < numbers.output_error <= 1


def test_probing_layer_by_layer_gives_the_same_tensors(hand: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, graph, calls = hand
    whole = dict(ProbedGraph(graph).probes(["a", "b"], calls))
    monkeypatch.setattr(probing, "FIRST_BATCH", 1)
    monkeypatch.setattr(probing, "BATCH_BYTES", 1)
    pieces = dict(ProbedGraph(graph).probes(["a", "b"], calls))
    for name, probes in whole.items():
        for one, other in zip(probes, pieces[name], strict=True):
            assert np.array_equal(one.gemm, other.gemm) and np.array_equal(one.integers, other.integers)


def test_probing_leaves_the_graph_as_it_was(hand: Any) -> None:
    _, graph, calls = hand
    before = {path.name: path.read_bytes() for path in graph.path.parent.iterdir()}
    dict(ProbedGraph(graph).probes(["a"], calls))
    assert {path.name: path.read_bytes() for path in graph.path.parent.iterdir()} == before


def test_a_probe_row_that_points_nowhere_proves_nothing(hand: Any) -> None:
    _, graph, _ = hand
    lost = (replace(graph.probes[0], gemm="no such tensor"), replace(graph.probes[1], gemm_scale="nor this"))
    assert ProbedGraph(replace(graph, probes=lost)).complete == frozenset()


def _probe(hand: Any) -> tuple[Any, LinearProbe]:
    layers, graph, calls = hand
    return layers[0], dict(ProbedGraph(graph).probes(["a"], calls))["a"][0]


def _check(hand: Any, **changes: Any) -> Any:
    layer, probe = _probe(hand)
    probe = replace(probe, **{key: change(np.array(getattr(probe, key))) for key, change in changes.items()})
    return check_linear(layer, probe, activation_oracle(np.nan_to_num(probe.x), layer))


def _poke(value: float) -> Any:
    def change(array: Any) -> Any:
        array[3, 0] += value
        return array

    return change


def test_every_kind_of_damage_is_measured(hand: Any) -> None:
    assert _check(hand, gemm=_poke(1)).gemm_max_abs_diff == 1
    assert _check(hand, gemm=_poke(np.nan)).gemm_max_abs_diff == math.inf
    assert _check(hand, integers=_poke(1)).codes_inadmissible == 1
    assert _check(hand, integers=_poke(np.nan)).codes_inadmissible == 1
    assert _check(hand, act_scale=_poke(1e-5)).scale_error > 1
    assert _check(hand, output=_poke(1e-3)).output_error > 1
    assert _check(hand, output=_poke(np.nan)).output_error == math.inf
    assert _check(hand, x=_poke(np.inf)).nonfinite == 1


# --- tolerances -----------------------------------------------------------------------------------------------------


def _realisations(errors: list[StepErrors], pictures: list[Any]) -> Realisations:
    return Realisations(errors, hit_errors=errors, hit_pictures=pictures)


def _errors(steps_db: list[float], samples_db: list[float]) -> StepErrors:
    return StepErrors(steps_db, 0, [SampleError("step 1", i, value, "step 1", i) for i, value in enumerate(samples_db)])


def _study(fp32: list[float], quant_noise: float = 0.1, n_steps: int = 2) -> Study:
    """A study whose outputs are ones; the float model is off by `quant_noise`, float32 samples by `fp32` dB."""
    ones = np.ones((2, 3, 4, 4))
    case = Case(("one", "two"), ({}, {}), ones.astype(np.float32), "flow_euler", 1000.0, n_steps, 1.0, "pixels")
    study = Study(case, exact=[ones] * n_steps, plain=[ones + quant_noise] * n_steps)
    study.float32 = {"fp32": _realisations([_errors(fp32[:n_steps], fp32)], [ones + 0.01])}
    study.pictures = {"reference": ones, "float": ones + quant_noise}
    return study


def _gates(study: Study, samples: list[float], picture_error: float = 0.01) -> dict[str, Gate]:
    errors = _errors(samples[:2], samples)
    gates = end_gates("cpu", errors, study.pictures["reference"] + picture_error, study, study.float32["fp32"])
    return {gate.name.removeprefix("cpu/"): gate for gate in gates}


def test_limits_are_the_float32_runs_less_the_factor() -> None:
    gates = _gates(_study([50, 60, 70, 70]), [50, 60, 70, 70])
    assert gates["step_sqnr_db"].limit == pytest.approx(50 - FACTOR_DB)
    assert gates["median_sqnr_db"].limit == pytest.approx(57.5 - FACTOR_DB)
    assert gates["final_psnr_db"].limit == pytest.approx(20 * math.log10(2 / 0.01) - FACTOR_DB)
    assert all(gate.passed for gate in gates.values())


def test_no_limit_is_looser_than_quantization() -> None:
    gates = _gates(_study([22, 22, 22, 22]), [19, 19, 19, 19], picture_error=0.2)
    assert gates["step_sqnr_db"].limit == pytest.approx(20 * math.log10(11))  # 0.1 off 1.1
    assert not gates["step_sqnr_db"].passed and not gates["final_psnr_db"].passed


def test_without_flips_no_engine_is_asked_for_more_than_its_roundings() -> None:
    gates = _gates(_study([140] * 8), [121] * 8)
    assert gates["median_sqnr_db"].limit == gates["step_sqnr_db"].limit == ROUNDED_DB
    assert gates["median_sqnr_db"].passed and gates["step_sqnr_db"].passed


def test_a_small_error_in_every_sample_fails_where_few_flips_are_normal() -> None:
    study = _study([60, 130, 130, 130, 130, 130, 130, 130])
    assert _gates(study, [60, 120, 120, 120, 120, 120, 120, 120])["median_sqnr_db"].passed
    systematic = _gates(study, [85] * 8)
    assert systematic["step_sqnr_db"].passed and not systematic["median_sqnr_db"].passed


def test_of_few_samples_more_than_half_may_flip_but_not_all() -> None:
    """Of four, two or more do by a chance of 26 % where one in four does."""
    study = _study([130, 130, 130, 64, 130, 130, 130, 64])
    assert _gates(study, [64, 64, 120, 64])["median_sqnr_db"].passed
    assert not _gates(study, [64, 64, 64, 64])["median_sqnr_db"].passed
    assert not _gates(study, [64] * 13 + [120] * 11)["median_sqnr_db"].passed, "by a chance of 0.2 %"


def test_nan_anywhere_fails() -> None:
    gates = _gates(_study([50] * 4), [50, math.nan, 50, 50], picture_error=math.nan)
    assert not any(gate.passed for gate in gates.values())


def test_runs_of_the_reference_that_overflow_give_no_limit() -> None:
    gates = _gates(_study([50, math.nan, 50, 50]), [50] * 4)
    assert gates["step_sqnr_db"].limit == pytest.approx(20 * math.log10(11)) and gates["step_sqnr_db"].passed
    assert "overflow" in gates["step_sqnr_db"].why


def test_pictures_that_are_wrong_where_steps_are_right_say_so() -> None:
    gate = _gates(_study([50, 60, 70, 70]), [50, 60, 70, 70], picture_error=0.2)["final_psnr_db"]
    assert not gate.passed and NOT_IN_STEPS in gate.why
    assert "2 of 2 samples are wrong" in gate.why and "all numbers times 1.2" in gate.why
    both = _gates(_study([22] * 4), [19] * 4, picture_error=0.2)["final_psnr_db"]
    assert not both.passed and NOT_IN_STEPS not in both.why


def test_a_wrong_step_says_which_and_for_whom() -> None:
    study, rng = _study([50] * 8, n_steps=4), np.random.default_rng(0)
    study.case = replace(study.case, noise=study.case.noise[:1], guidance_scale=2.0)
    study.exact = [rng.standard_normal((2, 3, 4, 4)) for _ in range(4)]
    times = [np.full(2, 1000.0 - 250 * step, np.float32) for step in range(4)]
    study.calls = [{"hidden_states": np.zeros((2, 3, 4, 4), np.float32), "timestep": time} for time in times]
    outputs = iter([{"sample": exact * (1 if step < 3 else 1.1)} for step, exact in enumerate(study.exact)])
    errors = study.errors(lambda _: next(outputs))
    assert [error.traits.setting for error in errors.samples[:2]] == [Setting.PROMPTED, Setting.UNPROMPTED]
    gate = end_gates("cpu", errors, study.pictures["reference"][:0], study, study.float32["fp32"])[0]
    assert not gate.passed and "2 of 8 samples are wrong: those of step 4 or timestep 250" in gate.why
    assert gate.why.endswith("all numbers times 1.1: a factor is wrong")


def test_quantization_gates_use_the_budgets() -> None:
    recipe = recipes.from_dict({"name": "r", "model": "m", "budgets": {"quant_sqnr_db": 19.0}}, "test")
    gates = {gate.name: gate for gate in quantization_gates(_study([50] * 4), recipe)}
    assert gates["quant_sqnr_db"].value == pytest.approx(20 * math.log10(11)) and gates["quant_sqnr_db"].passed
    assert gates["final_psnr_fp_db"].value == pytest.approx(20 * math.log10(2 / 0.1))
    study = _study([50] * 4, n_steps=3)
    study.plain[1] = study.plain[1] + 0.5
    steps, pictures = quantization_gates(study, recipe)
    assert not steps.passed and steps.why.endswith(f"; worst in step 2: {TOO_COARSE}")
    assert pictures.passed and TOO_COARSE not in pictures.why


def test_half_parts_rounds_operands_and_result() -> None:
    import torch

    q, k, v = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    attend = torch.nn.functional.scaled_dot_product_attention
    with half_parts(torch.nn.Module()):
        attended = attend(q, k, v)
    assert torch.equal(attended, attend(q.half().float(), k.half().float(), v.half().float()).half().float())
    assert not torch.equal(attended, attend(q, k, v))


def test_inputs_of_another_shape_cannot_be_compared() -> None:
    study, ones = _study([50] * 4), np.ones((2, 3), np.float32)
    study.probed, study.layer_inputs = (0, 3), {"a": [ones, 2 * ones]}
    assert study.input_db("a", {3: 2 * ones}) == math.inf and study.input_db("a", {0: 2 * ones}) == 0
    for layer, inputs in (("a", {0: np.ones((3, 3))}), ("a", {1: ones}), ("b", {0: ones})):
        assert math.isnan(study.input_db(layer, inputs))


def test_example_prompts_are_understood_and_repeatable() -> None:
    words = {"colour": ["red", "orange"], "shape": ["ring"], "relation": ["alone", "above"]}
    words |= {"second colour": ["none", "blue"], "second shape": ["none", "square"], "background": ["white"]}
    slots = [{"name": name, "words": choices} for name, choices in words.items()]
    table = {"embedding": "tokens.safetensors", "tensor": "t", "null_token": 0}
    vocabulary, digits = {"kind": "vocabulary", **table, "slots": slots}, {"kind": "classes", "null_class": 4}
    scenes = from_dict({"sampler": "ddim", "conditioning": vocabulary}, Path("."))
    classes = from_dict({"sampler": "ddim", "conditioning": digits | {"names": list("0123")}}, Path("."))
    drawn = example_prompts(scenes, 8, seed=0)
    assert set(drawn) <= {f"{c} ring above a blue square on white" for c in ("a red", "an orange")}
    assert drawn == example_prompts(scenes, 8, seed=0)
    assert set(example_prompts(classes, 8, 0)) <= set("0123")


# --- the whole ------------------------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize(
    ("activation", "granularity", "target"),
    [
        ("E2M3", "exact_group", "cpu"),
        ("E3M4", "group", "cpu"),  # two limbs, real scales
        ("E4M3", "per_channel", "cpu"),  # too wide for integers: float32
        ("E2M3", "exact_group", "rtx"),
        ("E2M3", "group", "rtx"),  # FP16
    ],
)
def test_verify_writes_a_passing_report(activation: str, granularity: str, target: str, tmp_path: Path) -> None:
    model = models.load(str(tiny.folder("dit", tmp_path)))
    layers = tiny.quantized(model, granularity=granularity, activation=activation)
    recipe = recipes.from_dict({"name": "tiny", "model": model.source, "sampling": {"n_steps": 2}}, "test")
    export_portable(model, layers, tmp_path / "model.onnx")
    (tmp_path / target).mkdir()
    graph = BACKENDS[target].lower(tmp_path / "model.onnx", tmp_path / target, recipe)
    report = verify(model, layers, {target: graph}, {}, recipe, tmp_path / "report")
    assert report.failures() == [] and report.passed
    assert report.notes[0] == f"{target}: numerically proven through onnxruntime; engine built, not run"
    assert any("attention in FP16" in note for note in report.notes) is (target == "rtx")
    assert {row.name for row in report.layers} == {layer.name for layer in layers}
    again = read_report((tmp_path / "report" / "parity.json").read_text())
    assert again.passed and again.gates == report.gates
    assert json.loads((tmp_path / "report" / "parity.json").read_text())["schema_version"] == 1
    assert len((tmp_path / "report" / "layers.csv").read_text().splitlines()) == 1 + len(layers)
    assert (tmp_path / "report" / "images" / f"{target}-0.png").is_file()


@pytest.mark.torch
def test_a_quick_verification_runs_less_and_says_so(tmp_path: Path) -> None:
    model = models.load(str(tiny.folder("dit", tmp_path)))
    layers = tiny.quantized(model, granularity="exact_group", activation="E2M3")
    stated = {"name": "tiny", "model": model.source, "sampling": {"n_steps": 4}}
    recipe = quick_recipe(recipes.from_dict(stated, "test"))
    assert recipe.sampling.n_steps == 2
    export_portable(model, layers, tmp_path / "model.onnx")
    (tmp_path / "cpu").mkdir()
    graph = BACKENDS["cpu"].lower(tmp_path / "model.onnx", tmp_path / "cpu", recipe)
    words = quick_note(["cpu"], ["cpu", "onnx"], 2)
    report = verify(model, layers, {"cpu": graph}, {}, recipe, tmp_path / "report", quick=words)
    assert report.passed and report.notes[0] == words and "not looked at: onnx" in words
    assert {row.name for row in report.layers} == {layer.name for layer in layers} and len(report.steps) == 2
    names = {gate.name for gate in report.gates}
    assert {"quant_sqnr_db", "cpu/gemm_exact", "cpu/segments", "cpu/calls", "cpu/step_sqnr_db"} <= names
    assert not any("psnr" in name or "repeats" in name for name in names)
    assert words in (tmp_path / "report" / "index.html").read_text()


@pytest.mark.torch
@pytest.mark.parametrize(("target", "size", "words"), [("cpu", 3e38, "NaN or Inf"), ("rtx", 3e4, "FP16 overflow")])
def test_a_model_that_overflows_in_the_targets_arithmetic(target: str, size: float, words: str, tmp_path: Path) -> None:
    """The reference's own runs overflow too: no limit comes from them, and the gates fail in words."""
    model = models.load(str(tiny.folder("dit", tmp_path, half=False)))
    values = next(ref.module for ref in model.linears() if ref.name.endswith("1.attn1.to_v"))
    values.weight.copy_(values.weight.sign() * size)
    layers = tiny.quantized(model, granularity="exact_group")
    recipe = recipes.from_dict({"name": "tiny", "model": model.source, "sampling": {"n_steps": 1}}, "test")
    export_portable(model, layers, tmp_path / "model.onnx")
    (tmp_path / target).mkdir()
    graph = BACKENDS[target].lower(tmp_path / "model.onnx", tmp_path / target, recipe)
    report = verify(model, layers, {target: graph}, {}, recipe, tmp_path / "report")
    failed = {gate.name.partition("/")[2]: gate for gate in report.failures()}
    assert words in failed["segments"].why
    if target == "cpu":  # onnxruntime's CPU may hold what it computes between FP16 operations in float32
        assert "the model's own runs overflow in this arithmetic" in failed["calls"].why


def test_recorder_shares_and_comparison_measures() -> None:
    import torch

    first, second = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    first.layer_name, second.layer_name = "a", "b"  # type: ignore[assignment]
    both = torch.nn.ModuleList([first, second])
    x = torch.ones(2, 5, 4)
    record = Recorder()
    with hooked(both, record):
        first(x), second(x)
    assert record.inputs["a"][0] is record.inputs["b"][0] and record.inputs["a"][0].shape == (10, 4)
    comparison = Comparison(record.inputs)
    with hooked(both, comparison):
        first(x), second(x * 1.1)
    assert comparison.sqnr_db["a"] == math.inf and comparison.sqnr_db["b"] == pytest.approx(20, abs=1e-4)


def test_jitter_moves_inputs_by_its_ulps_and_ends_with_its_context() -> None:
    import torch

    linear = torch.nn.Linear(4, 3)
    linear.layer_name = "a"  # type: ignore[assignment]
    x, record = torch.ones(1, 4), Recorder()
    with jittered(linear, 0, 4.0), hooked(linear, record):
        linear(x)
    moved = np.abs(record.inputs["a"][0] - 1).max()
    assert 0 < moved <= 8 * ROUNDING  # the number itself and its row's mean
    assert not linear._forward_pre_hooks
