"""Long work: progress with an ETA, as a bar on a terminal and as a plain line every few seconds in a log; and how work
in another thread ends early."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from tqdm import tqdm

logger = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")
HEARTBEAT_S = 30.0
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
def heartbeat(label: str) -> Iterator[None]:
    """While the body runs, say every HEARTBEAT_S that it still does: for work whose length is not known."""
    done, started = threading.Event(), time.monotonic()

    def beat() -> None:
        while not done.wait(HEARTBEAT_S):
            logger.info("%s: still at work after %.0f s", label, time.monotonic() - started)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


# --- work that ends early -------------------------------------------------------------------------------------------


class StoppedError(Exception):
    """Ends a thread whose work nobody waits for any more."""


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
