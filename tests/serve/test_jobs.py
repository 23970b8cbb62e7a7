"""The queue: who shares a batch, who waits, who is turned away."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.generate.draw import DrawRequest
from pipeline.serve.jobs import Job, JobQueue, QueueClosedError, QueueFullError
from tests.support.serving import Asking


def job(prompt: str = "1", count: int = 1, steps: int = 4, guidance: float = 2.0) -> Job:
    return Job(DrawRequest((prompt,), 0, count, steps, guidance), lambda event: None)


def taken(queue: JobQueue) -> list[tuple[str, int]]:
    """(prompt, number in its job) of the next batch."""
    return [(row.picture.prompt, row.index) for row in queue.take()]


def queue_of(*jobs: Job, most_jobs: int = 9) -> JobQueue:
    queue = JobQueue(most_jobs, 4)
    for one in jobs:
        queue.put(one)
    return queue


def test_pictures_of_several_jobs_share_a_batch() -> None:
    queue = queue_of(job("1", 3), job("2"), job("3", 2))
    assert len(queue) == 3 and queue.pictures_waiting == 6
    assert taken(queue) == [("1", 0), ("1", 1), ("1", 2), ("2", 0)]
    assert taken(queue) == [("3", 0), ("3", 1)]
    assert len(queue) == 0


def test_a_large_job_takes_several_batches_and_counts_once() -> None:
    queue = queue_of(job("1", 6))
    assert taken(queue) == [("1", index) for index in range(4)] and len(queue) == 1
    assert taken(queue) == [("1", 4), ("1", 5)]


@pytest.mark.parametrize("other", [{"steps": 5}, {"guidance": 2.5}])
def test_jobs_with_other_settings_wait_for_a_batch_of_theirs(other: Any) -> None:
    queue = queue_of(job("1"), job("2", **other), job("3"), job("4", **other))
    assert [taken(queue), taken(queue)] == [[("1", 0), ("3", 0)], [("2", 0), ("4", 0)]]


def test_so_many_jobs_may_wait() -> None:
    queue = queue_of(job(count=4), job(count=4), most_jobs=2)
    with pytest.raises(QueueFullError):
        queue.put(job())
    queue.take()
    queue.put(job())


def test_what_nobody_wants_any_more_is_neither_drawn_nor_counted() -> None:
    jobs = [job("1", 4), job("2"), job("3")]
    queue = queue_of(*jobs, most_jobs=3)
    jobs[0].cancel()
    assert len(queue) == 2 and queue.pictures_waiting == 2
    queue.put(job("4"))
    jobs[2].cancel()
    assert taken(queue) == [("2", 0), ("4", 0)]


def test_a_batch_is_waited_for() -> None:
    queue = JobQueue(2, 4)
    waiting = Asking(lambda: taken(queue))
    waiting.join(0.05)
    assert waiting.is_alive()
    queue.put(job("7"))
    assert waiting.result() == [("7", 0)]


def test_a_closed_queue_gives_what_it_has_and_then_nothing() -> None:
    queue = queue_of(job("1"))
    queue.close()
    with pytest.raises(QueueClosedError):
        queue.put(job())
    assert taken(queue) == [("1", 0)] and taken(queue) == []
    assert queue.is_closed


def test_closing_ends_the_wait() -> None:
    queue = JobQueue(2, 4)
    waiting = Asking(lambda: taken(queue))
    queue.close()
    assert waiting.result() == []
