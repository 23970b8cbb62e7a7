"""A server in a process of its own: the official client, load, clients that leave, the end, the page in a browser."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from benchmarks.tools import browser
from pipeline import __main__ as cli
from pipeline.distance import psnr_db
from pipeline.serve.images_request import PATH
from pipeline.text_to_image import Pipeline
from tests.support import quick_build, tiny
from tests.support.serving import pixels, pixels_of
from tests.test_whole_way import GENERATION, SETTINGS

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
SIDE, CHANNELS, STEPS = 32, 3, 2
LONG = {"prompt": "1", "n": 10, "steps": 200}  # some seconds
KEY = "secret"
WAITED_S = 600  # on a machine that does much beside


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a DiT of one block with random weights, proven as any other."""
    folder = tmp_path_factory.mktemp("serve")
    config = tiny.DIT | {"in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 1, "sample_size": SIDE}
    conditioning = GENERATION["conditioning"] | {"examples": ["a 7", "digit 3"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.MODELS, "model", ("DiTTransformer2DModel", config))
        quick_build.measure_little(patch.setattr)
        model = tiny.folder("model", folder)
        (model / "generation.json").write_text(
            json.dumps(GENERATION | {"n_steps": STEPS, "conditioning": conditioning})
        )
        settings = [flag for setting in SETTINGS for flag in ("--set", setting)]
        flags = [
            "--engine",
            "pixart_w4a6",
            "-m",
            str(model),
            *settings,
            "--target",
            "cpu",
            "-o",
            str(folder / "engine"),
        ]
        assert cli.main(["build", *flags]) == 0
    return folder / "engine"


@dataclass
class Process:
    """A server that is ready."""

    process: subprocess.Popen[str]
    address: str

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=KEY, max_retries=0, timeout=WAITED_S)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.address + path) as answer:
            return str(answer.read().decode())

    def metrics(self) -> dict[str, float]:
        rows = (line.rsplit(" ", 1) for line in self.get("/metrics").splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in rows}

    def outcomes(self) -> dict[str, int]:
        prefix = 'ditc_requests_total{outcome="'
        values = {
            name.removeprefix(prefix)[:-2]: int(x) for name, x in self.metrics().items() if name.startswith(prefix)
        }
        return {name: count for name, count in values.items() if count}

    def until(self, name: str, least: float) -> None:
        """Wait for a metric to reach a value."""
        end = time.monotonic() + WAITED_S
        while self.metrics()[name] < least:
            assert time.monotonic() < end, (name, self.metrics())
            time.sleep(0.02)

    def connect(self, **fields: Any) -> socket.socket:
        """A connection on which a request for pictures was sent."""
        host, _, port = self.address.removeprefix("http://").partition(":")
        body = json.dumps(fields)
        head = (
            f"POST {PATH} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
        )
        connection = socket.create_connection((host, int(port)))
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        return connection

    def end(self) -> tuple[int, str]:
        """Exit code and log, after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        _, log = self.process.communicate(timeout=WAITED_S)
        return self.process.returncode, log


# Where the compiler's packages are nowhere.
ALONE = (sys.executable, "-m", "tests.support.absent")


@contextlib.contextmanager
def started(
    bundle: Path, program: Sequence[str] = ALONE, flags: Sequence[str] = ("--threads", "1")
) -> Iterator[Process]:
    """The server, ready."""
    command = [*program, "serve", str(bundle), "--timeout", str(WAITED_S), "--port", "0", "--json", *flags]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"DITC_API_KEY": KEY}, **pipes)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        answer = json.loads(line)
        assert answer["event"] == "ready" and answer["address"].startswith("http://127.0.0.1:")
        yield Process(process, answer["address"])
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def server(bundle: Path) -> Iterator[Process]:
    with started(bundle) as process:
        yield process


# --- load ------------------------------------------------------------------------------------------------------------

CLIENTS, REQUESTS, PICTURES = 8, 100, 10
KILLED = {20: True, 70: False}  # which requests are not waited for, and whether they are streams
# The least that is left of a picture that is not forgotten: its latents, in float32.
BYTES_OF_A_PICTURE = 4 * CHANNELS * SIDE * SIDE


def fields_of(number: int) -> dict[str, Any]:
    """A request like no other."""
    return {"prompt": str(number % 10), "n": PICTURES, "seed": 100 * number, "steps": STEPS + number % 2}


def ask(server: Process, number: int) -> list[Any]:
    """The pictures of a request, one of them by its address; none of one whose client leaves half-way."""
    if number in KILLED:
        with server.connect(**LONG, stream=KILLED[number], partial_images=100 if KILLED[number] else 0) as connection:
            if KILLED[number]:
                assert b"200 OK" in connection.recv(100)  # the previews follow
            else:
                time.sleep(0.2)
        return []
    asked = fields_of(number)
    kind: Any = "url" if number % 7 == 0 else "b64_json"
    extra = {"seed": asked["seed"], "steps": asked["steps"]}
    answer = server.client().images.generate(
        prompt=asked["prompt"], n=asked["n"], size="32x32", response_format=kind, model="pixart_w4a6", extra_body=extra
    )
    assert [row.seed for row in answer.data] == [asked["seed"] + index for index in range(PICTURES)]
    if kind == "b64_json":
        return [pixels_of({"b64_json": row.b64_json}) for row in answer.data]
    files = [urllib.request.urlopen(row.url) for row in answer.data]
    return [pixels(file.read()) for file in files]


def test_a_hundred_requests_of_eight_clients_of_which_two_leave(bundle: Path, server: Process) -> None:
    """None is lost, none is mixed up, memory stays, and the metrics tell what has happened."""
    drawn: list[list[Any]] = []
    resident = []
    for first in (0, REQUESTS // 2):
        with ThreadPoolExecutor(CLIENTS) as pool:
            drawn += pool.map(lambda number: ask(server, number), range(first, first + REQUESTS // 2))
        metrics = server.metrics()
        resident.append(metrics["process_resident_memory_bytes"] - metrics["ditc_stored_bytes"])
    answered = [number for number in range(REQUESTS) if number not in KILLED]
    assert [number for number in range(REQUESTS) if len(drawn[number]) == PICTURES] == answered
    # An engine's pictures may differ by a few flipped codes from one batch size to another, as far as its gate allows.
    gates = json.loads((bundle / "report/parity.json").read_text())["gates"]
    [limit] = [gate["limit"] for gate in gates if gate["name"] == "cpu/final_psnr_db"]
    with Pipeline.load(bundle, threads=1) as pipeline:
        for number in answered:
            own = fields_of(number)
            images = pipeline(
                own["prompt"], num_images_per_prompt=PICTURES, seed=own["seed"], num_inference_steps=own["steps"]
            ).images
            for image, picture in zip(images, drawn[number], strict=True):
                assert psnr_db(np.asarray(image) / 255, picture / 255, 1.0) >= limit, number
    # Which is less than what pictures of different requests differ by.
    firsts = [drawn[number][0] for number in answered]
    assert max(psnr_db(a / 255, b / 255, 1.0) for i, a in enumerate(firsts) for b in firsts[:i]) < limit
    # Less than if the second half of the requests had left their pictures behind.
    assert resident[1] - resident[0] < REQUESTS // 2 * PICTURES * BYTES_OF_A_PICTURE, resident
    server.until('ditc_requests_total{outcome="cancelled"}', len(KILLED))
    assert server.outcomes() == {"ok": len(answered), "cancelled": len(KILLED)}
    metrics = server.metrics()
    own, beside = len(answered) * PICTURES, len(KILLED) * LONG["n"]
    assert own <= metrics["ditc_pictures_total"] == metrics["ditc_picture_seconds_count"] < own + beside
    assert metrics["ditc_queue_length"] == 0
    code, log = server.end()
    assert code == 0 and "Traceback" not in log, log


def test_the_official_client_s_stream_and_errors(server: Process) -> None:
    client = server.client()
    stream = client.images.generate(prompt="7", stream=True, partial_images=3, extra_body={"seed": 5, "steps": 4})
    events = list(stream)
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image"] * 3 + ["completed"]
    again = client.images.generate(prompt="7", extra_body={"seed": 5, "steps": 4}).data[0]
    assert again.b64_json == events[-1].b64_json
    with pytest.raises(openai.BadRequestError, match="'horse' is not a class"):
        client.images.generate(prompt="horse")
    with pytest.raises(openai.NotFoundError, match="this server draws with pixart_w4a6"):
        client.images.generate(prompt="7", model="dall-e-2")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").images.generate(prompt="7")
    assert [model.id for model in client.models.list()] == ["pixart_w4a6"]
    assert "PASSED" in server.get("/report/index.html")


# --- the end ---------------------------------------------------------------------------------------------------------


def test_a_signal_under_load_loses_nothing(server: Process) -> None:
    def one(seed: int) -> int:
        return len(server.client().images.generate(prompt="1", n=10, extra_body={"steps": 200, "seed": seed}).data)

    with ThreadPoolExecutor(5) as pool:
        running = [pool.submit(one, seed) for seed in range(5)]
        server.until("ditc_batch_pictures_count", 1)
        server.until("ditc_queue_length", 5)  # the first one, too: most of its pictures wait for the next batch
        server.process.send_signal(signal.SIGTERM)
        state = ""
        while state != "draining":  # the address stays open meanwhile
            try:
                state = json.loads(server.get("/health"))["status"]
            except urllib.error.HTTPError as error:
                assert error.code == 503
                state = json.loads(error.read())["status"]
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            server.client().images.generate(prompt="1")
        assert [future.result() for future in running] == [10] * 5
    _, log = server.process.communicate(timeout=WAITED_S)
    assert server.process.returncode == 0 and "Traceback" not in log, log


def test_a_second_signal_ends_it_at_once(server: Process) -> None:
    # A job in the background ignores SIGINT, and so does a server that it starts.
    second = signal.SIGTERM if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else signal.SIGINT
    with contextlib.ExitStack() as connections:
        for seed in range(8):
            connections.enter_context(server.connect(**LONG, seed=seed))
        server.until("ditc_step_seconds_count", 1)
        server.process.send_signal(signal.SIGTERM)
        while '"draining"' not in health(server):
            time.sleep(0.02)
        server.process.send_signal(second)
        _, log = server.process.communicate(timeout=WAITED_S)
    assert server.process.returncode == 128 + second and "stopped at once" in log and "Traceback" not in log


def health(server: Process) -> str:
    try:
        return server.get("/health")
    except urllib.error.HTTPError as error:
        return str(error.read().decode())


def test_an_idle_server_ends_at_the_first_signal(server: Process) -> None:
    code, log = server.end()
    assert code == 0 and "Traceback" not in log


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_draws_in_a_browser(bundle: Path, server: Process, tmp_path: Path) -> None:
    executable = browser.browser()
    if executable is None:
        pytest.skip(f"no browser is installed: none of {', '.join(browser.BROWSERS)}")
    with browser.opened(executable) as tab:
        tab.show(1280, 800)
        tab.open(server.address + "/")
        tab.wait("!at('key-row').hidden && !at('error').hidden")  # it asks for the key
        tab.run(f"at('key').value = '{KEY}'; at('key').dispatchEvent(new Event('change'))")
        tab.wait("model !== null && at('error').hidden")
        assert tab.run("[...document.querySelectorAll('#examples button')].map(b => b.textContent)") == [
            "a 7",
            "digit 3",
        ]
        tab.run("at('prompt').value = '3'; at('seed').value = 8; at('count').value = 2; at('steps').value = 200")
        tab.run("at('draw').click()")
        tab.wait("document.querySelector('figure.unfinished img[src]') && at('status').textContent.startsWith('step')")
        tab.wait("!running && document.querySelectorAll('figure img').length === 2")
        rows = tab.run("[...document.querySelectorAll('figure img')].map(image => image.src)")
        with Pipeline.load(bundle, threads=1) as pipeline:
            images = pipeline("3", seed=8, num_images_per_prompt=2, num_inference_steps=200).images
        for row, image in zip(rows, images, strict=True):
            np.testing.assert_array_equal(pixels(base64.b64decode(row.partition(",")[2])), np.asarray(image))
        assert tab.run("document.querySelector('figcaption span').textContent") == "seed 8"
        tab.run("document.querySelector('figure button').click()")
        tab.wait("at('large').open && at('large-text').textContent === '3, seed 8'")
        tab.run("at('close').click(); at('count').value = 10; at('steps').value = 200; at('draw').click()")
        tab.wait("document.querySelector('figure.unfinished img[src]')")
        tab.run("at('stop').click()")
        tab.wait("!running && at('status').textContent === 'stopped'")
        assert tab.run("document.querySelectorAll('figure').length") == 2
        server.until('ditc_requests_total{outcome="cancelled"}', 1)
        for width, height, scheme in (
            (1280, 800, "light"),
            (1280, 800, "dark"),
            (390, 844, "light"),
            (390, 844, "dark"),
        ):
            tab.show(width, height, scheme)
            tab.screenshot(tmp_path / f"{width}-{scheme}.png")
            picture = pixels((tmp_path / f"{width}-{scheme}.png").read_bytes())
            assert (picture[5, 5, :3].mean() < 128) == (scheme == "dark")
            assert tab.run("document.documentElement.scrollWidth <= innerWidth"), f"it scrolls sideways at {width}"
        tab.run("at('prompt').value = 'horse'; at('draw').click()")
        tab.wait("at('error').textContent.includes('is not a class')")
        refusals = [text for text in tab.complaints if "status of 401" not in text and "status of 400" not in text]
        assert not refusals
