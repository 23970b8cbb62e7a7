"""SIGINT and SIGTERM: a sentence, exit codes 130 and 143, no stack trace however often they come."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from export.errors import RecipeError
from pipeline.bundle.stages import WorkFolder
from pipeline.command import judge
from pipeline.files import lock
from pipeline.signals import Terminated, heeded, leave

ROOT = Path(__file__).parents[2]
# A verb that waits, cleans up slowly when it is stopped, and has a worker thread at its end.
VERB = """
import sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pipeline.command import parser, run
from pipeline.signals import leave

def work(args, answer):
    try:
        answer.line("ready")
        time.sleep(60)
    finally:
        answer.line("cleaning")
        time.sleep(float(sys.argv[1]))
        pool.submit(time.sleep, float(sys.argv[2]))
    return 0

pool = ThreadPoolExecutor()
leave(lambda: run(parser("test", "A verb."), work, [], verdict=True))
"""


def heed_ctrl_c() -> None:
    """Undo an ignored SIGINT, which a process inherits from a shell that runs the tests in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def started(cleaning_s: float, threads_s: float) -> subprocess.Popen[str]:
    """The verb, when it has said that it is ready."""
    command = [sys.executable, "-c", VERB, str(cleaning_s), str(threads_s)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, preexec_fn=heed_ctrl_c, **pipes)  # noqa: PLW1509 - one thread
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.process
@pytest.mark.parametrize(
    ("number", "code", "words"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_ends_in_a_sentence(number: signal.Signals, code: int, words: str) -> None:
    process = started(0, 0)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and out == f"cleaning\nFAILED {words}\n"
    assert "Traceback" not in err and err.rstrip().endswith(f"error: {words}")


@pytest.mark.process
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_it_at_once(second: signal.Signals) -> None:
    process = started(60, 0)
    process.send_signal(signal.SIGTERM)
    assert process.stdout and process.stdout.readline() == "cleaning\n"
    before = time.monotonic()
    process.send_signal(second)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + second and time.monotonic() - before < 30
    assert "Traceback" not in err and "stopped at once" in err


@pytest.mark.process
def test_a_signal_while_the_interpreter_waits_for_its_threads() -> None:
    process = started(0, 60)
    process.send_signal(signal.SIGINT)
    assert process.stdout and process.stdout.read(len("cleaning\nFAILED interrupted\n"))
    time.sleep(0.5)  # from here on the interpreter joins the thread
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode in (-signal.SIGINT, 130) and "Traceback" not in err


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with heeded(), heeded():
        assert signal.getsignal(signal.SIGTERM) is not before[1]
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with heeded():
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_exit_codes() -> None:
    assert judge(Terminated()) == (143, "terminated") and judge(KeyboardInterrupt()) == (130, "interrupted")
    assert leave.__module__ == "pipeline.signals"


# --- two builds at once --------------------------------------------------------------------------------------------


def test_the_loser_of_two_builds_is_told_which_process_holds_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "e.partial"
    with WorkFolder(path, "key"):
        for flags in ({}, {"resume": True}, {"force": True}):
            with pytest.raises(RecipeError, match=r"another build.* is writing .*wait for it, stop it") as refusal:
                WorkFolder(path, "key", **flags).__enter__()
            if Path("/proc/locks").is_file():
                assert f"(process {os.getpid()})" in str(refusal.value)
        assert (path / "key.json").is_file(), "the winner's folder is as it was"


def test_a_folder_that_its_holder_removed_is_not_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "e.partial"
    folder.mkdir()
    opened = os.open

    def removed_meanwhile(path: Path, flags: int) -> int:
        descriptor = opened(path, flags)
        folder.rmdir()
        return descriptor

    monkeypatch.setattr(os, "open", removed_meanwhile)
    with pytest.raises(RecipeError, match="run the command again"):
        lock(folder, "build")
