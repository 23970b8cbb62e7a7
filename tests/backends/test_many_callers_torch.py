"""Engines whose calls take turns: the `cuda` engine (its module, on the CPU) and the PyTorch reference."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from export.errors import RecipeError
from pipeline.backends.cuda import CudaBackend
from pipeline.recipe import Recipe
from tests.backends.cpu.test_many_callers import BODY, INPUTS, Call, call
from tests.support.hooked_sessions import Worker, once
from tests.support.portable import portable, random_linear

torch = pytest.importorskip("torch", reason="torch is not installed")
WAITED_S = 0.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("callers")
    layers = [random_linear("a"), random_linear("b", seed=1)]
    ir.save(portable(BODY, layers, INPUTS), root / "model.onnx", external_data="model.onnx.data")
    for name in ("work", "cuda"):
        (root / name).mkdir()
    recipe = Recipe("test", "none")
    lowered = CudaBackend().lower(root / "model.onnx", root / "work", recipe)
    result = CudaBackend().build(lowered, root / "cuda", recipe)
    assert "cuda/condition.onnx" in result.files
    return root / "cuda"


@pytest.fixture
def engine(folder: Path) -> Any:
    from pipeline.backends.cuda.engine import CudaEngine

    return CudaEngine(folder, device="cpu")


class HookedPart:
    """A part of the engine that calls back before it runs."""

    def __init__(self, part: Any, before: Callable[[], object]) -> None:
        self.part, self.before, self.inputs = part, before, part.inputs

    def run(self, *args: Any) -> Any:
        self.before()
        return self.part.run(*args)


def hook(engine: Any, place: str, work: Callable[[], object]) -> None:
    setattr(engine, place, HookedPart(getattr(engine, place), once(work)))


def tensors(arrays: Call) -> dict[str, Any]:
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


@pytest.mark.parametrize("place", ["condition", "step"])
def test_another_call_waits_and_both_are_right(place: str, engine: Any) -> None:
    calls, waiting = [call(0), call(1)], []
    expected = [engine.run(one)["y"] for one in calls]

    def another() -> None:
        waiting.append(Worker(partial(engine.run, calls[1])))
        waiting[0].join(WAITED_S)
        assert waiting[0].is_alive(), "it did not wait"

    hook(engine, place, another)
    assert np.array_equal(engine.run(calls[0])["y"], expected[0])
    assert np.array_equal(waiting[0].result()["y"], expected[1])


@pytest.mark.parametrize("name", ["text", "mask"])
@pytest.mark.parametrize("place", ["condition", "step"])
@pytest.mark.parametrize("kind", ["arrays", "tensors"])
def test_a_condition_overwritten_during_a_call_makes_no_mixture(name: str, place: str, kind: str, engine: Any) -> None:
    before, after = call(0), call(1)
    run = engine.run if kind == "arrays" else engine.run_tensors
    make = tensors if kind == "tensors" else lambda one: {key: array.copy() for key, array in one.items()}
    new = before | {name: after[name]}
    expected = [np.asarray(run(make(one))["y"]) for one in (new, before)]
    engine.run(call(2))  # another condition is kept
    mine = make(before)
    hook(engine, place, lambda: mine[name].__setitem__(slice(None), make(after)[name]))
    assert np.array_equal(run(mine)["y"], expected[1])
    assert np.array_equal(run(mine)["y"], expected[0])
    assert np.array_equal(run(make(before))["y"], expected[1])


def test_a_tensor_overwritten_while_it_is_compared_is_looked_at_again(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = call(0), call(1)
    new = before | {"text": after["text"]}
    expected = [engine.run(one)["y"] for one in (new, before)]
    mine, equal = tensors(before), torch.equal
    overwrite = once(lambda: mine["text"].copy_(torch.from_numpy(after["text"])))
    monkeypatch.setattr(torch, "equal", lambda a, b: (equal(a, b), overwrite())[0])
    assert np.array_equal(engine.run_tensors(mine)["y"], expected[1])
    assert np.array_equal(engine.run_tensors(mine)["y"], expected[0])


def test_a_condition_that_failed_is_not_taken_for_computed(engine: Any) -> None:
    expected = engine.run(call(0))["y"]
    engine.run(call(1))

    def fail() -> None:
        raise RuntimeError("no memory")

    hook(engine, "condition", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        engine.run(call(0))
    assert np.array_equal(engine.run(call(0))["y"], expected)


def test_closing_waits_for_the_call_that_runs(engine: Any) -> None:
    expected, waiting = engine.run(call(0))["y"], []

    def close() -> None:
        waiting.append(Worker(engine.close))
        waiting[0].join(WAITED_S)
        assert waiting[0].is_alive(), "it did not wait"

    hook(engine, "step", close)
    assert np.array_equal(engine.run(call(0))["y"], expected)
    waiting[0].result()
    for run, one in ((engine.run, call(0)), (engine.run_tensors, tensors(call(0)))):
        with pytest.raises(RecipeError, match="the engine is closed; load it again"):
            run(one)


def test_it_says_what_does_not_fit(engine: Any) -> None:
    for change, words in (
        ({"text": call(0)["text"].astype(np.float64)}, "text is of float64, the engine takes float32"),
        ({"text": call(0, batch=2)["text"]}, "B is 1 in input .*, but 2 in input|B is 2 in input .*, but 1 in input"),
        ({"hidden_states": call(0)["hidden_states"] * np.float32(1e30)}, "magnitude up to"),
    ):
        with pytest.raises(RecipeError, match=words):
            engine.run(call(0) | change)
    with pytest.raises(RecipeError, match="magnitude up to"):
        engine.run_tensors(tensors(call(0)) | {"text": torch.full((1, 5, 64), 1e30)})


def test_calls_of_the_reference_take_turns() -> None:
    """A module that is told the timesteps first, and computes with them then, as low-rank branches do."""
    from pipeline.backends.reference import ReferenceEngine

    inside, most = [0], [0]
    lock, gate = threading.Lock(), threading.Event()

    class Told(torch.nn.Module):
        def forward(self, timestep: Any) -> Any:
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            gate.wait(WAITED_S)
            with lock:
                inside[0] -= 1
            return timestep * 2

    engine = ReferenceEngine(Told())
    workers = [Worker(partial(engine.run, {"timestep": np.full(2, i, np.float32)})) for i in range(3)]
    for i, worker in enumerate(workers):
        assert np.array_equal(worker.result()["sample"], np.full(2, 2 * i, np.float32))
    assert most == [1]


@pytest.mark.torch
def test_the_reference_says_what_does_not_fit(tmp_path: Path) -> None:
    from export.models import load as models
    from pipeline.backends.reference import ReferenceEngine
    from tests.support import tiny

    model = models.load(str(tiny.folder("dit", tmp_path)))
    engine, inputs = ReferenceEngine(models.denoiser(model)), models.sample_inputs(model, 2, 0)
    assert {row.name for row in engine.declared} == set(inputs)
    engine.run(inputs)
    with pytest.raises(RecipeError, match="batch is 2 in input hidden_states, but 3 in input timestep"):
        engine.run(inputs | {"timestep": np.ones(3, np.float32)})
    huge = engine.run(inputs | {"hidden_states": inputs["hidden_states"] * np.float32(1e30)})
    assert not np.isfinite(huge["sample"]).all()  # PyTorch's own answer
