"""A build killed at any stage leaves no half bundle, and resumes to the same bytes as a build that was left alone."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TextIO

import pytest

from pipeline import __main__ as cli
from pipeline import load
from pipeline.backends.tensorrt.plan_file import read_engine_file
from pipeline.calibrate import __main__ as calibrate
from tests.support import quick_build, tiny

STAGES = ("calibrate", "export", "cpu", "onnx", "verify", "bench")
FLAGS = ["--engine", "pixart_w4a6", "--target", "cpu", "--n-steps", "3", "--json"]
SETTINGS = ["--set", "method=rtn", "--set", "weights.group_size=32"]
FLAGS += SETTINGS
# (stage, signal at its start, exit code, what the answer says): all stages once killed, and two stopped politely.
KILLED = {stage: (stage, signal.SIGKILL, -signal.SIGKILL, "") for stage in STAGES}
STOPS = (
    KILLED["calibrate"],
    ("export", signal.SIGINT, 130, "run the same command again with --resume"),
    KILLED["export"],
    ("cpu", signal.SIGTERM, 143, "terminated; state saved in"),
    *(KILLED[stage] for stage in STAGES[2:]),
)
# What may differ between two builds: when it was, how long it took, and files that hold measured times.
TIMES = ("created", "stages")
TIMED_FILES = ("bench.json", "report/index.html")
ENGINE = "rtx/model.engine"

pytestmark = [pytest.mark.torch, pytest.mark.slow]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder("pixart", tmp_path_factory.mktemp("models"))


# Every build is a process of its own, forked off a server that has imported what a build takes: importing it again
# would take longer than the build.
SERVER = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    SERVER.set_forkserver_preload(list(quick_build.IMPORTED))


@contextlib.contextmanager
def started(model: Path, output: Path, *extra: str) -> Iterator[tuple[BaseProcess, TextIO, Path]]:
    """A build: its process, its answers and the file of its log; it has ended behind the block."""
    reader, writer = SERVER.Pipe(duplex=False)
    log = output.parent.with_suffix(".log")
    args = [*FLAGS, "-m", str(model), "-o", str(output), *extra]
    process = SERVER.Process(target=quick_build.answering, args=(writer, log, args))
    process.start()
    writer.close()
    try:
        with open(os.dup(reader.fileno()), encoding="utf-8") as answers:
            yield process, answers, log
        process.join(timeout=600)
    finally:
        process.kill()
        reader.close()


def build(model: Path, output: Path, *extra: str) -> list[dict[str, Any]]:
    """Run a build to its end; returns its events."""
    with started(model, output, *extra) as (process, answers, log):
        events = [json.loads(line) for line in answers]
    assert process.exitcode == 0, log.read_text()
    return events


def stop_at(stage: str, sign: signal.Signals, model: Path, output: Path, *extra: str) -> tuple[int | None, str]:
    """Start a build, send it a signal when it reports the start of `stage`; returns exit code and remaining stdout."""
    with started(model, output, *extra) as (process, answers, _):
        for line in answers:
            event = json.loads(line)
            if event.get("name") == stage and event["status"] == "started":
                assert process.pid
                os.kill(process.pid, sign)
                break
        rest = answers.read()
    return process.exitcode, rest


def content(bundle: Path) -> dict[str, bytes]:
    files = {path.relative_to(bundle).as_posix(): path for path in bundle.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name not in (*TIMED_FILES, "manifest.json")}


def timeless(bundle: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    for name in TIMED_FILES:
        document["files"][name] = "timed"
    document["bytes"].pop("all_files")
    names = [stage["name"] for stage in document["stages"]]
    return {key: value for key, value in document.items() if key not in TIMES} | {"stage names": names}


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "engines/e"
    events = build(model, output)
    assert events[-1] == {"event": "result", "passed": True, "exit_code": 0, "path": str(output)}
    finished = [event["name"] for event in events if event.get("status") == "finished"]
    assert finished == ["model", *STAGES]
    return output


def test_stopped_at_every_stage_in_turn(
    model: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed in each stage; and interrupted in one, terminated in another, which save the state and say so."""
    output = tmp_path / "engines/e"
    for stage, sign, exit_code, said in STOPS:
        code, rest = stop_at(stage, sign, model, output, "--resume")
        assert code == exit_code, f"the build ended before {stage}"
        assert not output.exists() and (tmp_path / "engines/e.partial").exists()
        if said:
            last = json.loads(rest.splitlines()[-1])
            assert last["passed"] is False and said in last["reason"]
    assert cli.main(["build", *FLAGS, "-m", str(model), "-o", str(output)]) == 2
    assert "holds an interrupted build" in capsys.readouterr().out
    events = build(model, output, "--resume")
    resumed = [event["name"] for event in events if event.get("status") == "resumed"]
    assert resumed == list(STAGES[:-1]), "finished stages are not done again"
    assert sorted(path.name for path in output.parent.iterdir()) == ["e"]
    assert content(output) == content(undisturbed)
    assert timeless(output) == timeless(undisturbed)
    assert "Speed and memory" in (output / "report/index.html").read_text(encoding="utf-8")
    load(output)


