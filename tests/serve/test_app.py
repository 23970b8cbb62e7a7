"""The addresses of the server, in this process: pictures, streams, refusals in OpenAI's form, page, report, metrics."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.generate.draw import Picture
from pipeline.serve import images_request
from pipeline.serve.app import PAGE
from pipeline.serve.images_request import MOST_BODY_BYTES, PATH
from pipeline.serve.service import Limits, Service
from pipeline.serve.store import PictureStore
from tests.generate.test_generate import DIGITS, GENERATION
from tests.support.serving import Server, pixels, pixels_of, served, until

JSON = {"content-type": "application/json"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with served(tmp_path) as one:
        yield one


def expected(server: Server, prompt: str, seed: int, steps: int = 4, guidance: float = 2.0, away: Any = None) -> Any:
    """What the pipeline draws by itself."""
    drawing = server.service.pipeline.start([Picture(prompt, seed, away)], steps, guidance)
    while not drawing.is_over:
        drawing.step()
    return drawing.result()[0, :, :, 0]


# --- pictures --------------------------------------------------------------------------------------------------------


def test_pictures_are_those_that_the_pipeline_draws(server: Server) -> None:
    answer = server.ask(prompt="7", n=6, seed=40)
    assert answer.status_code == 200 and abs(answer.json()["created"] - time.time()) < 60
    rows = answer.json()["data"]
    assert [row["seed"] for row in rows] == list(range(40, 46))
    for row in rows:
        np.testing.assert_array_equal(pixels_of(row), expected(server, "7", row["seed"]))


def test_steps_guidance_and_negative_prompt_are_heeded(server: Server) -> None:
    [row] = server.ask(prompt="7", seed=1, steps=2, guidance=3, negative_prompt="2").json()["data"]
    assert len(server.engine.calls) == 2 and server.engine.calls[-1]["class_labels"].tolist() == [7, 2]
    np.testing.assert_array_equal(pixels_of(row), expected(server, "7", 1, 2, 3.0, "2"))
    server.ask(prompt="7", guidance=1)
    assert server.engine.calls[-1]["class_labels"].tolist() == [7]


def test_a_model_of_more_steps_than_others_may_make_is_drawn_with_its_own(tmp_path: Path) -> None:
    own = images_request.MOST_STEPS + 1
    with served(tmp_path, generation=GENERATION | {"n_steps": own}) as server:
        assert server.ask(prompt="7").status_code == 200 and len(server.engine.calls) == own
        assert server.ask(prompt="7", steps=own).status_code == 200 and len(server.engine.calls) == 2 * own
        error = refused(server.ask(prompt="7", steps=own + 1), 400)
        assert error["message"] == f"steps {own + 1}; this server makes at most {own}" and error["param"] == "steps"
        document = server.client.get("/openapi.json").json()
        body = document["paths"][PATH]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert body["properties"]["steps"]["anyOf"][0]["maximum"] == own
        assert server.client.get("/v1/models").json()["data"][0]["ditc"]["most"]["steps"] == own


def test_null_is_as_if_it_were_not_there(server: Server) -> None:
    names = ("model", "n", "size", "response_format", "stream", "partial_images", "user", "negative_prompt", "steps")
    answer = server.ask(**dict.fromkeys(names), guidance=None, seed=3, quality=None, output_format=None)
    assert len(answer.json()["data"]) == 1 and len(server.engine.calls) == 4


def test_what_is_drawn_in_any_case_may_be_said(server: Server) -> None:
    said = {"quality": "standard", "background": "opaque", "moderation": "low", "output_format": "png", "user": "me"}
    assert server.ask(model="digits", size="8x8", **said).status_code == 200
    assert server.ask(size="auto", quality="auto").status_code == 200


def test_without_a_seed_pictures_differ_and_say_theirs(server: Server) -> None:
    rows = [server.ask().json()["data"][0] for _ in range(2)]
    assert rows[0]["seed"] != rows[1]["seed"]
    np.testing.assert_array_equal(pixels_of(rows[0]), expected(server, "1", rows[0]["seed"]))


def test_addresses_lead_to_the_pictures(server: Server) -> None:
    rows = server.ask(prompt="7", n=2, seed=5, response_format="url").json()["data"]
    for row in rows:
        assert re.fullmatch(r"http://testserver/pictures/[0-9a-f]{32}\.png", row["url"]) and "b64_json" not in row
        file = server.client.get(row["url"])
        assert file.headers["content-type"] == "image/png"
        np.testing.assert_array_equal(pixels(file.content), expected(server, "7", row["seed"]))
    answer = server.client.get("/pictures/0000.png")
    assert answer.status_code == 404 and "ask for b64_json" in answer.json()["error"]["message"]


def test_the_store_keeps_the_newest_within_its_bytes() -> None:
    store = PictureStore(most_bytes=100)
    names = [store.put(bytes([number]) * 40) for number in range(4)]
    assert [store.get(name) is not None for name in names] == [False, False, True, True] and store.size_bytes == 80
    large = store.put(bytes(400))
    assert store.get(large) is not None and store.get(names[-1]) is None and store.size_bytes == 400


def test_requests_at_the_same_time_share_batches_and_get_their_own(server: Server) -> None:
    server.engine.gated = True
    first = server.asking(prompt="0", seed=0)
    until(lambda: server.engine.entered.acquire(blocking=False))
    others = [server.asking(prompt=str(digit), seed=digit) for digit in range(1, 5)]
    until(lambda: len(server.service.queue) == 4)
    server.engine.let(8)
    for seed, asking in enumerate([first, *others]):
        [row] = asking.result().json()["data"]
        assert row["seed"] == seed
    assert sorted(server.engine.labels(-1)) == [1, 2, 3, 4] and len(server.engine.calls) == 8
    server.engine.open()
    for seed, asking in enumerate([first, *others]):
        np.testing.assert_array_equal(pixels_of(asking.result().json()["data"][0]), expected(server, str(seed), seed))


def test_many_clients_get_their_own_pictures(server: Server) -> None:
    def ask(seed: int) -> Any:
        return server.ask(prompt=str(seed % 10), seed=seed, steps=2 + seed % 3).json()["data"][0]

    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(ask, range(40)))
    for seed, row in enumerate(rows):
        assert row["seed"] == seed
        np.testing.assert_array_equal(pixels_of(row), expected(server, str(seed % 10), seed, 2 + seed % 3))


# --- streams ---------------------------------------------------------------------------------------------------------


def streamed(response: Any) -> list[Any]:
    """The events of an answer."""
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = [part.splitlines() for part in response.text.split("\n\n") if part]
    events = [json.loads(data.removeprefix("data: ")) for _, data in parts]
    assert [kind.removeprefix("event: ") for kind, _ in parts] == [event["type"] for event in events]
    return events


def test_a_stream_has_previews_and_then_the_picture(server: Server) -> None:
    events = streamed(server.ask(prompt="7", seed=3, stream=True, partial_images=2))
    assert [event["type"].rpartition(".")[2] for event in events] == ["partial_image", "partial_image", "completed"]
    assert [(event["partial_image_index"], event["steps_done"]) for event in events[:2]] == [(0, 1), (1, 3)]
    assert {(event["seed"], event["index"], event["size"], event["output_format"]) for event in events} == {
        (3, 0, "8x8", "png")
    }
    np.testing.assert_array_equal(pixels_of(events[-1]), expected(server, "7", 3))
    assert server.outcomes() == {"ok": 1}


def test_a_stream_of_several_pictures_says_which(server: Server) -> None:
    events = streamed(server.ask(prompt="7", seed=3, n=5, stream=True))
    assert [(event["index"], event["seed"]) for event in events] == [(i, 3 + i) for i in range(5)]


def test_a_stream_that_fails_ends_with_an_error(server: Server) -> None:
    server.engine.error = ValueError("a bug")
    [event] = streamed(server.ask(stream=True))
    assert event["type"] == "error" and event["error"]["message"] == "internal error, ValueError: a bug"
    assert server.outcomes() == {"failed": 1}


def test_a_stream_that_takes_too_long_ends_with_an_error(tmp_path: Path) -> None:
    with served(tmp_path, Limits(timeout_s=0.2)) as server:
        server.engine.gated = True
        events = streamed(server.ask(stream=True))
        assert events[-1]["error"]["code"] == "timeout" and server.outcomes() == {"timeout": 1}


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(answer: Any, status: int) -> Any:
    """The error of an answer in OpenAI's form, of one sentence."""
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    return error


