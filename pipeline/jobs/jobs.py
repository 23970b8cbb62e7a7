"""Jobs that are independent but for an order: one that fails ends itself and those that wait for it, no other.

A job is done by this process, one after the other (`in_turn`), by some of this machine (processes.py), or by a Ray
cluster (ray_jobs.py).
"""

from __future__ import annotations

import logging
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from export.documents import listed
from export.errors import EnvironmentLacksError, ParityError, ResourceError, UserError
from pipeline.command import INTERNAL_ERROR, judge

logger = logging.getLogger(__name__)
Place = TypeVar("Place")
LOG_FORM = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@dataclass(frozen=True)
class Job:
    """work: a partial of a module's function, which another process can be told of; its result is pickled, too. after:
    the name of a job before it, in whose stead it need not be tried when that one fails. log: a file that gets what the
    work logs, where it is done. alone: whether a cluster starts a process for it, which gives its memory back, and in
    which a library that goes wrong harms no other job."""

    name: str
    work: Callable[[], Any]
    after: str | None = None
    log: Path | None = None
    alone: bool = False


@dataclass(frozen=True)
class Ended:
    """How a job ended. result: of the work, None where it failed, with exit_code and reason as a verb has them. tries:
    how often it was begun; machine: where it ended, "" where it was not begun."""

    name: str
    result: Any = None
    exit_code: int = 0
    reason: str = ""
    seconds: float = 0.0
    machine: str = ""
    tries: int = 1

    @property
    def passed(self) -> bool:
        return self.exit_code == 0


# Does jobs, each of which stands behind the one that it waits for, and tells of each as it ends.
Runner = Callable[[Sequence[Job]], Iterator[Ended]]


def in_turn(jobs: Sequence[Job]) -> Iterator[Ended]:
    """A Runner in this process, in the order given."""
    failed: dict[str, Ended] = {}
    for job in jobs:
        ended = without(job, failed[job.after]) if job.after in failed else attempt(job)
        if not ended.passed:
            failed[job.name] = ended
        yield ended


def without(job: Job, cause: Ended) -> Ended:
    """A job that was not begun since the one before it failed."""
    return Ended(job.name, None, cause.exit_code, f"{cause.name}: {cause.reason}", tries=0)


def attempt(job: Job) -> Ended:
    """Do a job here; whatever it raises, but for an interruption, is its own end."""
    started, place = time.monotonic(), platform.node()
    result, code, reason = None, 0, ""
    try:
        with _logged(job.log):
            try:
                result = job.work()
            except Exception as error:
                code, reason = judge(error)
                logger.error("%s failed: %s", job.name, reason, exc_info=code == INTERNAL_ERROR)
    except OSError as error:
        code, reason = judge(
            UserError(f"its log {job.log} cannot be written ({error.strerror}); choose another folder")
        )
    return Ended(job.name, result, code, reason, round(time.monotonic() - started, 3), place)


class Spread(ABC, Generic[Place]):
    """A Runner of other processes. A place stands for a job that was sent to one."""

    def __call__(self, jobs: Sequence[Job]) -> Iterator[Ended]:
        """As a Runner. A job is sent when the one that it waits for has ended."""
        names = {job.name for job in jobs}
        lost = [f"{job.name} waits for {job.after}" for job in jobs if job.after and job.after not in names]
        assert not lost, f"{lost[0]}, which is none of these jobs and never ends"
        waiting, running, over = list(jobs), dict[Place, tuple[Job, int]](), dict[str, Ended]()
        while waiting or running:
            held = []
            for job in waiting:
                cause = over.get(job.after) if job.after else None
                if cause is not None and not cause.passed:
                    over[job.name] = without(job, cause)
                    yield over[job.name]
                elif job.after and cause is None:
                    held.append(job)
                else:
                    running[self.send(job)] = job, 1
            waiting = held
            if not running:  # what was left waited for what failed
                continue
            for place in self.ready(list(running)):
                job, tries = running.pop(place)
                ended = self.ended(job, place, tries)
                if ended is None:
                    running[self.send(job)] = job, tries + 1
                else:
                    over[job.name] = ended
                    yield ended

    @abstractmethod
    def send(self, job: Job) -> Place:
        """Have a process `attempt` the job."""

    @abstractmethod
    def ready(self, places: Sequence[Place]) -> Sequence[Place]:
        """Wait for one of them, and tell of all that have ended. A signal is heard meanwhile."""

    @abstractmethod
    def ended(self, job: Job, place: Place, tries: int) -> Ended | None:
        """How it ended; None where its process was lost and it is to be sent again, which is said."""


def error_of(failed: Sequence[Ended]) -> Exception:
    """What to raise where jobs failed and nothing goes on without them: of the first one's kind, naming them."""
    kinds: dict[int, type[Exception]] = {
        kind.exit_code: kind for kind in (UserError, EnvironmentLacksError, ParityError, ResourceError)
    }
    named = listed([f"{ended.name} failed: {ended.reason}" for ended in failed])
    return kinds.get(failed[0].exit_code, RuntimeError)(named)


@contextmanager
def _logged(path: Path | None) -> Iterator[None]:
    """Within, what is logged also goes to the end of a file."""
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter(LOG_FORM))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
