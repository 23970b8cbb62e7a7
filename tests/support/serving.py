"""A server in this process, around an engine of NumPy whose calls a test lets through one by one."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from starlette.testclient import TestClient

from pipeline.generate.pixel_model import PixelModel
from pipeline.serve.app import make_app
from pipeline.serve.images_request import PATH
from pipeline.serve.service import Limits, Service
from pipeline.text_to_image import Pipeline
from tests.generate.test_generate import LevelEngine, make_bundle

WAITED_S = 120.0
USUAL = Limits()


class GatedEngine(LevelEngine):
    """Draws flat pictures as bright as their class; once `gate` is closed, each call waits for a permit."""

    def __init__(self) -> None:
        super().__init__()
        self.gated, self.permits, self.entered = False, threading.Semaphore(0), threading.Semaphore(0)
        self.error: Exception | None = None

    def run(self, inputs: Any) -> Any:
        self.entered.release()
        if self.gated:
            assert self.permits.acquire(timeout=WAITED_S)
        if self.error is not None:
            raise self.error
        return super().run(inputs)

    def let(self, calls: int) -> None:
        """So many calls may go on."""
        self.permits.release(calls)

    def open(self) -> None:
        """All that come may go on."""
        self.gated = False
        self.permits.release(1000)

    def labels(self, call: int) -> list[int]:
        """The classes of the prompted half of a call."""
        labels = self.calls[call]["class_labels"].tolist()
        return labels[: len(labels) // 2]


class Server:
    """A started service, its engine and a client of it."""

    def __init__(self, service: Service, engine: GatedEngine, api_key: str | None) -> None:
        self.service, self.engine = service, engine
        self.app = make_app(service, api_key)
        self.client = TestClient(self.app, raise_server_exceptions=False)

    def ask(self, **fields: Any) -> Any:
        """The response to a request for pictures."""
        return self.client.post(PATH, json={"prompt": "1"} | fields)

    def asking(self, **fields: Any) -> Asking:
        return Asking(lambda: self.ask(**fields))

    def metric(self, name: str, **labels: str) -> float:
        value = self.service.metrics.registry.get_sample_value(name, labels)
        assert value is not None, name
        return value

    def outcomes(self) -> dict[str, int]:
        """How requests ended, by how many did."""
        names = ("ok", "refused", "full", "draining", "timeout", "cancelled", "failed")
        counts = {name: int(self.metric("ditc_requests_total", outcome=name)) for name in names}
        return {name: count for name, count in counts.items() if count}


class Asking(threading.Thread):
    """A request in a thread of its own."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.call, self.answer = call, None
        self.start()

    def run(self) -> None:
        self.answer = self.call()

    def result(self) -> Any:
        self.join(WAITED_S)
        assert not self.is_alive() and self.answer is not None
        return self.answer


@contextmanager
def served(folder: Path, limits: Limits = USUAL, api_key: str | None = None, **bundle: Any) -> Iterator[Server]:
    """A server in `folder`, whose engine goes on by itself unless it is gated."""
    engine = GatedEngine()
    opened = replace(make_bundle(folder, **bundle), make_engine=lambda: engine)
    pipeline = Pipeline(PixelModel(opened), opened)
    service = Service(pipeline, limits)
    service.start()
    try:
        yield Server(service, engine, api_key)
    finally:
        engine.open()
        service.queue.close()
        for worker in service.workers:
            worker.join(WAITED_S)


def until(true: Callable[[], object]) -> None:
    """Wait for what another thread is about to do."""
    end = time.monotonic() + WAITED_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def pixels_of(row: Any) -> Any:
    """The picture [H, W] or [H, W, C] of a row of an answer, or of an event, in base64."""
    return pixels(base64.b64decode(row["b64_json"]))


def pixels(png: bytes) -> Any:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image)
