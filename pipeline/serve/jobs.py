"""What waits to be drawn: jobs, and the bounded queue that makes batches of their pictures."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.generate.draw import DrawRequest, Picture, Pictures


class QueueFullError(Exception):
    """As many jobs wait as may."""


class QueueClosedError(Exception):
    """The server ends, and takes no more jobs."""


@dataclass(frozen=True)
class Preview:
    """What a picture of a job is about to become. pixels: [H, W, C] uint8."""

    index: int
    steps_done: int
    n_steps: int
    pixels: Pictures


@dataclass(frozen=True)
class Drawn:
    """A picture of a job. pixels: [H, W, C] uint8."""

    index: int
    pixels: Pictures


@dataclass(frozen=True)
class Failed:
    """A job that ends without its pictures, with a sentence. by_request: through what it asked for."""

    message: str
    by_request: bool


Event = Preview | Drawn | Failed


@dataclass(eq=False)
class Job:
    """A request on its way. n_steps and guidance_scale of `request` are stated: jobs in which they are equal share
    batches.

    tell: takes what becomes of the job, in the thread that draws. preview_steps: after how many steps there are
    previews.
    """

    request: DrawRequest
    tell: Callable[[Event], None]
    preview_steps: frozenset[int] = frozenset()
    _unwanted: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Nobody waits for the job any more: its pictures leave the queue, and their batch at its next step."""
        self._unwanted.set()

    @property
    def is_cancelled(self) -> bool:
        return self._unwanted.is_set()


@dataclass(frozen=True)
class Row:
    """One picture of a job, which is a row of some batch."""

    job: Job
    index: int
    picture: Picture

    @property
    def settings(self) -> tuple[int | None, float | None]:
        """What all rows of a batch have in common."""
        return self.job.request.n_steps, self.job.request.guidance_scale


class JobQueue:
    """Jobs in the order in which they came. Its methods may be called from any thread."""

    def __init__(self, most_jobs: int, batch_size: int) -> None:
        """most_jobs: that may wait; batch_size: pictures of a batch."""
        self.most_jobs, self.batch_size = most_jobs, batch_size
        self._rows: deque[Row] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, job: Job) -> None:
        """Let a job wait for its turn. Raises QueueFullError, or QueueClosedError."""
        with self._changed:
            if self._closed:
                raise QueueClosedError
            if len(self) >= self.most_jobs:
                raise QueueFullError
            self._rows.extend(Row(job, index, picture) for index, picture in enumerate(job.request.pictures))
            self._changed.notify_all()  # pictures of one job may be batches of several workers

    def take(self) -> list[Row]:
        """The next batch, which is waited for: the oldest picture, and those after it that can share its batch. Empty
        once the queue is closed and nothing waits any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._wanted() or self._closed)
            if not self._rows:
                return []
            settings = self._rows[0].settings
            batch = [row for row in self._rows if row.settings == settings][: self.batch_size]
            taken = set(map(id, batch))
            self._rows = deque(row for row in self._rows if id(row) not in taken)
            return batch

    def _wanted(self) -> bool:
        """Whether a picture waits that somebody wants; those that nobody does are gone."""
        if any(row.job.is_cancelled for row in self._rows):
            self._rows = deque(row for row in self._rows if not row.job.is_cancelled)
        return bool(self._rows)

    def close(self) -> None:
        """Take no more jobs; those that wait are still drawn."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def is_closed(self) -> bool:
        return self._closed

    @property
    def pictures_waiting(self) -> int:
        with self._changed:
            self._wanted()
            return len(self._rows)

    def __len__(self) -> int:
        """Jobs of which a picture waits."""
        with self._changed:
            self._wanted()
            return len({id(row.job) for row in self._rows})
