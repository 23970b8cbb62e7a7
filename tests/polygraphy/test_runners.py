"""Our runner in Polygraphy's Python API, over an engine that computes next to nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from pipeline.backends.base import Arrays
from pipeline.backends.feeds import Declared

pytest.importorskip("polygraphy", reason="polygraphy is not installed: pip install '.[polygraphy]'")
from polygraphy.comparator import Comparator
from polygraphy.datatype import DataType

from pipeline.polygraphy.runners import DitcRunner


@dataclass
class Doubling:
    """Gives its input times two."""

    closed: int = 0
    declared: tuple[Declared, ...] = (
        Declared("x", "float32", ("batch", 3), (1, 3), (4, 3)),
        Declared("t", "int64", (2,)),
    )
    calls: list[Arrays] = field(default_factory=list)

    def run(self, inputs: Arrays) -> Arrays:
        self.calls.append(inputs)
        return {"y": inputs["x"] * 2}

    def close(self) -> None:
        self.closed += 1


CALL = {"x": np.ones((2, 3), np.float32), "t": np.zeros(2, np.int64)}


def test_it_says_what_the_engine_takes() -> None:
    with DitcRunner(Doubling()) as runner:
        metadata = runner.get_input_metadata(use_numpy_dtypes=False)
    assert list(metadata) == ["x", "t"]
    assert metadata["x"].dtype == DataType.FLOAT32 and metadata["t"].dtype == DataType.INT64
    assert tuple(metadata["x"].shape) == (None, 3) and tuple(metadata["t"].shape) == (2,)
    assert tuple(metadata["x"].shape.min) == (1, 3) and tuple(metadata["x"].shape.max) == (4, 3)


def test_it_runs_and_takes_the_time() -> None:
    engine = Doubling()
    with DitcRunner(engine) as runner:
        outputs = runner.infer(CALL)
        assert runner.last_inference_time() >= 0
    assert np.array_equal(outputs["y"], CALL["x"] * 2) and list(outputs) == ["y"]


@pytest.mark.torch
def test_torch_tensors_become_arrays() -> None:
    torch = pytest.importorskip("torch")
    engine = Doubling()
    with DitcRunner(engine) as runner:
        runner.infer({name: torch.from_numpy(array) for name, array in CALL.items()})
    assert all(isinstance(array, np.ndarray) for array in engine.calls[0].values())


def test_it_closes_what_it_loaded_and_nothing_else() -> None:
    given, loaded = Doubling(), list[Doubling]()

    def load() -> Doubling:
        loaded.append(Doubling())
        return loaded[-1]

    for source in (given, load, load):
        with DitcRunner(source):
            pass
    assert given.closed == 0 and [engine.closed for engine in loaded] == [1, 1]


def test_it_may_be_activated_again() -> None:
    runner = DitcRunner(Doubling)
    for _ in range(2):
        results = Comparator.run([runner], data_loader=[CALL, CALL])
        assert len(results[runner.name]) == 2 and not runner.is_active