WRONG = [
    ({"prompt": "horse"}, "prompt 'horse' is not a class"),
    ({"prompt": ""}, "prompt is ''; String should have at least 1 character"),
    ({"prompt": "1" * 4001}, "String should have at most 4000 characters"),
    ({"prompt": None}, "prompt is None"),
    ({"prompt": ["1"]}, "prompt is ['1']"),
    ({"negative_prompt": "horse"}, "prompt 'horse' is not a class"),
    ({"n": 0}, "n is 0; it should be greater than or equal to 1"),
    ({"n": 11}, "n is 11; it should be less than or equal to 10"),
    ({"n": "2"}, "n is '2'"),
    ({"n": True}, "n is True"),
    ({"steps": 0}, "steps is 0"),
    ({"steps": 201}, "steps 201; this server makes at most 200"),
    ({"steps": 10**9}, "steps 1000000000; this server makes at most 200"),
    ({"steps": 2.5}, "steps is 2.5"),
    ({"guidance": -1}, "guidance is -1"),
    ({"guidance": 1000.0}, "guidance is 1000.0"),
    ({"guidance": 1, "negative_prompt": "2"}, "no effect at a guidance scale of 1"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": 2**63}, "does not fit into 64 bits"),
    ({"seed": 2**63 - 3, "n": 4}, "seed of the last picture 9223372036854775808"),
    ({"size": "16x16"}, "size '16x16'; the engine draws 8x8"),
    ({"size": "huge"}, "size 'huge'; the engine draws 8x8"),
    ({"response_format": "jpeg"}, "response_format is 'jpeg'"),
    ({"output_format": "webp"}, "output_format is 'webp'"),
    ({"background": "transparent"}, "background is 'transparent'"),
    ({"quality": "hd"}, "quality is 'hd'"),
    ({"stream": "yes"}, "stream is 'yes'"),
    ({"partial_images": 2}, "partial_images 2 without stream"),
    ({"stream": True, "response_format": "url"}, "response_format url with stream"),
    ({"style": "vivid"}, "key 'style' is unknown"),
]


@pytest.mark.parametrize(("fields", "words"), WRONG)
def test_nonsense_is_refused_in_a_sentence(fields: Any, words: str, server: Server) -> None:
    error = refused(server.ask(**fields), 400)
    assert words in error["message"] and error["type"] == "invalid_request_error"
    assert not server.engine.calls and server.outcomes() == {"refused": 1}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"[]", "the document is []"),
        (b'{"prompt": "1", "prompt": "2"}', "key 'prompt' stands there twice"),
        (b'{"prompt": "1", "guidance": NaN}', "NaN is not a number"),
        (b'{"prompt": "\\ud800"}', "characters that cannot be shown"),
        (b'{"prompt": "\xff"}', "the body is not in UTF-8"),
        (b'{"prompt": ' + b"[" * 1000 + b"]" * 1000 + b"}", "nested more than"),
        (b"{}", "'prompt' is missing"),
    ],
)
def test_a_body_that_is_no_request(body: bytes, words: str, server: Server) -> None:
    assert words in refused(server.client.post(PATH, content=body, headers=JSON), 400)["message"]


