"""An engine, or replicas of one, behind a queue: what happens to a request between its arrival and its pictures."""

from __future__ import annotations

import asyncio
import io
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

from export.errors import RecipeError
from pipeline.generate.draw import Pictures
from pipeline.serve.images_request import ApiError, Asked
from pipeline.serve.jobs import Drawn, Event, Failed, Job, JobQueue, Preview, QueueClosedError, QueueFullError, Row
from pipeline.serve.metrics import Metrics
from pipeline.serve.store import PictureStore
from pipeline.serve.worker import Batch, Start, Worker
from pipeline.text_to_image import Pipeline, as_image

logger = logging.getLogger(__name__)
LONGEST_RETRY_S = 600


class ClientLeftError(Exception):
    """Whoever asked has closed the connection: no answer can be given."""


@dataclass(frozen=True)
class Limits:
    """queue: requests that may wait; batch_size: pictures drawn at a time; timeout_s: of a request from its arrival."""

    queue: int = 64
    batch_size: int = 4
    timeout_s: float = 120.0


@dataclass
class Counting:
    """goes_on: set where the answer goes on after the context, and is counted then."""

    goes_on: bool = False


@dataclass(frozen=True)
class Submitted:
    """A job in the queue, and what is told of it; None: its client has left."""

    job: Job
    arrivals: asyncio.Queue[Event | None]


# Of answers that are errors, by their status.
OUTCOMES = {408: "timeout", 429: "full", 500: "failed", 503: "draining", 504: "timeout"}


class Service:
    """The pipeline, its workers and what they have made. To be used from one event loop; `start` comes before all.

    created: when, in seconds since 1970.
    """

    def __init__(
        self, pipeline: Pipeline, limits: Limits = Limits(), start_batch: Start | None = None, batches: int = 1
    ) -> None:
        """start_batch: what draws, where it is not the pipeline itself; batches: how many of them at a time."""

        def start_here(rows: list[Row], _: Metrics) -> Batch:
            return pipeline.start([row.picture for row in rows], *rows[0].settings)

        self.pipeline, self.limits, self.created = pipeline, limits, int(time.time())
        self.queue = JobQueue(limits.queue, limits.batch_size)
        self.store = PictureStore()
        self.metrics = Metrics(lambda: len(self.queue), lambda: self.store.size_bytes)
        self.workers = [Worker(start_batch or start_here, self.queue, self.metrics) for _ in range(batches)]

    def start(self) -> None:
        for worker in self.workers:
            worker.start()

    @property
    def is_draining(self) -> bool:
        return self.queue.is_closed

    @property
    def state(self) -> Literal["ready", "draining", "failed"]:
        """failed: nothing is drawn any more, whatever comes."""
        if self.is_draining:
            return "draining"
        return "ready" if all(worker.is_alive() for worker in self.workers) else "failed"

    async def drain(self) -> None:
        """Take no more jobs, and return when those that there are have ended."""
        self.queue.close()
        for worker in self.workers:
            await asyncio.to_thread(worker.join)

    @asynccontextmanager
    async def counted(self, arrived: float) -> AsyncIterator[Counting]:
        """Within, a request is answered, and counted by how that ends. arrived: time.monotonic() then. Raises ApiError
        for one that takes too long."""
        counting, outcome = Counting(), "failed"
        try:
            async with asyncio.timeout(self.limits.timeout_s - (time.monotonic() - arrived)):
                yield counting
            outcome = "ok"
        except ApiError as error:
            outcome = OUTCOMES.get(error.status, "refused")
            raise
        except RecipeError:
            outcome = "refused"
            raise
        except TimeoutError:
            outcome = "timeout"
            message = f"the pictures took more than {self.limits.timeout_s:g} s; ask for fewer, or for fewer steps"
            raise ApiError(504, message, kind="server_error", code="timeout") from None
        except (ClientLeftError, asyncio.CancelledError):
            outcome = "cancelled"
            raise
        finally:
            if outcome != "ok" or not counting.goes_on:
                self.metrics.requests.labels(outcome).inc()
                logger.info("request: %s after %.2f s", outcome, time.monotonic() - arrived)

    def submit(self, asked: Asked) -> Submitted:
        """Put a request into the queue. Raises ApiError where there is no place."""
        loop, arrivals = asyncio.get_running_loop(), asyncio.Queue[Event | None]()
        job = Job(asked.request, lambda event: _post(loop, arrivals, event), asked.preview_steps)
        self._put(job)
        return Submitted(job, arrivals)

    async def events(self, submitted: Submitted, left: Awaitable[object]) -> AsyncGenerator[Preview | Drawn, None]:
        """What becomes of a request's pictures, until all are drawn. left: is awaited; ends when the client has left.

        Raises ApiError for a job that fails, and ClientLeftError. However it ends, whatever is not drawn by then is no
        longer wanted.
        """
        job, arrivals = submitted.job, submitted.arrivals

        async def watch() -> None:
            await left
            arrivals.put_nowait(None)

        watcher, missing = asyncio.create_task(watch()), len(job.request.pictures)
        try:
            while missing:
                event = await arrivals.get()
                if event is None:
                    raise ClientLeftError
                if isinstance(event, Failed):
                    status, kind = (400, "invalid_request_error") if event.by_request else (500, "server_error")
                    raise ApiError(status, event.message, kind=kind)
                missing -= isinstance(event, Drawn)
                yield event
        finally:
            job.cancel()
            watcher.cancel()

    def _put(self, job: Job) -> None:
        try:
            self.queue.put(job)
        except QueueFullError:
            message = f"{self.limits.queue} requests wait already; try again later"
            kind, wait_s = "rate_limit_error", self.retry_after_s()
            raise ApiError(429, message, kind=kind, code="queue_full", retry_after_s=wait_s) from None
        except QueueClosedError:
            message = "the server is shutting down; ask again when it is back"
            raise ApiError(503, message, kind="server_error", code="draining", retry_after_s=1) from None

    def retry_after_s(self) -> int:
        """When the queue is likely to be empty, by what the last batches took."""
        batches = math.ceil(self.queue.pictures_waiting / self.limits.batch_size / len(self.workers))
        return min(LONGEST_RETRY_S, max(1, math.ceil(batches * max(worker.batch_s for worker in self.workers))))


def _post(loop: asyncio.AbstractEventLoop, arrivals: asyncio.Queue[Event | None], event: Event) -> None:
    """Hand an event to the loop, from the thread that draws."""
    try:
        loop.call_soon_threadsafe(arrivals.put_nowait, event)
    except RuntimeError:  # the loop has ended, and with it whoever waited
        logger.info("a picture was drawn that nobody waits for any more")


async def as_png(pixels: Pictures) -> bytes:
    """The PNG file of a picture [H, W, 1 or 3] uint8, made in another thread."""
    return await asyncio.to_thread(_as_png, pixels)


def _as_png(pixels: Pictures) -> bytes:
    file = io.BytesIO()
    as_image(pixels).save(file, format="PNG")
    return file.getvalue()
