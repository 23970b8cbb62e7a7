"""Stretches between quantized linears: passes that stop, limits from roundings, what a fault is called."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import record
from export.errors import ContractError
from export.models import load as models
from pipeline.verify.calls import SampleError
from pipeline.verify.gates import ROUNDED_DB, calls_gates
from pipeline.verify.oracle import LinearProbe
from pipeline.verify.reference_hooks import SUMS_SEED, operations_jittered
from pipeline.verify.segments import (
    JITTER_ULPS,
    LIMIT,
    PART_LIMIT,
    PASSES,
    SHARED_LIMIT,
    SegmentCheck,
    SegmentReference,
    diagnose,
    errors_over_limits,
    judge,
    shared_over_limits,
)
from pipeline.verify.walk import Stop, Walk, stopping_module, tensors_of
from tests.support import tiny

FAMILIES = ("pixart", "pixart_sizes", "hunyuan", "dit", "unknown")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: Any, tmp_path_factory: Any) -> models.LoadedModel:
    return models.load(str(tiny.folder(request.param, tmp_path_factory.mktemp(request.param))))


def _outputs(model: models.LoadedModel, inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """(input, output) of every linear in the float64 module run as a whole, and its output."""
    from pipeline.backends.reference import reference_module

    whole = reference_module(model, {}, torch.float64)
    inside: dict[str, Any] = {}
    outside: dict[str, Any] = {}
    for ref in model.linears():
        part = whole.transformer.get_submodule(ref.name)
        part.register_forward_pre_hook(lambda _, x, name=ref.name: inside.update({name: x[0].numpy()}))
        part.register_forward_hook(lambda _, x, y, name=ref.name: outside.update({name: y.numpy()}))
    with torch.no_grad():
        return inside, outside, whole(**tensors_of(inputs, torch.float64)).numpy()


@pytest.mark.torch
def test_a_pass_told_the_module_s_own_outputs_is_the_module(model: models.LoadedModel) -> None:
    inputs = models.sample_inputs(model, 2, 0)
    inside, outside, output = _outputs(model, inputs)
    walk = Walk(stopping_module(model, torch.float64), tensors_of(inputs, torch.float64), nullcontext)
    stop, visited = walk.start(), []
    while stop.layer is not None:
        assert np.array_equal(stop.x, inside[stop.layer])
        visited.append(stop.layer)
        stop = walk.go_on(outside[stop.layer].reshape(-1, outside[stop.layer].shape[-1]))
    assert sorted(visited) == sorted(outside)
    assert np.array_equal(stop.x, output)


@pytest.mark.torch
def test_an_error_in_a_pass_reaches_its_caller_and_an_abandoned_pass_ends(model: models.LoadedModel) -> None:
    inputs = tensors_of(models.sample_inputs(model, 1, 0), torch.float32)
    module = stopping_module(model, torch.float32)
    broken = Walk(module, inputs, nullcontext)
    broken.start()
    with pytest.raises(RuntimeError, match="shape"):
        broken.go_on(np.zeros((3, 5), np.float32))
    left = Walk(module, inputs, nullcontext)
    left.start()
    left.abandon()
    assert not left._thread.is_alive()


def _float32_engine(model: models.LoadedModel, inputs: dict[str, Any]) -> tuple[list[tuple[str, LinearProbe]], Any]:
    """What an engine that computes as PyTorch in float32 would give: each linear's input and output, and the result."""
    from pipeline.backends.reference import reference_module

    whole = reference_module(model, {}, torch.float32)
    seen: dict[str, tuple[Any, Any]] = {}
    for ref in model.linears():
        part = whole.transformer.get_submodule(ref.name)
        part.register_forward_hook(lambda _, x, y, name=ref.name: seen.update({name: (x[0].numpy(), y.numpy())}))
    with torch.no_grad():
        output = whole(**tensors_of(inputs, torch.float32)).numpy()
    rows = [
        (name, LinearProbe(x=x.reshape(-1, x.shape[-1]), output=y.reshape(-1, y.shape[-1]), **NOTHING))
        for name, (x, y) in seen.items()
    ]
    return rows, output


