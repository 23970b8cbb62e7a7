"""What each process of a runner makes once, and a pool of processes as a runner."""

from __future__ import annotations

import os
import pickle
from functools import partial

import pytest

from export.errors import ModelError
from pipeline.jobs.jobs import Job, error_of
from pipeline.jobs.once import Once
from pipeline.jobs.processes import in_processes

MADE: list[int] = []


def make(number: int) -> list[int]:
    MADE.append(number)
    return [number, os.getpid()]


def test_a_process_makes_it_once_however_often_it_is_sent() -> None:
    MADE.clear()
    one, other = Once(partial(make, 1)), Once(partial(make, 1))
    assert one() is one() and MADE == [1]
    there = pickle.loads(pickle.dumps(one))
    assert there() is pickle.loads(pickle.dumps(one))() is pickle.loads(pickle.dumps(there))()
    assert there() is not one() and MADE == [1, 1], "what was sent is the other process's own"
    assert pickle.loads(pickle.dumps(other))() is not there(), "one that is made alike is another"
    assert pickle.loads(pickle.dumps(one)) is not there, "and takes the place of the one before"


def take(once: Once[list[int]], number: int) -> list[int]:
    if number == 2:
        raise ModelError("no second one")
    return once()


@pytest.mark.process
def test_processes_of_this_machine_do_jobs_in_order_and_keep_what_they_made() -> None:
    once = Once(partial(make, 7))
    jobs = [Job(str(number), partial(take, once, number)) for number in range(8)]
    jobs += [Job("behind", partial(take, once, 9), after="2"), Job("last", partial(take, once, 10), after="7")]
    with in_processes(2) as runner:
        ended = {one.name: one for one in runner(jobs)}
        again = list(runner([Job("again", partial(take, once, 0))]))
    failed = [one for one in ended.values() if not one.passed]
    assert [(one.name, one.reason) for one in failed] == [("2", "no second one"), ("behind", "2: no second one")]
    places = {tuple(one.result) for one in [*ended.values(), *again] if one.passed}
    assert len(ended) == 10 and 1 <= len(places) <= 2 and (7, os.getpid()) not in places


def test_one_process_is_this_one_and_failures_are_raised_by_name() -> None:
    once = Once(partial(make, 7))
    with in_processes(1) as runner:
        ended = list(runner([Job(f"job {number}", partial(take, once, number)) for number in (1, 2)]))
    assert ended[0].result == [7, os.getpid()]
    error = error_of([one for one in ended if not one.passed])
    assert str(error) == "job 2 failed: no second one" and getattr(error, "exit_code", None) == ModelError.exit_code
