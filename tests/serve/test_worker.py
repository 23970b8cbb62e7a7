"""The thread that draws: batches, pictures that leave, failures that stay with their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.errors import ContractError, RecipeError
from pipeline.generate.draw import DrawRequest
from pipeline.serve.jobs import Drawn, Event, Failed, Job, Preview
from pipeline.serve.service import Limits
from tests.support.serving import Server, served, until


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with served(tmp_path) as one:
        one.engine.gated = True
        yield one


class Told(Job):
    """A job with what it was told."""

    def __init__(self, *prompts: str, seed: int = 0, previews: Any = frozenset()) -> None:
        self.events: list[Event] = []
        super().__init__(DrawRequest(prompts, seed, 1, 4, 2.0), self.events.append, previews)


def put(server: Server, *jobs: Told, busy: bool = True) -> None:
    """Jobs that share a batch: they come while another one is drawn, which is then let through."""
    if busy:
        server.service.queue.put(Told("0"))
        until(lambda: server.engine.entered.acquire(blocking=False))
    for job in jobs:
        server.service.queue.put(job)
    if busy:
        server.engine.let(4)
        for _ in range(4):  # three more steps of the other, and the first of the batch
            server.engine.entered.acquire(timeout=30)


def test_jobs_that_came_meanwhile_are_one_batch(server: Server) -> None:
    jobs = [Told("3", seed=1), Told("4", "5", seed=2)]
    put(server, *jobs)
    server.engine.let(4)
    until(lambda: len(jobs[0].events) + len(jobs[1].events) == 3)
    assert server.engine.labels(-1) == [3, 4, 5] and len(server.engine.calls) == 8
    for job in jobs:
        for event, picture in zip(job.events, job.request.pictures, strict=True):
            expected = server.service.pipeline.start([picture], 4, 2.0)
            server.engine.open()
            while not expected.is_over:
                expected.step()
            assert isinstance(event, Drawn)
            np.testing.assert_array_equal(event.pixels, expected.result()[0])


def test_pictures_of_a_cancelled_job_leave_the_batch_at_its_next_step(server: Server) -> None:
    jobs = [Told("3"), Told("4", "5"), Told("6")]
    put(server, *jobs)
    jobs[1].cancel()
    server.engine.let(4)
    until(lambda: jobs[0].events and jobs[2].events)
    assert [server.engine.labels(call) for call in range(-4, 0)] == [[3, 4, 5, 6], [3, 6], [3, 6], [3, 6]]
    assert jobs[1].events == [] and server.metric("ditc_pictures_total") == 1 + 2


def test_a_batch_that_nobody_wants_ends(server: Server) -> None:
    job, after = Told("3"), Told("4")
    put(server, job)
    job.cancel()
    server.engine.let(1)
    server.service.queue.put(after)
    server.engine.let(4)
    until(lambda: after.events)
    assert [server.engine.labels(call) for call in range(-5, 0)] == [[3], [4], [4], [4], [4]] and job.events == []


@pytest.mark.parametrize(
    ("error", "by_request", "words"),
    [
        (RecipeError("it holds 1e30; smaller ones"), True, "it holds 1e30; smaller ones"),
        (ContractError("the graph fails"), False, "the graph fails"),
        (ValueError("a bug"), False, "internal error, ValueError: a bug"),
        (MemoryError(), False, "memory ran out"),
    ],
)
def test_a_batch_that_fails_fails_its_jobs_and_no_others(
    error: Exception, by_request: bool, words: str, server: Server
) -> None:
    jobs, later = [Told("3"), Told("4", "5")], Told("6")
    put(server, *jobs)
    server.engine.error = error
    server.engine.let(1)
    until(lambda: all(job.events for job in jobs))
    server.engine.error = None
    server.service.queue.put(later)
    server.engine.open()
    until(lambda: later.events)
    for job in jobs:
        [event] = job.events
        assert isinstance(event, Failed) and event.by_request == by_request and words in event.message
    assert isinstance(later.events[0], Drawn)


def test_nan_in_one_picture_fails_that_one_alone(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    run = server.engine.run

    def spoilt(inputs: Any) -> Any:
        outputs = run(inputs)
        outputs["sample"][inputs["class_labels"] == 4] = np.nan
        return outputs

    monkeypatch.setattr(server.engine, "run", spoilt)
    jobs = [Told("3"), Told("4", previews=frozenset({2})), Told("4"), Told("5")]
    put(server, *jobs)
    server.engine.let(4)
    until(lambda: all(job.events for job in jobs))
    kinds = [[type(event) for event in job.events] for job in jobs]
    assert kinds == [[Drawn], [Failed], [Failed], [Drawn]]
    assert "NaN or Inf" in jobs[1].events[0].message
    assert server.engine.labels(-1) == [3, 4, 5]  # the one with a preview left when it was seen


def test_previews_come_after_the_steps_that_were_asked_for(server: Server) -> None:
    jobs = [Told("9", previews=frozenset({1, 3})), Told("3")]
    put(server, *jobs)
    server.engine.let(4)
    until(lambda: len(jobs[0].events) == 3 and jobs[1].events)
    first, second, last = jobs[0].events
    assert isinstance(first, Preview) and (first.steps_done, first.n_steps, first.index) == (1, 4, 0)
    assert isinstance(second, Preview) and second.steps_done == 3 and isinstance(last, Drawn)
    np.testing.assert_allclose(first.pixels.astype(int), last.pixels, atol=1)  # of straight paths


def test_a_batch_has_no_more_pictures_than_the_limit(tmp_path: Path) -> None:
    with served(tmp_path, Limits(batch_size=2)) as server:
        job = Told("1", "2", "3")
        put(server, job, busy=False)
        until(lambda: len(job.events) == 3)
        assert [event.index for event in job.events] == [0, 1, 2]
        assert [len(server.engine.labels(call)) for call in range(8)] == [2] * 4 + [1] * 4
