"""Jobs in processes of this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context

from pipeline.jobs.jobs import Ended, Job, Runner, Spread, attempt, in_turn
from pipeline.signals import HEARD_WITHIN_S, ignore_interrupts, stop_workers


@dataclass
class Processes(Spread[Future[Ended]]):
    """A Runner of a pool of processes, each of which stays. One that is lost ends the pool (BrokenProcessPool)."""

    pool: ProcessPoolExecutor

    def send(self, job: Job) -> Future[Ended]:
        return self.pool.submit(attempt, job)

    def ready(self, places: Sequence[Future[Ended]]) -> Sequence[Future[Ended]]:
        while not (done := wait(places, HEARD_WITHIN_S, FIRST_COMPLETED).done):
            pass
        return [place for place in places if place in done]

    def ended(self, job: Job, place: Future[Ended], tries: int) -> Ended:
        return place.result()


@contextmanager
def in_processes(count: int) -> Iterator[Runner]:
    """A Runner in `count` processes of this machine; this one, where that is 1."""
    if count == 1:
        yield in_turn
        return
    pool = ProcessPoolExecutor(count, get_context("spawn"), ignore_interrupts)
    try:
        yield Processes(pool)
    except BaseException:
        stop_workers()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