def test_another_model_is_not_here(server: Server) -> None:
    error = refused(server.ask(model="gpt-image-1"), 404)
    assert error["code"] == "model_not_found" and "this server draws with digits" in error["message"]
    assert refused(server.client.get("/v1/models/gpt-image-1"), 404)["code"] == "model_not_found"


def test_a_body_that_is_too_long(server: Server) -> None:
    body = json.dumps({"prompt": "1", "user": "x" * MOST_BODY_BYTES}).encode()
    assert "more than 65536 bytes" in refused(server.client.post(PATH, content=body, headers=JSON), 413)["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_what_a_browser_sends_across_sites_unasked_is_refused(kind: str, server: Server) -> None:
    answer = server.client.post(PATH, content=b'{"prompt": "1"}', headers={"content-type": kind})
    assert "send application/json" in refused(answer, 415)["message"]


def test_a_body_in_another_coding_is_refused(server: Server) -> None:
    answer = server.client.post(PATH, content=b'{"prompt": "1"}', headers=JSON | {"content-encoding": "gzip"})
    assert "the content encoding is 'gzip'" in refused(answer, 415)["message"]


def test_a_body_that_does_not_arrive(tmp_path: Path) -> None:
    """Its client is told so, and not that its pictures took long."""
    with served(tmp_path, Limits(timeout_s=0.4)) as server:
        sent = asyncio.run(call_slowly(server))
        assert sent[0]["status"] == 408 and server.outcomes() == {"timeout": 1}
        assert "the body did not arrive within 0.2 s" in json.loads(sent[1]["body"])["error"]["message"]


async def call_slowly(server: Server) -> list[Any]:
    """What the server sends to a client that sends a part of its body, and stays."""
    sent: list[Any] = []
    parts = [{"type": "http.request", "body": b"{", "more_body": True}]

    async def receive() -> Any:
        if not parts:
            await asyncio.Event().wait()
        return parts.pop()

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    await server.app(
        {"type": "http", "method": "POST", "path": PATH, "query_string": b"", "headers": headers}, receive, send
    )
    return sent


def test_a_server_that_draws_no_more_is_not_healthy(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.service.workers[0], "is_alive", lambda: False)
    answer = server.client.get("/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "failed")


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/no", 404), ("GET", PATH, 405), ("POST", "/", 405)])
def test_other_addresses_and_methods(method: str, path: str, status: int, server: Server) -> None:
    assert f"{method} {path}: " in refused(server.client.request(method, path), status)["message"]


def test_a_full_queue_says_when_to_come_back(tmp_path: Path) -> None:
    with served(tmp_path, Limits(queue=2)) as server:
        server.engine.gated = True
        asked = [server.asking()]
        until(lambda: server.engine.entered.acquire(blocking=False))
        asked += [server.asking(steps=steps) for steps in (2, 3)]
        until(lambda: len(server.service.queue) == 2)
        server.service.workers[0].batch_s = 6.5
        answer = server.ask()
        error = refused(answer, 429)
        assert error["code"] == "queue_full" and error["type"] == "rate_limit_error"
        assert answer.headers["retry-after"] == "7"  # two pictures fit into a batch, so far as it knows
        server.engine.open()
        assert [one.result().status_code for one in asked] == [200] * 3
        assert server.outcomes() == {"ok": 3, "full": 1}


def test_a_request_that_takes_too_long(tmp_path: Path) -> None:
    with served(tmp_path, Limits(timeout_s=0.2)) as server:
        server.engine.gated = True
        error = refused(server.ask(), 504)
        assert error["code"] == "timeout" and "more than 0.2 s" in error["message"]
        server.engine.open()
        until(lambda: server.metric("ditc_step_seconds_count") == 1)  # it left the batch at the next step
        server.service.limits = Limits()
        assert server.ask(steps=1).status_code == 200
        assert server.metric("ditc_step_seconds_count") == 2 and server.outcomes() == {"timeout": 1, "ok": 1}


def test_a_failure_of_the_engine_is_the_server_s(server: Server) -> None:
    server.engine.error = ValueError("a bug")
    error = refused(server.ask(), 500)
    assert error["type"] == "server_error" and server.outcomes() == {"failed": 1}


def test_a_fault_of_the_server_itself_is_said_without_its_details(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images_request, "read", lambda *_: {}["secret"])
    error = refused(server.ask(), 500)
    assert error["message"] == "internal error, KeyError; the server's log has more" and server.outcomes() == {
        "failed": 1
    }


# --- clients that leave ----------------------------------------------------------------------------------------------


async def call(server: Server, body: dict[str, Any], leave: asyncio.Event) -> list[Any]:
    """What the server sends to a client that leaves at a moment."""
    sent: list[Any] = []
    parts = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Any:
        if parts:
            return parts.pop()
        await leave.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "path": PATH, "raw_path": PATH.encode(), "query_string": b"", "root_path": "", "scheme": "http",
        "headers": [(b"content-type", b"application/json"), (b"host", b"here")], "server": ("here", 80),
    }  # fmt: skip
    await server.app(scope, receive, send)
    return sent


@pytest.mark.parametrize("stream", [False, True])
def test_pictures_of_a_client_that_left_leave_the_batch(stream: bool, server: Server) -> None:
    server.engine.gated = True
    staying = server.asking(prompt="0", seed=1)
    until(lambda: server.engine.entered.acquire(blocking=False))
    beside = server.asking(prompt="1", seed=2)
    until(lambda: len(server.service.queue) == 1)

    async def leaves() -> list[Any]:
        leave = asyncio.Event()
        task = asyncio.create_task(call(server, {"prompt": "2", "stream": stream}, leave))
        while len(server.service.queue) < 2:
            await asyncio.sleep(0.01)
        server.engine.let(5)  # the first batch, and a step of the second
        while len(server.engine.calls) < 5:
            await asyncio.sleep(0.01)
        leave.set()
        return await task

    sent = asyncio.run(leaves())
    server.engine.let(3)
    assert [row["type"] for row in sent] == (["http.response.start"] if stream else [*STARTED_AND_ENDED])
    assert staying.result().status_code == beside.result().status_code == 200
    labels = [sorted(server.engine.labels(call)) for call in range(-4, 0)]
    assert labels == [[1, 2], [1, 2], [1], [1]] or labels == [[1, 2], [1], [1], [1]]
    assert server.outcomes() == {"ok": 2, "cancelled": 1}


STARTED_AND_ENDED = ("http.response.start", "http.response.body")


def test_a_client_that_leaves_while_it_sends(server: Server) -> None:
    async def leaves() -> list[Any]:
        leave = asyncio.Event()
        leave.set()
        parts: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            parts.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": PATH, "query_string": b"", "headers": headers}
        await server.app(scope, receive, send)
        return parts

    assert asyncio.run(leaves())[0]["status"] == 499 and server.outcomes() == {"cancelled": 1}


# --- the end ---------------------------------------------------------------------------------------------------------


def test_a_draining_server_finishes_what_it_has(server: Server) -> None:
    server.engine.gated = True
    asked = [server.asking(prompt="3", seed=seed) for seed in range(2)]
    until(lambda: len(server.service.queue) + len(server.engine.calls) >= 1 or server.engine.entered.acquire(False))
    until(lambda: server.service.workers[0].is_alive() and server.service.queue.pictures_waiting <= 1)
    assert server.client.get("/health").json()["status"] == "ready"

    async def drain() -> None:
        draining = asyncio.create_task(server.service.drain())
        while not server.service.is_draining:
            await asyncio.sleep(0.01)
        answer = await asyncio.to_thread(server.client.get, "/health")
        assert (answer.status_code, answer.json()["status"]) == (503, "draining")
        late = await asyncio.to_thread(server.ask)
        assert refused(late, 503)["code"] == "draining" and late.headers["retry-after"] == "1"
        assert not draining.done()
        server.engine.open()
        await draining

    asyncio.run(drain())
    assert [one.result().status_code for one in asked] == [200, 200]
    assert not server.service.workers[0].is_alive()


# --- what else there is ----------------------------------------------------------------------------------------------


def test_models(server: Server) -> None:
    [row] = server.client.get("/v1/models").json()["data"]
    assert row == server.client.get("/v1/models/digits").json()
    assert (row["id"], row["object"], row["owned_by"]) == ("digits", "model", "ditc")
    assert row["ditc"]["size"] == "8x8" and row["ditc"]["steps"] == 4 and row["ditc"]["guidance"] == 2.0
    assert row["ditc"]["report"] is None and row["ditc"]["most"]["n"] == 10


def test_the_key_guards_what_draws(tmp_path: Path) -> None:
    with served(tmp_path, api_key="secret") as server:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic secret"},
            {"Authorization": ""},
        ):
            for answer in (
                server.client.post(PATH, json={"prompt": "1"}, headers=headers),
                server.client.get("/v1/models", headers=headers),
                server.client.get("/v1/models/digits", headers=headers),
            ):
                error = refused(answer, 401)
                assert error["code"] == "invalid_api_key" and "secret" not in error["message"]
        assert server.client.post(PATH, json={"prompt": "1"}, headers={"Authorization": "Bearer secret"}).is_success
        assert server.client.get("/health").is_success and server.client.get("/").is_success
        assert server.outcomes() == {"ok": 1, "refused": 4}


