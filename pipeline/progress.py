"""Progress with an ETA: a bar on a terminal, one plain line every few seconds in a log."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

from pipeline.side_by_side import raise_if_stopped

logger = logging.getLogger(__name__)
T = TypeVar("T")


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
    started = told = time.monotonic()
    for count, item in enumerate(items, 1):
        raise_if_stopped()
        yield item
        now = time.monotonic()
        if count == 1 or now - told >= every_s or first + count == total:
            told = now
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
