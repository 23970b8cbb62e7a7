"""Calls that drawing does not make: what they hold, and engines whose state or callers get mixed up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from export.models import load as models
from pipeline import recipe as recipes
from pipeline.backends.base import Arrays
from pipeline.backends.reference import ReferenceEngine
from pipeline.generate.case import Case, make_case
from pipeline.verify.call_patterns import Setting
from pipeline.verify.calls import (
    BATCHES,
    LONGEST,
    ODD,
    ONE,
    POOLS,
    STEADY_CALL,
    THREAD_ROUNDS,
    SampleError,
    StateResult,
    _at_once,
    _unequal,
    call_errors,
    make_calls,
    make_pools,
    nan_reach,
    state_result,
)
from pipeline.verify.effort import FEW_INSIDE, INSIDE, LARGE_INSIDE
from pipeline.verify.gates import FACTOR_DB, calls_gates
from pipeline.verify.report import Gate
from tests.support import tiny

pytestmark = pytest.mark.torch

RECIPE = recipes.with_settings(recipes.load("pixart_w4a6"), ["sampling.n_steps=3"])


@pytest.fixture(scope="module", params=["pixart", "hunyuan", "dit"])
def subject(request: Any, tmp_path_factory: Any) -> tuple[models.LoadedModel, Case]:
    model = models.load(str(tiny.folder(request.param, tmp_path_factory.mktemp(request.param))))
    return model, make_case(model, RECIPE)


@pytest.fixture(scope="module")
def zoo() -> tuple[models.LoadedModel, Case]:
    model = models.load("zoo:dit_mini")
    return model, make_case(model, RECIPE)


def test_pools_hold_what_the_calls_are_for(subject: tuple[models.LoadedModel, Case]) -> None:
    model, case = subject
    pools = make_pools(model, case)
    times = np.concatenate([pool["timestep"] for pool in pools.values()])
    assert {0, 3, 666.625, 975, 999} <= set(times) and times.max() == 999  # ddim's last training step
    between = times != np.round(times)
    assert (times[between] != times[between].astype(np.float16)).any()
    assert np.abs(pools[ODD]["hidden_states"]).max() > 2 * np.abs(pools[LONGEST]["hidden_states"]).max() / 1.5
    for row in model.inputs:
        if "tokens" in row.shape:
            lengths = [pools[name][row.name].shape[1] for name in (ONE, ODD, LONGEST)]
            assert lengths == [1, 7, model.family.tokens]
        if row.fill == "mask":
            counts = pools[LONGEST][row.name].sum(axis=1)
            assert counts[0] == pools[LONGEST][row.name].shape[1] and counts[1] == 0
            assert 0 < counts[3] < counts[2] < counts[0]
        if row.fill == "image_size":
            rows = pools[LONGEST][row.name]
            assert len(np.unique(rows[0])) == rows.shape[1] and (rows[0] != rows[1]).all()
        if row.fill.startswith("class:"):
            drawn = {int(label) for pool in pools.values() for label in pool[row.name]}
            assert drawn == set(range(11))  # ten classes, and the one for "no class"


def test_calls_have_every_batch_size_and_take_rows_in_turn(subject: tuple[models.LoadedModel, Case]) -> None:
    model, case = subject
    pools = make_pools(model, case)
    calls = make_calls(model, pools)
    assert [len(call.rows) for call in calls] == [size for size, _ in BATCHES] == [1, 2, 3, 9]
    for call in calls:
        for row in model.inputs:
            expected = pools[call.pool][row.name]
            assert np.array_equal(call.inputs[row.name], expected[list(call.rows)] if row.batched else expected)


# --- engines with a fault -------------------------------------------------------------------------------------------


class Counted:
    """An engine that computes right, and counts its calls."""

    def __init__(self, model: models.LoadedModel) -> None:
        self.engine, self.calls = ReferenceEngine(models.denoiser(model)), 0

    def run(self, inputs: Arrays) -> Arrays:
        self.calls += 1
        return self.engine.run(inputs)


class StaleCondition(Counted):
    """Looks at the first label alone to see whether the condition has changed."""

    kept: Any = None

    def run(self, inputs: Arrays) -> Arrays:
        labels = inputs["class_labels"]
        if self.kept is None or len(self.kept) != len(labels) or self.kept[0] != labels[0]:
            self.kept = labels.copy()
        return super().run(inputs | {"class_labels": self.kept})


class Aliased(Counted):
    """Keeps the caller's array for comparison, not a copy."""

    kept: Any = None
    result: Any = None

    def run(self, inputs: Arrays) -> Arrays:
        labels = inputs["class_labels"]
        if self.kept is None or not np.array_equal(self.kept, labels):
            self.kept, self.used = labels, labels.copy()
        return super().run(inputs | {"class_labels": self.used})


class OneBuffer(Counted):
    """Gives every caller the same array."""

    buffers: dict[tuple[int, ...], Any]

    def run(self, inputs: Arrays) -> Arrays:
        output = super().run(inputs)["sample"]
        self.buffers = getattr(self, "buffers", {})
        buffer = self.buffers.setdefault(output.shape, output)
        buffer[...] = output
        return {"sample": buffer}