def test_metrics_are_prometheus_text(server: Server) -> None:
    server.ask(n=5, steps=2)
    answer = server.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    values = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
    assert values['ditc_requests_total{outcome="ok"}'] == "1.0" and values["ditc_pictures_total"] == "5.0"
    assert values["ditc_picture_seconds_count"] == "5.0" and values["ditc_step_seconds_count"] == "4.0"
    assert values["ditc_batch_pictures_sum"] == "5.0" and values["ditc_queue_length"] == "0.0"
    assert float(values["process_resident_memory_bytes"]) > 1e6


def test_the_api_describes_itself(server: Server) -> None:
    document = server.client.get("/openapi.json").json()
    body = document["paths"][PATH]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(images_request.ImagesRequest.__annotations__) == set(body["properties"]) and body["required"] == [
        "prompt"
    ]
    bounds = {"type": "integer", "minimum": 1, "maximum": images_request.MOST_STEPS}
    assert body["properties"]["steps"]["anyOf"] == [bounds, {"type": "null"}]
    assert server.client.get("/docs").status_code == 404  # it would take its scripts from elsewhere


@pytest.mark.parametrize("path", PAGE)
def test_the_page_takes_nothing_from_elsewhere(path: str, server: Server) -> None:
    answer = server.client.get(path)
    assert answer.is_success and "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    kind = {"": "text/html", ".css": "text/css", ".js": "text/javascript"}[Path(path).suffix]
    assert answer.headers["content-type"].startswith(kind)
    assert not re.search(r"https?://|//[a-z]+\.", answer.text) and "style=" not in answer.text


