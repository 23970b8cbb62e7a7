"""Long work: progress with an ETA, as a bar on a terminal and as a plain line every few seconds in a log; and several
independent pieces at once, a thread each, since small models leave most of every processor's time unused when their
operations share all cores."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from tqdm import tqdm

logger = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")
_thread = threading.local()


def eta_text(done: int, total: int, elapsed_s: float) -> str:
    """Remaining time as text, from the mean pace so far.

    >>> eta_text(2, 6, 10.0)
    '20 s'
    """
    left_s = elapsed_s / max(done, 1) * (total - done)
    return f"{left_s:.0f} s" if left_s < 120 else f"{left_s / 60:.0f} min"


def track(items: Iterable[T], total: int, label: str, first: int = 0, every_s: float = 10.0) -> Iterator[T]:
    """Yield `items`, reporting progress on stderr; `first` counts items done by an earlier run."""
    if sys.stderr.isatty():
        for item in tqdm(items, desc=label, total=total, initial=first, file=sys.stderr, leave=False):
            raise_if_stopped()
            yield item
        return
    started = reported = time.monotonic()
    for count, item in enumerate(items, 1):
        raise_if_stopped()
        yield item
        now = time.monotonic()
        if count == 1 or now - reported >= every_s or first + count == total:
            reported = now
            eta = eta_text(count, total - first, now - started)
            logger.info("%s: %d of %d, %.0f s gone, ETA %s", label, first + count, total, now - started, eta)


@contextmanager
def heartbeat(label: str, every_s: float = 30.0) -> Iterator[None]:
    """While the body runs, say every `every_s` seconds that it still does: for work whose length is not known."""
    done, started = threading.Event(), time.monotonic()

    def beat() -> None:
        while not done.wait(every_s):
            logger.info("%s: still at work after %.0f s", label, time.monotonic() - started)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


# --- side by side ---------------------------------------------------------------------------------------------------


class StoppedError(Exception):
    """Ends a thread whose work nobody waits for any more."""


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
            wait(futures, return_when=FIRST_EXCEPTION)
            failed = [future for future in futures if future.done() and future.exception() is not None]
            return [failed[0].result()] if failed else [future.result() for future in futures]
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
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
        """Until none is at work."""
        with self._changed:
            self._changed.wait_for(lambda: not self._count)


def ending_with(function: Callable[P, T], *stops: threading.Event) -> Callable[P, T]:
    """`function` for another thread: what ends the work of this thread ends it, too, and so does each of `stops`."""
    ends = (*_stops(), *stops)

    def run(*args: P.args, **named: P.kwargs) -> T:
        _thread.stops = ends
        try:
            return function(*args, **named)
        finally:
            del _thread.stops

    return run


def raise_if_stopped() -> None:
    """To be called now and then by long work: raises StoppedError in a thread whose result is no longer wanted."""
    if any(stop.is_set() for stop in _stops()):
        raise StoppedError


def _stops() -> tuple[threading.Event, ...]:
    stops: tuple[threading.Event, ...] = getattr(_thread, "stops", ())
    return stops


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
