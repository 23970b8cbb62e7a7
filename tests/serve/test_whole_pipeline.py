"""A whole pipeline behind the server: pictures, previews of latents, what the page is told."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import uvicorn
from starlette.testclient import TestClient

from benchmarks.tools import browser
from export.documents import sha256
from pipeline.bundle import manifest
from pipeline.bundle.pipeline_bundle import load_pipeline
from pipeline.files import MANIFEST_FILE, PIPELINE_FILE, tree
from pipeline.generate.draw import DrawRequest
from pipeline.generate.latent_model import LatentModel
from pipeline.generate.tokenizer import PromptTokenizer
from pipeline.serve.app import make_app
from pipeline.serve.images_request import PATH
from pipeline.serve.server import make_config
from pipeline.serve.service import Service
from pipeline.text_to_image import Pipeline
from tests.bundle.test_pipeline_bundle import COMPONENTS, seal, write
from tests.support.bundles import facts
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


LONG = "a cat " * 80  # 160 words, of which 119 fit beside the end


def test_what_of_a_prompt_is_left_out_is_said_beside_each_picture(client: TestClient) -> None:
    """To the official client, in an answer and in a stream; a prompt that fits leaves nothing to say."""
    official = openai.OpenAI(base_url="http://testserver/v1", api_key="any", http_client=client)
    asked = {"steps": 2, "guidance": 3.0, "negative_prompt": "ring " * 140}
    rows = official.images.generate(prompt=LONG, n=2, extra_body=asked).data
    assert rows is not None and len(rows) == 2
    for row in rows:
        first, second = row.model_dump()["warnings"]
        assert re.fullmatch(
            r"the prompt 'a cat .* has 41 tokens more than the 120 that fit: 'cat a .* is left out", first
        )
        assert "the prompt 'ring ring" in second
    stream = official.images.generate(prompt=LONG, stream=True, partial_images=1, extra_body=asked)
    assert [event.model_dump()["warnings"] for event in stream] == [[first, second]] * 2
    (row,) = official.images.generate(prompt=LONG, extra_body=asked | {"guidance": 1.0, "negative_prompt": None}).data
    assert row.model_dump()["warnings"] == [first], "what has no effect is not cut"
    (row,) = official.images.generate(prompt="a cat", extra_body={"steps": 2}).data
    assert row.model_dump()["warnings"] == []


@contextmanager
def opened(app: Any) -> Iterator[str]:
    """An address of this process that answers as the application."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(make_config(app))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join(WAITED_S)


@pytest.mark.slow
def test_the_page_says_what_of_a_prompt_is_left_out(client: TestClient, tmp_path: Path) -> None:
    executable = browser.browser()
    if executable is None:
        pytest.skip(f"no browser is installed: none of {', '.join(browser.BROWSERS)}")
    with opened(client.app) as address, browser.opened(executable) as tab:
        tab.show(800, 900)
        tab.open(address)
        tab.wait("model !== null")
        for prompt, is_cut in ((LONG.strip(), True), ("a cat", False)):
            tab.run(f"at('prompt').value = '{prompt}'; at('steps').value = 3; at('draw').click()")
            tab.wait("!running && at('status').textContent.startsWith('drawn')")
            assert tab.run("!at('warning').hidden") == is_cut
            assert ("tokens more than the 120 that fit" in tab.run("at('warning').textContent")) == is_cut
            tab.screenshot(tmp_path / f"cut_{is_cut}.png")
        assert not tab.complaints


def test_each_text_encoder_says_what_it_leaves_out(tmp_path: Path) -> None:
    source = make_source(tmp_path, Log())
    model = LatentModel(source)
    second = replace(model.row.encoders[0], component="text_encoder_2")
    model.row = replace(model.row, encoders=(*model.row.encoders, second))
    model.tokenizers["text_encoder_2"] = PromptTokenizer.load(source.tokenizers["tokenizer"], 200)
    of_both = model.warnings(DrawRequest((LONG * 2,)))
    assert [text.partition(" the prompt ")[0] for text in of_both] == ["text_encoder:", "text_encoder_2:"]
    (of_the_shorter,) = model.warnings(DrawRequest((LONG,)))
    assert of_the_shorter.startswith("text_encoder: the prompt ")


def test_the_page_is_told_what_there_is(client: TestClient) -> None:
    (row,) = client.get("/v1/models").json()["data"]
    facts = row["ditc"]
    assert row["id"] == "tiny" and facts["size"] == "8x8" and facts["steps"] == 20 and facts["guidance"] == 4.5
    assert len(facts["examples"]) == 6 and facts["report"] is None
    assert client.get("/report/").status_code == 404
    assert client.post(PATH, json={"prompt": "a cat", "size": "512x512"}).status_code == 400


def test_the_report_leads_to_those_of_the_components(tmp_path: Path, log: Log) -> None:
    folder = write(tmp_path / "bundle")
    for part in (folder, *(folder / name for name in COMPONENTS)):
        (part / "report").mkdir()
        (part / "report/index.html").write_text(f"<!doctype html><title>of {part.name}</title>")
    for name in COMPONENTS:
        (folder / name / MANIFEST_FILE).unlink()
        manifest.write(manifest.compose(facts(folder / name), folder / name), folder / name)
    seal(folder, files={name: row_of(folder / name) for name in tree(folder) if name.split("/")[0] not in
                        (*COMPONENTS, PIPELINE_FILE)})  # fmt: skip
    service = Service(Pipeline(LatentModel(make_source(tmp_path / "own", log)), load_pipeline(folder)))
    client = TestClient(make_app(service))
    assert "of bundle" in client.get("/report/").text
    assert client.get("/v1/models").json()["data"][0]["ditc"]["report"] == "/report/"
    for name in COMPONENTS:
        answer = client.get(f"/{name}/report/index.html")
        assert f"of {name}" in answer.text
        assert answer.headers["content-security-policy"].startswith("sandbox; default-src 'none'")
        assert client.get(f"/{name}/report/other.html").status_code == 404
    for path in ("/vae_decoder/report/", "/tokenizer/report/", "/transformer/report/../config.json"):
        assert client.get(path).status_code == 404


def row_of(path: Path) -> dict[str, int | str]:
    return {"size": path.stat().st_size, "sha256": sha256(path)}
