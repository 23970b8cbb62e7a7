"""A whole pipeline behind the server: pictures, previews of latents, what the page is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from pipeline.generate.latent_model import LatentModel
from pipeline.serve.app import make_app
from pipeline.serve.images_request import PATH
from pipeline.serve.service import Service
from pipeline.text_to_image import Pipeline
from tests.support.numpy_pipeline import Log, make_source
from tests.support.serving import WAITED_S, pixels_of


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def client(tmp_path: Path, log: Log) -> Iterator[TestClient]:
    service = Service(Pipeline(LatentModel(make_source(tmp_path, log))))
    service.start()
    try:
        yield TestClient(make_app(service))
    finally:
        service.queue.close()
        for worker in service.workers:
            worker.join(WAITED_S)


def events(text: str) -> list[Any]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


def test_pictures_are_those_of_the_pipeline(client: TestClient, tmp_path: Path) -> None:
    body = {"prompt": "a cat", "n": 2, "seed": 3, "steps": 4, "guidance": 2.0, "negative_prompt": "a ring"}
    rows = client.post(PATH, json=body).json()["data"]
    own = Pipeline(LatentModel(make_source(tmp_path / "own", Log())))(
        "a cat", num_images_per_prompt=2, seed=3, num_inference_steps=4, guidance_scale=2.0, negative_prompt="a ring"
    )
    assert [row["seed"] for row in rows] == [3, 4]
    for row, image in zip(rows, own.images, strict=True):
        np.testing.assert_array_equal(pixels_of(row), np.asarray(image))


def test_previews_come_on_the_way(client: TestClient, log: Log) -> None:
    body = {"prompt": "a cat", "steps": 6, "stream": True, "partial_images": 2}
    told = events(client.post(PATH, json=body).text)
    assert [event["type"].rpartition(".")[2] for event in told] == ["partial_image", "partial_image", "completed"]
    assert [event.get("steps_done") for event in told] == [2, 4, None]
    assert all(pixels_of(event).shape == (8, 8, 3) for event in told)
    # The first preview was decoded, and the denoiser loaded again for what was left.
    assert log.names == ["text_encoder", "transformer", "vae_decoder", "transformer", "vae_decoder"]


def test_the_page_is_told_what_there_is(client: TestClient) -> None:
    (row,) = client.get("/v1/models").json()["data"]
    facts = row["ditc"]
    assert row["id"] == "tiny" and facts["size"] == "8x8" and facts["steps"] == 20 and facts["guidance"] == 4.5
    assert len(facts["examples"]) == 6 and facts["report"] is None
    assert client.get("/report/").status_code == 404
    assert client.post(PATH, json={"prompt": "a cat", "size": "512x512"}).status_code == 400