class Forgetful(Counted):
    """Wrong from its 41st call on."""

    def run(self, inputs: Arrays) -> Arrays:
        output = super().run(inputs)["sample"]
        return {"sample": output[..., ::-1] if self.calls > 40 else output}


class SharedSlot(Counted):
    """Puts the condition into one place for all callers, and waits for another caller before it reads it."""

    slot: Any = None
    together = threading.Barrier(2)

    def run(self, inputs: Arrays) -> Arrays:
        self.slot = inputs["class_labels"]
        if threading.current_thread() is not threading.main_thread():
            self.together.wait(timeout=60)
        return super().run(inputs | {"class_labels": self.slot})


FAULTY: list[tuple[Callable[[models.LoadedModel], Counted], str]] = [
    (StaleCondition, "condition changed"),
    (Aliased, "changed in place"),
    (OneBuffer, "condition changed"),
    (Forgetful, f"call {STEADY_CALL}"),
    (SharedSlot, "2 threads"),
]


def _errors(engine: Counted, subject: tuple[models.LoadedModel, Case]) -> tuple[dict[str, float], StateResult]:
    """The worst SQNR in dB by call, and what depends on the calls before."""
    model, case = subject
    pools = make_pools(model, case)
    calls, right = make_calls(model, pools), Counted(model)
    exact = {name: right.run(pool)["sample"] for name, pool in pools.items()}
    errors = call_errors(calls, exact, engine.run)
    reach = nan_reach(right.run, pools, model.shared)
    assert reach.all()  # attention hands it on
    state = state_result(calls, pools, model, exact, engine.run, len(calls), reach)
    worst: dict[str, float] = {}
    for error in [*errors, *state.errors]:
        worst[error.call] = min(error.sqnr_db, worst.get(error.call, np.inf))
    return worst, state


def test_a_right_engine_is_right_in_every_call(zoo: tuple[models.LoadedModel, Case]) -> None:
    engine = Counted(zoo[0])
    worst, state = _errors(engine, zoo)
    assert min(worst.values()) > 100 and state.unequal == 0 and state.first is None
    assert engine.calls == len(BATCHES) + STEADY_CALL - len(BATCHES) + 2 * 4  # the threads' calls come after
    assert any(f"call {STEADY_CALL}" in call for call in worst)


@pytest.mark.parametrize(("engine", "where"), FAULTY, ids=[engine.__name__ for engine, _ in FAULTY])  # type: ignore[attr-defined]
def test_a_mixed_up_engine_is_seen(engine: Any, where: str, zoo: tuple[models.LoadedModel, Case]) -> None:
    worst, state = _errors(engine(zoo[0]), zoo)
    assert min(value for call, value in worst.items() if where in call) < 30
    if engine is not OneBuffer:  # whose results are one array, equal to itself
        assert state.unequal > 0 and state.first is not None


# --- gates ----------------------------------------------------------------------------------------------------------


def _gates(errors: list[SampleError], calls_quant_db: list[float], hit_calls_db: list[float]) -> dict[str, Gate]:
    study, single = SimpleNamespace(calls_quant_db=calls_quant_db), SimpleNamespace(hit_calls_db=hit_calls_db)
    return {gate.name: gate for gate in calls_gates("cpu", errors, study, single)}  # type: ignore[arg-type]


def test_for_the_median_a_sample_counts_once_by_its_worst() -> None:
    """Two of five samples come out at 20 dB, each once in many calls. Counted call by call the median would be 50."""
    right = [SampleError(f"call {i}", 0, 50.0, LONGEST, row) for row in (0, 1) for i in range(20)]
    wrong = [SampleError("call 9", 0, 20.0, LONGEST, row) for row in (0, 1)]
    others = [SampleError("batch 3", 0, value, ODD, row) for row, value in enumerate((30.0, 40.0, 60.0))]
    errors = [*right, *wrong, *others]
    assert np.median([error.sqnr_db for error in errors]) == 50
    gate = _gates(errors, [10.0] * 5, [45.0] * 5)["cpu/calls_median"]
    assert gate.value == 30.0 and gate.limit == pytest.approx(45 - FACTOR_DB) and not gate.passed
    assert "3 of 45 samples are wrong" in gate.why  # those below the limit, call by call


def test_equal_rows_of_two_pools_are_two_samples() -> None:
    errors = [SampleError("a call", 0, value, pool, 0) for pool, value in ((ONE, 20.0), (ODD, 40.0), (LONGEST, 60.0))]
    gates = _gates(errors, [10.0] * 3, [50.0] * 3)
    assert gates["cpu/calls_median"].value == 40.0 and gates["cpu/calls"].value == 20.0