def test_the_page_has_what_its_script_looks_for(server: Server) -> None:
    ids = set(re.findall(r' id="([\w-]+)"', server.client.get("/").text))
    used = set(re.findall(r'\bat\("([\w-]+)"\)', server.client.get("/page.js").text))
    assert used <= ids and ids - used <= {"download", "large-text"} | used


def test_the_report_is_the_bundle_s_and_runs_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "bundle/report/images"
    folder.mkdir(parents=True)
    (folder.parent / "index.html").write_text("<!doctype html><title>report</title>")
    (folder / "a.png").write_bytes(b"png")
    with served(tmp_path) as server:
        page = server.client.get("/report/")
        assert "<title>report" in page.text and page.headers["content-type"].startswith("text/html")
        assert page.headers["content-security-policy"].startswith("sandbox; default-src 'none'")
        assert server.client.get("/report/images/a.png").headers["content-type"] == "image/png"
        assert server.client.get("/v1/models").json()["data"][0]["ditc"]["report"] == "/report/"
        for name in ("nothing.html", "../config.json", "%2e%2e/config.json"):
            assert server.client.get(f"/report/{name}").status_code == 404
        (folder.parent / "index.html").write_text("<!doctype html><title>forged</title>")
        assert "differs from the manifest" in refused(server.client.get("/report/"), 500)["message"]


def test_examples_are_the_model_s(tmp_path: Path) -> None:
    generation = GENERATION | {"conditioning": DIGITS | {"examples": ["a 7"]}}
    with served(tmp_path, generation=generation) as server:
        assert server.client.get("/v1/models").json()["data"][0]["ditc"]["examples"] == ["a 7"]


def test_a_service_tells_when_it_is_likely_to_have_time(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        service: Service = server.service
        assert service.retry_after_s() == 1