NOTHING: dict[str, Any] = dict(
    integers=None, act_scale=None, gemm=None, gemm_unit=1.0, gemm_scale=None, exact=True, half_roundings=0,
    low_rank=None, timesteps=None,
)  # fmt: skip


def _check(model: models.LoadedModel, change: Any = None) -> list[Any]:
    """Results of a float32 engine whose tensors `change(layer, x)` may have altered."""
    reference = SegmentReference(model, models.sample_inputs(model, 2, 0)["hidden_states"].shape[2:])
    inputs = models.sample_inputs(model, 2, 0)
    rows, output = _float32_engine(model, inputs)
    known = dict(rows)
    with SegmentCheck("cpu", reference, {"a call": inputs}, "fp32") as segments:
        for name in reference.order(inputs):
            probe = known[name]
            if change is not None:
                from dataclasses import replace

                probe = replace(probe, x=change(name, probe.x))
            segments.at(name, [probe])
        segments.end([{"sample": output if change is None else change(None, output)}])
    return segments.results


@pytest.mark.torch
def test_a_float32_engine_is_well_within_its_limits(model: models.LoadedModel) -> None:
    results = _check(model)
    assert [row.layer for row in results][-1] is None
    assert len(results) == len(model.linears()) + 1
    assert max(row.error for row in results) < 0.6
    assert all(row.diagnosis is None for row in results)


@pytest.mark.torch
def test_a_stretch_off_by_a_few_millionths_is_named(model: models.LoadedModel) -> None:
    target = model.linears()[2].name
    results = {row.layer: row for row in _check(model, lambda name, x: x * 1.0001 if name == target else x)}
    assert results[target].error > 1
    assert results[target].diagnosis == "all numbers times 1.0001: a factor is wrong"
    assert all(row.error <= 1 for name, row in results.items() if name != target)


@pytest.mark.torch
def test_numbers_that_are_not_finite_have_a_stretch_too(model: models.LoadedModel) -> None:
    def overflow(name: str | None, x: Any) -> Any:
        return np.where(np.abs(x) > np.quantile(np.abs(x), 0.99), np.inf, x) if name is None else x

    assert _check(model, overflow)[-1].diagnosis == "NaN or Inf, where the module's numbers are finite"


@pytest.mark.parametrize(("size", "words"), [(1e6, "numbers up to 1e\\+06 here, FP16 holds 65504"), (1.0, "inside")])
def test_parts_in_fp16_that_overflow_are_called_that(size: float, words: str) -> None:
    """onnxruntime on a CPU computes them in float32, so that only the passes overflow."""
    exact = np.full((1, 4, 8), size)
    stops = [Stop("to_out", exact), *(Stop("to_out", np.full_like(exact, np.inf)) for _ in range(4))]
    result = judge("rtx", "step 1", stops, exact.astype(np.float32), halved=True)
    assert result.error == np.inf and re.match(f"FP16 overflow.* {words}", str(result.diagnosis))


def test_float32_runs_that_overflow_set_no_limit() -> None:
    cost, overflown = (
        SimpleNamespace(calls_quant_db=[20.0, 30.0]),
        SimpleNamespace(hit_calls_db=[np.nan] * 4),
    )
    errors = [SampleError("batch 1", 0, 22.0, "one", 0), SampleError("batch 2", 0, np.nan, "one", 1)]
    for count, passed in ((1, [True, False]), (2, [False, False])):
        gates = calls_gates("rtx", errors[:count], cost, overflown)  # type: ignore[arg-type]
        assert [gate.limit for gate in gates] == [20.0, 25.0] and [gate.passed for gate in gates] == passed
    cost.calls_quant_db = [20.0, np.nan]
    gates = calls_gates("rtx", errors[:1], cost, overflown)  # type: ignore[arg-type]
    assert gates[0].limit == ROUNDED_DB and not gates[0].passed
    assert "the model's own runs overflow" in gates[0].why