def test_one_sample_without_a_number_fails_both_gates() -> None:
    errors = [SampleError("batch 2", i, value, LONGEST, i) for i, value in enumerate((50.0, 50.0, np.nan))]
    for gate in _gates(errors, [10.0] * 3, [50.0] * 3).values():
        assert np.isnan(gate.value) and not gate.passed and "1 of 3 samples are wrong" in gate.why


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_call_that_fails_in_a_thread_leaves_no_other_waiting(failing: int, zoo: Any) -> None:
    """The other callers stand at a barrier then; what was raised comes out."""
    model, case = zoo
    calls = make_calls(model, make_pools(model, case))[:2]
    count, lock = 0, threading.Lock()

    def run(inputs: Arrays) -> Arrays:
        nonlocal count
        with lock:
            count += 1
            if count == failing:
                raise ValueError("the engine broke")
        return {"sample": inputs["hidden_states"]}

    with pytest.raises(ValueError, match="the engine broke"):
        _at_once(calls, run, THREAD_ROUNDS)


@pytest.mark.parametrize("calls_before", [0, 60])
def test_the_steady_call_is_named_by_its_number(calls_before: int, zoo: Any) -> None:
    """An engine of many steps has made more calls already."""
    model, case = zoo
    pools = make_pools(model, case)
    calls = make_calls(model, pools)
    exact = {name: pool["hidden_states"] for name, pool in pools.items()}

    def where(spoilt: int) -> tuple[str | None, int]:
        """What is found of an engine whose call number `spoilt` is wrong, and how many calls it has made."""
        count = calls_before

        def run(inputs: Arrays) -> Arrays:
            nonlocal count
            count += 1
            latents = inputs["hidden_states"]
            return {"sample": latents * np.float32(1 + (count == spoilt))}

        first = state_result(calls, pools, model, exact, run, calls_before, _only_the_first(exact)).first
        return first and first.text, count

    nothing, total = where(-1)
    steady = total - 2 * THREAD_ROUNDS  # two threads come last
    assert nothing is None and steady == max(STEADY_CALL, steady)
    assert where(steady) == (f"call {steady}", total)


def _only_the_first(exact: dict[str, Any]) -> Any:
    """What NaN in a sample's first number makes NaN in a model whose numbers do not see each other."""
    reach = np.zeros(exact[LONGEST].shape[1:], bool)
    reach[0, 0, 0] = True
    return reach


# Of latents in which one number is NaN, of a model whose numbers do not see each other.
SPREADS: list[tuple[Callable[[Any], Any], int | None]] = [
    (lambda latents: latents, 0),
    (np.nan_to_num, 1),  # becomes a number
    (lambda latents: np.nan_to_num(latents, nan=np.inf), 1),
    (lambda latents: latents + 0 * latents.mean(axis=(1, 2, 3), keepdims=True), -1),  # reaches the rest of its sample
    (lambda latents: np.where(np.isnan(latents).any(axis=(1, 2, 3), keepdims=True), -latents, latents), -1),
    (lambda latents: latents + 0 * latents.mean(), -2),  # and the sample beside it
]


@pytest.mark.parametrize(("run", "wrong"), SPREADS)
def test_nan_has_its_reach_and_changes_no_other_number(run: Callable[[Any], Any], wrong: int, zoo: Any) -> None:
    """wrong: how many numbers; below zero: of so many samples all but the one that is NaN in the reference, too."""
    model, case = zoo
    pools = make_pools(model, case)
    exact = {name: pool["hidden_states"] for name, pool in pools.items()}
    expected = wrong if wrong >= 0 else -wrong * exact[LONGEST][0].size - 1
    call = make_calls(model, pools), pools, model, exact
    state = state_result(*call, lambda inputs: {"sample": run(inputs["hidden_states"])}, 60, _only_the_first(exact))
    assert state.unequal == expected
    assert (state.first and state.first.setting) == (Setting.NAN_FIRST if wrong else None)


def test_what_a_model_makes_of_nan_is_its_reach(zoo: Any) -> None:
    model, case = zoo
    pools = make_pools(model, case)
    reach = nan_reach(lambda inputs: {"sample": inputs["hidden_states"] * 2}, pools, model.shared)
    assert np.array_equal(reach, _only_the_first({LONGEST: pools[LONGEST]["hidden_states"]}))


def test_equal_numbers_are_equal_in_every_bit() -> None:
    one = np.array([0.0, 1.0, np.nan, -np.inf], np.float32)
    assert _unequal(one, one.copy()) == 0 and _unequal(one, np.abs(one)) == 1
    assert _unequal(one, -one) == 3  # also of zero; NaN has no sign
    assert _unequal(one, one.astype(np.float64)) == _unequal(one, one[None]) == 4


def test_samples_of_every_pool_are_looked_into() -> None:
    pool_of = dict(BATCHES)
    for inside in (INSIDE, FEW_INSIDE):
        assert {pool_of[size] for size in inside} == {spec.name for spec in POOLS}
    assert ODD in {pool_of[size] for size in LARGE_INSIDE}
    for size in set(FEW_INSIDE) - set(INSIDE):  # its samples are among those of a larger call
        assert any(pool_of[size] == pool_of[other] and other > size for other in INSIDE)
