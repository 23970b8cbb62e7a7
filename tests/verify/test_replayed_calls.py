"""Calls of one program are answered from another's record, sample by sample, and what differs is counted."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.backends.base import Arrays
from pipeline.verify.replayed_calls import ROUNDING, Record, Recorded, Replayed, ulps

TABLE = np.arange(3, dtype=np.float32)


class Adder:
    """Latents plus the level of their condition; counts its calls."""

    calls = 0

    def run(self, inputs: Arrays) -> Arrays:
        self.calls += 1
        return {"sample": inputs["x"] + inputs["level"][:, None]}

    def close(self) -> None:
        self.calls = -1


def batch(*levels: int, by: float = 0.0) -> Arrays:
    x = np.array([[level, 2.0] for level in levels], np.float32) * np.float32(1 + by)
    return {"x": x, "level": np.array(levels, np.float32), "table": TABLE}


@pytest.fixture
def engine() -> Adder:
    return Adder()


@pytest.fixture
def replayed(engine: Adder) -> Replayed:
    """Of a call of two samples, and one of one."""
    record = Record("denoiser", frozenset({"table"}))
    recorded = Recorded(engine, record)
    recorded.run(batch(1, 2))
    recorded.run(batch(3))
    engine.calls = 0
    return Replayed(engine, record)


def test_samples_are_found_in_whatever_order_and_batch_they_come(engine: Adder, replayed: Replayed) -> None:
    assert np.array_equal(replayed.run(batch(3, 2, 1))["sample"], Adder().run(batch(3, 2, 1))["sample"])
    assert [row.ulps for row in replayed.record.differences] == [0, 0, 0] and engine.calls == 0


def test_a_difference_changes_no_answer_and_is_counted(engine: Adder, replayed: Replayed) -> None:
    answer = replayed.run(batch(3, by=2**-20))["sample"]
    assert np.array_equal(answer, [[6, 5]]) and engine.calls == 0
    (row,) = replayed.record.differences
    assert row.ulps == 16 and row.where == "denoiser's x"


def test_what_is_recorded_is_a_copy(replayed: Replayed) -> None:
    inputs = batch(5)
    Recorded(Adder(), replayed.record).run(inputs)
    inputs["x"][:] = 0
    assert np.array_equal(replayed.run(batch(5))["sample"], [[10, 7]]) and replayed.record.differences[-1].ulps == 0


def wider(inputs: Arrays) -> Arrays:
    return inputs | {"x": np.ones((1, 5), np.float32)}


def other_table(inputs: Arrays) -> Arrays:
    return inputs | {"table": TABLE + 1}


def more(inputs: Arrays) -> Arrays:
    return inputs | {"mask": np.ones((1, 2))}


@pytest.mark.parametrize(
    ("change", "where", "asked"),
    [
        (wider, "denoiser's x", 1),
        (other_table, "denoiser's table", 0),
        (more, "the names of denoiser's inputs", 1),
    ],
)
def test_calls_that_were_never_made_are_told(
    change: object, where: str, asked: int, engine: Adder, replayed: Replayed
) -> None:
    assert callable(change)
    replayed.run(change(batch(3)))
    (row,) = replayed.record.differences
    assert row.ulps > 1e6 and row.where == where and engine.calls == asked


def test_a_component_that_was_never_called_is_told(engine: Adder) -> None:
    replayed = Replayed(engine, Record("encoder"))
    replayed.run(batch(3))
    (row,) = replayed.record.differences
    assert row.ulps == math.inf and "encoder is called at all" in row.where and engine.calls == 1
    replayed.close()
    assert engine.calls == -1


ONE = np.float32([1.0, -4.0])
PAIRS = {
    "equal": (ONE, ONE, 0),
    "by the largest": (ONE + np.float32([2**-20, 0]), ONE, 4),
    "other types of float": (ONE.astype(np.float64) * (1 + ROUNDING), ONE, 1),
    "equal infinities": (np.float32([-np.inf, 1]), np.float32([-np.inf, 1]), 0),
    "infinities and numbers": (np.float32([-np.inf, 1]), np.float32([-np.inf, 2]), math.inf),
    "NaN": (np.float32([np.nan, 1]), ONE, math.inf),
    "zeros": (ONE, np.zeros(2, np.float32), math.inf),
    "whole numbers": (np.array([1, 2]), np.array([1, 3]), math.inf),
    "a mask that is other numbers": (np.array([1, 0]), np.float32([1, 0]), 0),
    "shapes": (ONE, ONE[:1], math.inf),
}


@pytest.mark.parametrize("name", PAIRS)
def test_units_in_the_last_place(name: str) -> None:
    value, reference, expected = PAIRS[name]
    assert ulps(value, reference) == pytest.approx(expected)
