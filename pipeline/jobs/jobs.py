"""Jobs that are independent but for an order: one that fails ends itself and those that wait for it, no other.

A job is done by this process, one after the other (`in_turn`), or by a Ray cluster (ray_jobs.py).
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.command import INTERNAL_ERROR, judge

logger = logging.getLogger(__name__)
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
    with _logged(job.log):
        try:
            result, code, reason = job.work(), 0, ""
        except Exception as error:
            code, reason = judge(error)
            result = None
            logger.error("%s failed: %s", job.name, reason, exc_info=code == INTERNAL_ERROR)
    return Ended(job.name, result, code, reason, round(time.monotonic() - started, 3), place)


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