# --- arithmetic -----------------------------------------------------------------------------------------------------


def _noise(rng: np.random.Generator, shape: tuple[int, ...], size: float) -> Any:
    return rng.standard_normal(shape) * size


def test_noise_like_that_of_the_passes_stays_below_the_limits() -> None:
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((3, 64, 128))
    noise = _noise(rng, (4, 3, 64, 128), 1e-7)
    errors = errors_over_limits(exact, _noise(rng, exact.shape, 1e-7), noise)
    assert errors.shape == (3,)
    assert np.all(np.abs(errors - 1 / LIMIT) < 0.1)


def test_one_sample_one_row_and_one_column_each_show() -> None:
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((3, 64, 128))
    noise, right = _noise(rng, (4, 3, 64, 128), 1e-7), _noise(rng, exact.shape, 1e-7)
    for place in ((1,), (slice(None), 5), (slice(None), slice(None), 7)):
        wrong = right.copy()
        wrong[place] *= 1.2 * (LIMIT if len(place) == 1 else PART_LIMIT)
        assert errors_over_limits(exact, wrong, noise).max() > 1
        assert errors_over_limits(exact, wrong / 2, noise).max() < 1


def test_what_moves_numbers_only_must_be_equal() -> None:
    exact, zero = np.ones((1, 4, 4)), np.zeros((2, 1, 4, 4))
    assert errors_over_limits(exact, np.zeros((1, 4, 4)), zero).max() == 0
    assert errors_over_limits(exact, np.full((1, 4, 4), 1e-30), zero).max() == np.inf


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ((1,), "only in samples 1 of 3: what differs between samples (mask, timestep, condition, batch size)"),
        ((slice(None), slice(None), 7), "only in channels 7 of 128: a bias, a table or a row of a kept weight"),
        ((slice(None), 5), "only in tokens 5 of 64: a position table, mask or order of tokens"),
        ((), "in all samples, channels and tokens"),
    ],
)
def test_the_pattern_of_an_error_says_where_to_look(place: tuple[Any, ...], text: str) -> None:
    rng = np.random.default_rng(0)
    exact, difference = rng.standard_normal((3, 64, 128)), np.zeros((3, 64, 128))
    difference[place] = _noise(rng, difference[place].shape, 1e-2)
    assert text in diagnose(exact, difference)


def test_no_two_generators_of_the_passes_have_one_seed() -> None:
    assert PASSES <= SUMS_SEED


def test_jitter_moves_what_rounds_and_leaves_what_moves() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    with operations_jittered(0, 2.0):
        moved, product = torch.cat([x, x]), x * 3
    assert torch.equal(moved[:64], x)
    relative = ((product - x * 3) / (x * 3)).abs()
    assert 0 < relative.max() <= 3 * 2.0**-24  # two units, and the rounding of the result itself


