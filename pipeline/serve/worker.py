"""A thread that draws, or has replicas draw: batch after batch, until the queue is closed and empty."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from export.errors import ContractError, RecipeError
from pipeline.command import judge
from pipeline.generate.draw import Pictures
from pipeline.serve.jobs import Drawn, Failed, JobQueue, Preview, Row

if TYPE_CHECKING:
    from pipeline.serve.metrics import Metrics

logger = logging.getLogger(__name__)


class Batch(Protocol):
    """Pictures on their way: a Drawing of this process, or one of a replica's."""

    @property
    def n_steps(self) -> int: ...

    @property
    def steps_done(self) -> int: ...

    @property
    def is_over(self) -> bool: ...

    def step(self) -> None:
        """The next step of every picture."""

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these pictures alone."""

    def preview(self, row: int) -> Pictures:
        """What a picture is about to become, [H, W, C] uint8, after a step that its job has previews of."""

    def picture(self, row: int) -> Pictures:
        """A picture that is done, [H, W, C] uint8. Raises ContractError where there is none."""


# Rows of equal settings, and where to count what befalls them -> their batch before its first step.
Start = Callable[[list[Row], "Metrics"], Batch]


class Worker(threading.Thread):
    """Has drawn what the queue gives, one batch at a time.

    batch_s: what the last batch took, 0 before the first.
    """

    def __init__(self, start_batch: Start, queue: JobQueue, metrics: Metrics) -> None:
        # A daemon: a second signal does not wait for it, and a first one does, by joining it.
        super().__init__(name="draw", daemon=True)
        self.start_batch, self.queue, self.metrics = start_batch, queue, metrics
        self.batch_s = 0.0

    def run(self) -> None:
        while rows := self.queue.take():
            started = time.monotonic()
            try:
                self._draw(rows)
            except Exception as error:  # the jobs of this batch fail, the server goes on
                _, message = judge(error)
                logger.error("a batch of %d pictures failed: %s", len(rows), message, exc_info=True)
                for row in rows:
                    _fail(row, message, isinstance(error, RecipeError))
            self.batch_s = time.monotonic() - started

    def _draw(self, rows: list[Row]) -> None:
        """Draw one batch, and tell its jobs; those that nobody waits for any more leave it before the next step."""
        drawing = self.start_batch(rows, self.metrics)
        started = time.monotonic()
        self.metrics.batch_pictures.observe(len(rows))
        while True:
            if any(row.job.is_cancelled for row in rows):
                kept = [place for place, row in enumerate(rows) if not row.job.is_cancelled]
                rows = [rows[place] for place in kept]
                drawing.keep(kept)
            if not rows or drawing.is_over:
                break
            before = time.monotonic()
            drawing.step()
            self.metrics.step_seconds.observe(time.monotonic() - before)
            for place, row in enumerate(rows):
                if drawing.steps_done in row.job.preview_steps:
                    _tell_preview(drawing, place, row)
        for place, row in enumerate(rows):
            if _tell_drawn(drawing, place, row):
                self.metrics.pictures.inc()
                self.metrics.picture_seconds.observe((time.monotonic() - started) / len(rows))


def _tell_preview(drawing: Batch, place: int, row: Row) -> None:
    try:
        pixels = drawing.preview(place)
    except ContractError as error:  # this picture's own: those beside it need not have NaN
        _fail(row, str(error), False)
    else:
        row.job.tell(Preview(row.index, drawing.steps_done, drawing.n_steps, pixels))


def _tell_drawn(drawing: Batch, place: int, row: Row) -> bool:
    """Whether there is a picture."""
    try:
        pixels = drawing.picture(place)
    except ContractError as error:
        _fail(row, str(error), False)
        return False
    row.job.tell(Drawn(row.index, pixels))
    return True


def _fail(row: Row, message: str, by_request: bool) -> None:
    """End a job, once, with all of its pictures."""
    if not row.job.is_cancelled:
        row.job.cancel()
        row.job.tell(Failed(message, by_request))