def test_an_rtx_build_killed_in_its_stages_ends_in_the_same_engine(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install tensorrt-rtx")
    only, whole, output = ("--target", "rtx", "--target-sm", "89"), tmp_path / "whole/e", tmp_path / "engines/e"
    build(model, whole, *only)
    for stage in ("rtx", "verify"):
        code, _ = stop_at(stage, signal.SIGKILL, model, output, *only, "--resume")
        assert code == -signal.SIGKILL, f"the build ended before {stage}"
        assert not output.exists()
    events = build(model, output, *only, "--resume")
    assert "rtx" in [event["name"] for event in events if event.get("status") == "resumed"]
    files, expected = content(output), content(whole)
    files.pop(ENGINE), expected.pop(ENGINE)
    assert files == expected
    same_engine(output / ENGINE, whole / ENGINE)


def same_engine(one: Path, other: Path) -> None:
    """Size, tensors and steps. TensorRT-RTX's builder numbers some of its own objects in no fixed order: two engines of
    one graph may differ in a few bytes, 6 of 5.6 million were seen here."""
    first, second = read_engine_file(one), read_engine_file(other)
    assert replace(first, path=other) == second


def test_killed_while_replacing_keeps_the_old_bundle(model: Path, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "engines/e"
    shutil.copytree(undisturbed, output)
    before = content(output)
    code, _ = stop_at("verify", signal.SIGKILL, model, output, "--force", "--seed", "1")
    assert code == -signal.SIGKILL
    assert content(output) == before
    load(output)


def test_a_bundle_verifies_again(undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(undisturbed)
    assert cli.main(["verify", str(undisturbed), "-o", str(tmp_path / "report")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == f"PASSED {undisturbed}" and any(line.startswith("ok    cpu/gemm_exact = 0") for line in shown)
    assert any(line.startswith("ok    onnx/operands_exact = 0") for line in shown)
    assert (tmp_path / "report/index.html").is_file() and content(undisturbed) == before


def test_a_build_from_a_checkpoint_is_the_build_that_calibrates(
    model: Path,
    undisturbed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quick_build.measure_little(monkeypatch.setattr)
    layers, steps = tmp_path / "layers", "sampling.n_steps=3"
    calibration = ["--engine", "pixart_w4a6", "-m", str(model), "-o", str(layers), "--set", steps, *SETTINGS]
    assert calibrate.main(calibration) == 0
    build_here = ["build", *FLAGS, "-m", str(model), "--checkpoint"]
    assert cli.main([*build_here, str(layers), "-o", str(tmp_path / "e")]) == 0
    assert content(tmp_path / "e") == content(undisturbed)
    assert cli.main([*build_here, str(model), "-o", str(tmp_path / "f")]) == 2
    assert "holds no finished calibration" in capsys.readouterr().err and not (tmp_path / "f").exists()


def test_an_engine_of_another_portable_model_is_found(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The manifest is made to agree with a changed engine: only lowering again shows that it was swapped."""
    bundle = tmp_path / "e"
    shutil.copytree(undisturbed, bundle)
    data = bytearray((bundle / "cpu/model.onnx.data").read_bytes())
    data[1000] ^= 1
    (bundle / "cpu/model.onnx.data").write_bytes(data)
    document = json.loads((bundle / "manifest.json").read_text())
    document["files"]["cpu/model.onnx.data"]["sha256"] = hashlib.sha256(data).hexdigest()
    (bundle / "manifest.json").write_text(json.dumps(document))
    load(bundle)
    assert cli.main(["verify", str(bundle)]) == 2
    assert "lowers to another model.onnx.data than was built" in capsys.readouterr().out