def test_the_jitter_of_a_layer_norm_covers_sums_in_one_pass() -> None:
    """Tokens with a mean of 30 standard deviations: mean(x^2) - mean(x)^2 in float32 loses what the mean has."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((256, 512)) + 30).astype(np.float32)
    exact = (x - x.mean(1, keepdims=True, dtype=np.float64)) / x.std(1, keepdims=True, dtype=np.float64)
    mean, square = np.zeros(256, np.float32), np.zeros(256, np.float32)
    for column in x.T:
        mean, square = mean + column, square + column * column
    mean, square = mean / np.float32(512), square / np.float32(512)
    one_pass = (x - mean[:, None]) / np.sqrt(square - mean * mean)[:, None]
    with operations_jittered(0, 2.0):
        moved = torch.nn.functional.layer_norm(torch.from_numpy(x), (512,), eps=0.0).numpy()
    error, noise = (np.sqrt(np.mean((y - exact) ** 2)) for y in (one_pass, moved))
    assert error < LIMIT * noise


@pytest.mark.torch
def test_a_linear_that_is_never_called_is_refused(tmp_path: Path) -> None:
    model = models.load(str(tiny.folder("pixart", tmp_path)))
    inputs = models.sample_inputs(model, 1, 0)
    reference = SegmentReference(model, inputs["hidden_states"].shape[2:])
    reference.layers = (*reference.layers, "transformer_blocks.9.ff")
    with pytest.raises(ContractError, match=r"transformer_blocks.9.ff: the model calls it 0 times"):
        reference.order(inputs)


def test_the_measured_margins_are_those_of_these_limits() -> None:
    """benchmarks.quality.segment_margins writes them; comments beside the limits say how near right engines come."""
    document = json.loads((record.RESULTS / "segment_margins.json").read_text(encoding="utf-8"))
    assert document["limits"] == {
        "LIMIT": LIMIT, "PART_LIMIT": PART_LIMIT, "SHARED_LIMIT": SHARED_LIMIT, "JITTER_ULPS": JITTER_ULPS
    }  # fmt: skip
    assert {row["target"] for row in document["rows"]} == {"cpu-stock", "cpu-native", "rtx", "cuda", "onnx"}
    assert all(row["ratio"] < 0.54 for row in document["rows"])


# --- what all numbers share -----------------------------------------------------------------------------------------

HALF_NOISE = 3e-4  # of attention in FP16: a few roundings


def _relative(rng: np.random.Generator, exact: Any, shape: tuple[int, ...], size: float = HALF_NOISE) -> Any:
    return exact * rng.standard_normal(shape) * size


def test_noise_of_fp16_shares_nothing_whatever_it_is_made_of() -> None:
    """Each number rounds alone, or with all of its token, or with all of its channel, or with all of its sample."""
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((3, 64, 128)) + 0.5
    for own, of_passes in (
        ((3, 64, 128), (4, 3, 64, 128)),
        ((3, 64, 1), (4, 3, 64, 1)),
        ((3, 1, 128), (4, 3, 1, 128)),
        ((3, 1, 1), (4, 3, 1, 1)),
    ):
        noise = _relative(rng, exact, of_passes)
        assert shared_over_limits(exact, _relative(rng, exact, own), noise).max() < 0.6


@pytest.mark.parametrize("factor", [1.001, 0.999])
def test_a_factor_far_below_the_rounding_of_fp16_shows(factor: float) -> None:
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((3, 64, 128))
    noise, right = (_relative(rng, exact, shape) for shape in ((4, 3, 64, 128), exact.shape))
    wrong = right + (factor - 1) * exact
    assert errors_over_limits(exact, wrong, noise).max() < 1 < shared_over_limits(exact, wrong, noise)[0].min()
    assert diagnose(exact, wrong * 0.3 + 0.7 * (factor - 1) * exact, shared=True).startswith("all numbers times")


def test_an_offset_far_below_the_rounding_of_fp16_shows() -> None:
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((3, 64, 128))
    noise, wrong = _relative(rng, exact, (4, 3, 64, 128)), _relative(rng, exact, exact.shape)
    wrong[1] += 1e-3
    assert errors_over_limits(exact, wrong, noise).max() < 1
    assert (shared_over_limits(exact, wrong, noise)[1] > 1).tolist() == [False, True, False]


def test_operations_that_err_to_one_side_are_no_factor() -> None:
    """Of float32: two units in each of a few operations in a row, beside nearly no noise."""
    exact = np.random.default_rng(0).standard_normal((1, 64, 128))
    assert shared_over_limits(exact, exact * 16 * 2.0**-24, np.zeros((4, 1, 64, 128))).max() < 1
    assert shared_over_limits(exact, exact * 128 * 2.0**-24, np.zeros((4, 1, 64, 128))).max() > 1
    assert shared_over_limits(0 * exact, 0 * exact, np.zeros((4, 1, 64, 128))).max() == 0
