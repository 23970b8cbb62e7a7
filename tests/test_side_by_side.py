"""Independent work in threads: results in order, errors raised, unfinished work stopped."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch

from pipeline.progress import track
from pipeline.side_by_side import raise_if_stopped, side_by_side


def slow(value: int) -> int:
    time.sleep(0.05 * (3 - value))
    return value


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_results_come_in_the_order_of_the_work(threads: int) -> None:
    assert side_by_side([partial(slow, value) for value in range(3)], threads) == [0, 1, 2]


def test_an_error_is_raised_and_ends_the_others() -> None:
    steps: list[int] = []

    def long() -> None:
        for step in track(range(500), 500, "steps"):
            steps.append(step)
            time.sleep(0.01)

    def wrong() -> None:
        time.sleep(0.05)
        raise ValueError("no such layer")

    with pytest.raises(ValueError, match="no such layer"):
        side_by_side([long, wrong], 2)
    assert 0 < len(steps) < 500


def test_pytorch_has_its_threads_again_afterwards() -> None:
    before = torch.get_num_threads()
    assert side_by_side([torch.get_num_threads] * 2, 2) == [1, 1]
    assert torch.get_num_threads() == before


def test_nothing_stops_outside() -> None:
    raise_if_stopped()
    assert list(track(range(3), 3, "steps")) == [0, 1, 2]
