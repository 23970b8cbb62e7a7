"""Several independent pieces of work at once, a thread each: small models leave most of every processor's time unused
when their operations share all cores."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from pipeline.progress import ending_with
from pipeline.signals import HEARD_WITHIN_S, as_completed

T = TypeVar("T")


def side_by_side(work: Sequence[Callable[[], T]], threads: int) -> list[T]:
    """The results of all functions, in their order; with one thread one after the other, here.

    PyTorch's operations get one thread each meanwhile. An error of one function is raised, as is a signal's exception
    that comes meanwhile; the other functions end at their next `raise_if_stopped`.
    """
    if min(threads, len(work)) < 2:
        return [function() for function in work]
    stop, at_work = threading.Event(), _AtWork()
    with single_threaded_torch(), ThreadPoolExecutor(threads) as pool:
        try:  # from here on: a signal may come before all have begun
            futures: list[Future[T]] = [pool.submit(ending_with(at_work.during(function), stop)) for function in work]
            for future in as_completed(futures):
                future.result()  # the first error ends all
            return [future.result() for future in futures]
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            at_work.wait()


class _AtWork:
    """Functions that have begun and not ended. A pool does not know the thread in whose start a signal came."""

    def __init__(self) -> None:
        self._changed, self._count = threading.Condition(), 0

    def during(self, function: Callable[[], T]) -> Callable[[], T]:
        """`function`, counted while it runs."""

        def run() -> T:
            self._add(1)
            try:
                return function()
            finally:
                self._add(-1)

        return run

    def _add(self, change: int) -> None:
        with self._changed:
            self._count += change
            self._changed.notify_all()

    def wait(self) -> None:
        """Until none is at work; a second signal is heard meanwhile."""
        with self._changed:
            while self._count:
                self._changed.wait(HEARD_WITHIN_S)


@contextmanager
def single_threaded_torch() -> Iterator[None]:
    """Within, PyTorch's operations take one thread each, and their sums one order. Not for overlapping use by threads:
    the number of threads is the process's."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
