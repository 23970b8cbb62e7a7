"""SIGINT (a key press) and SIGTERM (a scheduler) end a verb alike: its state is saved, one sentence says so.

The first signal is raised as an exception where the program stands, so that everything is cleaned up. A second one ends
the process at once and without a stack trace: what is on the disk is as good as after a loss of power, which every
folder survives.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn, TypeVar

HEEDED = (signal.SIGINT, signal.SIGTERM)
SIGNAL_BASE = 128  # exit code of a process that a signal ended, as shells count
HEARD_WITHIN_S = 0.5
T = TypeVar("T")


class Terminated(KeyboardInterrupt):
    """SIGTERM, where a KeyboardInterrupt is SIGINT."""


class _Handler:
    """What the process does with the signals of HEEDED."""

    def __init__(self, first: Callable[[int], object]) -> None:
        """first: what is done at the first signal, of a number."""
        self.came, self.first = False, first

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.came:
            os.write(2, b"stopped at once\n")
            stop_workers()
            os._exit(SIGNAL_BASE + number)
        self.came = True
        self.first(number)


def _end_here(number: int) -> None:
    """End the work where it stands."""
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


Handlers = dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None]


def _take_over() -> Handlers:
    """Heed the signals; returns what was done with them before: nothing where they are heeded already."""
    before: Handlers = {number: signal.getsignal(number) for number in HEEDED}
    nested = any(isinstance(old, _Handler) for old in before.values())
    if nested or threading.current_thread() is not threading.main_thread():
        return {}
    return _replaced(before, _Handler(_end_here))


def _replaced(before: Handlers, handler: _Handler) -> Handlers:
    """Heed the signals by `handler`, but for those that are ignored; returns what was done with them before."""
    taken: Handlers = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in taken:
        signal.signal(number, handler)
    return taken


@contextmanager
def first_calls(work: Callable[[], object]) -> Iterator[None]:
    """Within, the first signal calls `work` and the program goes on, to end by itself; a second ends it at once.

    For the main thread, of a server: what it has begun is finished.
    """
    taken = _replaced({number: signal.getsignal(number) for number in HEEDED}, _Handler(lambda _: work()))
    try:
        yield
    finally:
        for number, old in taken.items():
            signal.signal(number, old)


@contextmanager
def heeded() -> Iterator[None]:
    """Within, both signals end the work as the module says; before and after, they do what they did.

    Signals that are ignored (a job in the background, nohup) stay so. Only the main thread can heed any.
    """
    taken = _take_over()
    try:
        yield
    finally:
        for number, old in taken.items():
            signal.signal(number, old)


def leave(main: Callable[[], int]) -> NoReturn:
    """Run `main` and end the process with its exit code; a signal while the interpreter shuts down ends it silently."""
    _take_over()
    try:
        code: int | str | None = main()
    except SystemExit as error:  # usage errors
        code = error.code
    except KeyboardInterrupt as error:  # came before main could say so
        code = exit_code(error)
    silence()
    sys.exit(code)


def exit_code(error: KeyboardInterrupt) -> int:
    """130 for SIGINT, 143 for SIGTERM."""
    return SIGNAL_BASE + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)


def silence() -> None:
    """Signals end this process without a word from here on."""
    for number in HEEDED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def ignore_interrupts() -> None:
    """For worker processes: a key press reaches them too, and is their parent's to heed. Threads have no say in it."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def stop_workers() -> None:
    """End the worker processes of this one, which would wait for work for ever."""
    if "multiprocessing" in sys.modules:
        import multiprocessing

        for worker in multiprocessing.active_children():
            worker.kill()


def as_completed(futures: Iterable[Future[T]]) -> Iterator[Future[T]]:
    """`futures` in the order in which they end, as `concurrent.futures.as_completed`; a signal is heard meanwhile.

    Python raises a signal's exception between two steps of the main thread. One that comes just before the main thread
    waits, or that the kernel gives to another thread, does not wake it: only a wait that ends now and then hears it.
    """
    left = set(futures)
    while left:
        done, left = wait(left, HEARD_WITHIN_S, FIRST_COMPLETED)
        yield from done
