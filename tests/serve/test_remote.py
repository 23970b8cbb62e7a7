"""Batches that replicas draw, without a cluster: what a replica says of its steps, and what follows when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.errors import ContractError, RecipeError
from pipeline.bundle.manifest import MANIFEST_FILE
from pipeline.bundle.pipeline_bundle import manifest_sha256
from pipeline.generate.draw import DrawRequest
from pipeline.generate.pixel_model import PixelModel
from pipeline.serve.jobs import Drawn, Event, Job, Preview, Row
from pipeline.serve.metrics import Metrics
from pipeline.serve.remote import MOST_ENDED, RemoteBatch
from pipeline.serve.replica import Order, Progress, Replica
from pipeline.serve.service import Service
from pipeline.text_to_image import Pipeline
from tests.generate.test_generate import make_bundle
from tests.support.serving import GatedEngine, until


class EndedError(Exception):
    """A replica is no more."""


class Here:
    """A replica of this process. ends: after how many steps of an order, for each order it gets; None: it goes on."""

    def __init__(self, replica: Replica, ends: list[int | None]) -> None:
        self.replica, self.ends = replica, ends
        self.orders: list[Order] = []
        self.cancelled = 0

    def send(self, order: Order) -> Any:
        self.orders.append(order)
        return Steps(self, order, self.ends.pop(0) if self.ends else None)

    def start_batch(self, rows: list[Row], metrics: Metrics) -> RemoteBatch:
        return RemoteBatch(rows, self.send, (EndedError,), metrics.batches_again.inc)


class Steps:
    def __init__(self, here: Here, order: Order, ends: int | None) -> None:
        self.here, self.ends = here, ends
        self.loop = asyncio.new_event_loop()
        self.answers = here.replica.draw(order)
        self.count = 0

    def __next__(self) -> Progress:
        if self.count == self.ends:
            raise EndedError("the actor died\nwith its node")
        self.count += 1
        try:
            return self.loop.run_until_complete(anext(self.answers))
        except StopAsyncIteration:
            raise StopIteration from None

    def cancel(self) -> None:
        self.here.cancelled += 1


@pytest.fixture
def replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Replica:
    engine = GatedEngine()
    bundle = replace(make_bundle(tmp_path), make_engine=lambda: engine)
    (bundle.path / MANIFEST_FILE).write_text("{}")
    monkeypatch.setattr(Pipeline, "load", classmethod(lambda cls, *_: cls(PixelModel(bundle), bundle)))
    return Replica(str(bundle.path), manifest_sha256(bundle.path), "auto", 1)


class Told(Job):
    def __init__(self, *prompts: str, seed: int = 5, previews: Any = frozenset()) -> None:
        self.events: list[Event] = []
        super().__init__(DrawRequest(prompts, seed, 1, 4, 2.0), self.events.append, previews)

    @property
    def rows(self) -> list[Row]:
        return [Row(self, index, picture) for index, picture in enumerate(self.request.pictures)]


def drawn_here(replica: Replica, job: Told) -> Any:
    drawing = replica.pipeline.start(job.request.pictures, 4, 2.0)
    while not drawing.is_over:
        drawing.step()
    return drawing.result()


def service(here: Here) -> Iterator[Service]:
    one = Service(here.replica.pipeline, start_batch=here.start_batch, batches=2)
    one.start()
    yield one
    one.queue.close()
    for worker in one.workers:
        worker.join(60)


@pytest.mark.parametrize("ends", [[], [0], [1], [3, 2], [2, 0]])
def test_pictures_and_previews_are_told_once_however_often_replicas_end(
    ends: list[int | None], replica: Replica
) -> None:
    here, job = Here(replica, list(ends)), Told("3", "7", previews=frozenset({1, 3}))
    for one in service(here):
        one.queue.put(job)
        until(lambda: sum(isinstance(event, Drawn) for event in job.events) == 2)
        assert one.metrics.registry.get_sample_value("ditc_batches_again_total") == len(ends)
    kinds = [(type(event).__name__, event.index, getattr(event, "steps_done", 4)) for event in job.events]
    assert kinds == [
        (kind, row, step) for kind, step in (("Preview", 1), ("Preview", 3), ("Drawn", 4)) for row in (0, 1)
    ]
    expected = drawn_here(replica, job)
    for event in job.events:
        if isinstance(event, Drawn):
            np.testing.assert_array_equal(event.pixels, expected[event.index])
        else:
            assert isinstance(event, Preview) and event.n_steps == 4 and event.pixels.shape == expected[0].shape
    assert len(here.orders) == len(ends) + 1 and len(set(here.orders)) == 1


def test_a_batch_that_ends_every_replica_is_given_up(replica: Replica) -> None:
    here, counts = Here(replica, [1] * 9), []
    batch = RemoteBatch(Told("3").rows, here.send, (EndedError,), lambda: counts.append(1))
    batch.step()
    with pytest.raises(ContractError, match=f"{MOST_ENDED} replicas ended while they drew the batch"):
        batch.step()
    assert len(counts) == len(here.orders) == MOST_ENDED


def test_what_is_not_wanted_any_more_is_not_drawn_again(replica: Replica) -> None:
    here, jobs = Here(replica, [2]), [Told("3"), Told("4"), Told("7", previews=frozenset({4}))]
    rows = [row for job in jobs for row in job.rows]
    batch = RemoteBatch(rows, here.send, (EndedError,), lambda: None)
    batch.step()
    batch.keep([0, 2])
    while not batch.is_over:
        batch.step()
    assert [picture.prompt for picture in here.orders[1].pictures] == ["3", "7"] and batch.n_steps == 4
    for place, job in ((0, jobs[0]), (1, jobs[2])):
        np.testing.assert_array_equal(batch.picture(place), drawn_here(replica, job)[0])
    batch.keep([])
    assert here.cancelled == 1


def test_pictures_keep_their_places_when_others_leave(replica: Replica) -> None:
    here, jobs = Here(replica, []), [Told("3"), Told("4"), Told("7")]
    batch = RemoteBatch([row for job in jobs for row in job.rows], here.send, (EndedError,), lambda: None)
    batch.step()
    batch.keep([1, 2])
    batch.step()
    batch.keep([1])
    batch.step()
    batch.step()
    np.testing.assert_array_equal(batch.picture(0), drawn_here(replica, jobs[2])[0])


def test_a_replica_that_falls_silent_is_a_failure(replica: Replica) -> None:
    class Silent:
        def __next__(self) -> Progress:
            raise StopIteration

        def cancel(self) -> None: ...

    with pytest.raises(ContractError, match="a replica ended its work after 0 steps"):
        RemoteBatch(Told("3").rows, lambda _: Silent(), (EndedError,), lambda: None).step()


def test_nan_in_one_picture_is_that_one_s(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    model = replica.pipeline.model
    assert isinstance(model, PixelModel)
    engine = model.engine
    run = engine.run

    def spoilt(inputs: Any) -> Any:
        outputs = run(inputs)
        outputs["sample"][inputs["class_labels"] == 4] = np.nan
        return outputs

    monkeypatch.setattr(engine, "run", spoilt)
    batch = RemoteBatch(Told("3", "4", previews=frozenset({1})).rows, Here(replica, []).send, (), lambda: None)
    batch.step()
    assert batch.preview(0).shape == (8, 8, 1)
    with pytest.raises(ContractError, match="NaN or Inf"):
        batch.preview(1)
    while not batch.is_over:
        batch.step()
    assert batch.picture(0).shape == (8, 8, 1)
    with pytest.raises(ContractError, match="NaN or Inf"):
        batch.picture(1)


def test_another_bundle_at_the_same_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_FILE).write_text("{}")
    with pytest.raises(
        RecipeError, match=r"another bundle \(manifest [0-9a-f]{12}\) than the server's \(000000000000\)"
    ):
        Replica(str(tmp_path), "0" * 64, "auto", 1)
