"""The command: flags, refusals, and a server in this process from its first line to its end."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.errors import EnvironmentLacksError, RecipeError
from pipeline import machine
from pipeline.generate.pixel_model import PixelModel
from pipeline.serve.__main__ import KEY_VARIABLE, find_key, find_scale, listening, main, make_limits, make_parser
from pipeline.serve.images_request import PATH
from pipeline.serve.scale import Scale
from pipeline.text_to_image import Pipeline
from tests.generate.test_generate import GENERATION, make_bundle
from tests.support.serving import WAITED_S, Asking


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--queue", "0"], "--queue 0; use 1 to 1000"),
        (["--batch-size", "5"], "--batch-size 5; use 1 to 4, the largest that engines are built for"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--timeout", "0"], "--timeout 0; use seconds"),
        (["--timeout", "nan"], "--timeout nan"),
        (["--port", "65536"], "--port 65536; use 1 to 65535"),
        (["--host", "no such host"], "--host no such host --port 8000 cannot be listened at"),
        (["--replicas", "2"], "--replicas without --ray"),
        (["--cpus-per-replica", "2"], "--cpus-per-replica without --ray"),
        (["--gpus-per-replica", "0"], "--gpus-per-replica without --ray"),
        (["--ray-address", "a:1"], "--ray-address without --ray"),
        (["--ray", "--threads", "2"], "--threads 2 with --ray; say --cpus-per-replica"),
        (["--ray", "--replicas", "0"], "--replicas 0; use a number from 1 to 1000"),
        (["--ray", "--replicas", "4:2"], "--replicas 4:2; use a number"),
        (["--ray", "--replicas", "1:"], "--replicas 1:; use a number"),
        (["--ray", "--replicas", "2001"], "--replicas 2001"),
        (["--ray", "--replicas", "\u0662"], "--replicas \u0662"),
        (["--ray", "--cpus-per-replica", "0"], "--cpus-per-replica 0; use 1 to 1000"),
        (["--ray", "--gpus-per-replica", "nan"], "--gpus-per-replica nan"),
        (["--api-key", ""], "the API key is empty"),
        (["--api-key", "a b"], "characters that a header may not have"),
    ],
)
def test_wrong_flags_are_refused_before_the_engine_is_loaded(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "nothing"), *flags]) == RecipeError.exit_code
    shown = capsys.readouterr()
    assert words in shown.err and "Traceback" not in shown.err and not shown.out


def test_an_address_in_use_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["nothing", "--port", str(port)]) == RecipeError.exit_code
    assert f"--host 127.0.0.1 --port {port} cannot be listened at (Address already in use)" in capsys.readouterr().err


@pytest.mark.parametrize("missing", machine.SERVER)
def test_the_extra_is_named_where_it_lacks(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "find_spec", lambda name: None if name == missing else object())
    assert main(["nothing"]) == EnvironmentLacksError.exit_code
    assert f"serving needs {missing}; install with: pip install 'ditc[serve]'" in capsys.readouterr().err


def test_ray_is_named_where_it_lacks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "find_spec", lambda name: None if name == "ray" else object())
    assert main(["nothing", "--ray"]) == EnvironmentLacksError.exit_code
    assert "serving with --ray needs ray; install with: pip install 'ditc[ray]'" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "kept"), [([], None), (["--keep-loaded"], True), (["--no-keep-loaded"], False)])
def test_parts_are_kept_by_memory_unless_it_is_said(flags: list[str], kept: bool | None) -> None:
    assert make_parser().parse_args(["bundle", *flags]).keep_loaded is kept


def test_how_many_replicas() -> None:
    def scale(*flags: str) -> Scale | None:
        return find_scale(make_parser().parse_args(["bundle", *flags]))

    assert scale() is None and scale("--ray") == Scale(1, 1, 1, 0.0)
    fixed = scale("--ray", "--replicas", "3", "--cpus-per-replica", "2", "--gpus-per-replica", "0.5")
    assert fixed is not None and fixed.options == {
        "max_ongoing_requests": 1, "ray_actor_options": {"num_cpus": 2, "num_gpus": 0.5}, "num_replicas": 3
    }  # fmt: skip
    by_load = scale("--ray", "--replicas", "2:5")
    assert by_load is not None and "num_replicas" not in by_load.options
    follows: Any = by_load.options["autoscaling_config"]
    assert (follows["min_replicas"], follows["max_replicas"], follows["target_ongoing_requests"]) == (2, 5, 1)


def test_a_bundle_that_draws_no_pixels_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "pipeline.text_to_image.load", lambda *_: make_bundle(tmp_path, GENERATION | {"output": "latents"})
    )
    assert main(["bundle", "--port", "0"]) == RecipeError.exit_code
    assert "text encoder and VAE" in capsys.readouterr().err


def test_the_key_comes_from_the_flag_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(*flags: str) -> str | None:
        return find_key(make_parser().parse_args(["bundle", *flags]))

    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert key() is None and key("--api-key", "a") == "a"
    monkeypatch.setenv(KEY_VARIABLE, "b")
    assert key() == "b" and key("--api-key", "a") == "a"


def test_only_this_machine_is_served_unless_asked() -> None:
    args = make_parser().parse_args(["bundle"])
    assert args.host == "127.0.0.1" and make_limits(args).queue == 64
    with listening("127.0.0.1", 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_from_the_first_line_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server has the main thread, as in a process of its own; the client is beside it, and sends the signal."""
    bundle = make_bundle(tmp_path)
    monkeypatch.setattr(Pipeline, "load", classmethod(lambda cls, *_: cls(PixelModel(bundle), bundle)))
    with listening("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"

    def visit() -> Any:
        try:
            wait(lambda: get(f"{address}/health"))
            body = json.dumps({"prompt": "7", "seed": 3}).encode()
            asked = urllib.request.Request(address + PATH, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(asked) as answer:
                return json.load(answer)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    visitor = Asking(visit)
    assert main([str(bundle.path), "--port", str(port)]) == 0
    assert visitor.result()["data"][0]["seed"] == 3
    assert capsys.readouterr().out == f"digits is served at {address}\n"
    assert bundle.engine().closed and signal.getsignal(signal.SIGTERM) is before
    assert not [thread for thread in threading.enumerate() if thread.name == "draw"]


def get(address: str) -> str:
    with urllib.request.urlopen(address) as answer:
        return str(answer.read().decode())


def wait(ready: Callable[[], object]) -> None:
    """Until it answers."""
    end = time.monotonic() + WAITED_S
    while True:
        try:
            ready()
            return
        except OSError:
            if time.monotonic() > end:
                raise
        time.sleep(0.02)
