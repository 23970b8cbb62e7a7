"""Independent work in threads: results in order, errors raised, unfinished work stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import progress as threads_of
from pipeline.backends.cuda.overflow import _sizes
from pipeline.backends.reference import ReferenceEngine
from pipeline.backends.side_by_side import side_by_side
from pipeline.generate.case import Case
from pipeline.progress import StoppedError, raise_if_stopped, track
from pipeline.verify.calls import _at_once, _Repeats
from pipeline.verify.extremes import extreme_results, read_by_quantizers
from pipeline.verify.probe import Beside, ProbedGraph
from tests.cli.test_signals import ROOT
from tests.support.hand_lowered import linear, lower


def slow(value: int) -> int:
    time.sleep(0.05 * (3 - value))
    return value


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_results_come_in_the_order_of_the_work(threads: int) -> None:
    assert side_by_side([partial(slow, value) for value in range(3)], threads) == [0, 1, 2]


def test_an_error_is_raised_and_ends_the_others() -> None:
    steps: list[int] = []

    def long() -> None:
        for step in track(range(500), 500, "steps"):
            steps.append(step)
            time.sleep(0.01)

    def wrong() -> None:
        time.sleep(0.05)
        raise ValueError("no such layer")

    with pytest.raises(ValueError, match="no such layer"):
        side_by_side([long, wrong], 2)
    assert 0 < len(steps) < 500


def test_pytorch_has_its_threads_again_afterwards() -> None:
    before = torch.get_num_threads()
    assert side_by_side([torch.get_num_threads] * 2, 2) == [1, 1]
    assert torch.get_num_threads() == before


def test_nothing_stops_outside() -> None:
    raise_if_stopped()
    assert list(track(range(3), 3, "steps")) == [0, 1, 2]


# --- signals --------------------------------------------------------------------------------------------------------


# A verb whose two threads work for a minute, in steps, and one that waits for them.
VERB = """
import threading, time
from functools import partial
from pipeline.command import parser, run
from pipeline.progress import track
from pipeline.backends.side_by_side import side_by_side
from pipeline.signals import leave

def long(both, begun):
    both.wait()
    begun()
    for step in track(range(6000), 6000, "steps"):
        time.sleep(0.01)

def work(args, answer):
    both = threading.Barrier(2)
    side_by_side([partial(long, both, partial(answer.line, "begun")), partial(long, both, int)], 2)
    return 0

leave(lambda: run(parser("test", "A verb."), work, [], verdict=True))
"""


# The same, but the kernel gives the signal to a thread that works, and nothing wakes the one that waits.
HEARD_ELSEWHERE = (
    VERB.replace("import threading, time", "import signal, threading, time")
    .replace(
        "    begun()\n",
        "    begun()\n    time.sleep(0.5)\n    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)\n",
    )
    .replace("partial(long, both, int)", "partial(both.wait)")
)


@pytest.mark.process
def test_a_signal_that_another_thread_gets_ends_all() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HEARD_ELSEWHERE], cwd=ROOT, capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 143 and done.stdout == "begun\nFAILED terminated\n"


# A second signal while the first waits for work that does not look up.
TWICE = HEARD_ELSEWHERE.replace(
    "signal.pthread_kill(threading.get_ident(), signal.SIGTERM)",
    "signal.pthread_kill(threading.get_ident(), signal.SIGTERM); time.sleep(1); "
    "signal.pthread_kill(threading.get_ident(), signal.SIGTERM); time.sleep(60)",
)


@pytest.mark.process
def test_a_second_signal_that_another_thread_gets_ends_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TWICE], cwd=ROOT, capture_output=True, text=True, check=False, timeout=40
    )
    assert done.returncode == 143 and done.stderr.endswith("stopped at once\n") and "Traceback" not in done.stderr


@pytest.mark.process
def test_a_signal_ends_all_threads() -> None:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", VERB], cwd=ROOT, **pipes) as process:
        try:
            assert process.stdout and process.stdout.readline() == "begun\n"
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=30)  # half of what is left of their work
        finally:
            process.kill()
    assert process.returncode == 143 and out == "FAILED terminated\n"
    assert "Traceback" not in err and err.rstrip().endswith("error: terminated")


def test_a_signal_before_all_have_begun_ends_those_that_have() -> None:
    steps: list[int] = []

    def long() -> None:
        for step in track(range(500), 500, "steps"):
            steps.append(step)
            time.sleep(0.01)

    class Interrupted(list[Callable[[], None]]):
        def __iter__(self) -> Iterator[Callable[[], None]]:
            yield long
            while not steps:
                time.sleep(0.001)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        side_by_side(Interrupted([long, long]), 2)
    assert 0 < len(steps) < 500


# --- what takes long stops ------------------------------------------------------------------------------------------


def reference(_: Path) -> None:
    ReferenceEngine(torch.nn.Linear(2, 2)).run({"input": np.zeros((1, 2), np.float32)})


def lowered_graph(folder: Path) -> None:
    ProbedGraph(lower([linear("a", 96, 64, 1)], folder / "hand.onnx")).denoiser()({"x": np.zeros((2, 64), np.float32)})


def drawing(_: Path) -> None:
    one = np.zeros((1, 1, 2, 2), np.float32)
    Case(("",), ({}, {}), one, "flow_euler", 1000.0, 2, 1.0, "pixels").draw(lambda inputs: {"sample": one})


def extremes(folder: Path) -> None:
    layers = [linear("a", 96, 64, 1)]
    graph, call = ProbedGraph(lower(layers, folder / "hand.onnx")), {"x": np.zeros((2, 64), np.float32)}
    extreme_results(graph, layers, Beside(0, read_by_quantizers(graph, layers), arrays=call), call)


def probes(folder: Path) -> None:
    graph = ProbedGraph(lower([linear("a", 96, 64, 1)], folder / "hand.onnx"))
    list(graph.probes(["a"], [{"x": np.zeros((2, 64), np.float32)}]))


def overflow(_: Path) -> None:
    module: Any = SimpleNamespace(start=lambda inputs: {}, inputs=[], steps=[None])
    list(_sizes(module, {}))


def callers(_: Path) -> None:
    """The two who call at once are threads of their own."""
    call: Any = SimpleNamespace(inputs={})
    _at_once([call, call], _Repeats(lambda inputs: {"sample": np.zeros(1)}, 0).run, 2)


def test_a_caller_that_cannot_begin_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    call: Any = SimpleNamespace(inputs={})
    submit, begun = ThreadPoolExecutor.submit, list[object]()

    def once(pool: ThreadPoolExecutor, *work: Any) -> Any:
        begun.append(work)
        if len(begun) == 2:
            raise RuntimeError("can't start new thread")
        return submit(pool, *work)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", once)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        _at_once([call, call], _Repeats(lambda inputs: {"sample": np.zeros(1)}, 0).run, 2)


@pytest.mark.torch
@pytest.mark.parametrize("work", [reference, lowered_graph, drawing, extremes, probes, overflow, callers])
def test_long_work_stops_where_nobody_waits_for_it(
    work: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = threading.Event()
    stop.set()
    monkeypatch.setattr(threads_of._thread, "stops", (stop,), raising=False)
    with pytest.raises(StoppedError):
        work(tmp_path)


def test_work_inside_of_work_ends_with_it() -> None:
    ended: list[float] = []

    def inner() -> None:
        started = time.monotonic()
        try:
            for _ in track(range(500), 500, "steps"):
                time.sleep(0.01)
        finally:
            ended.append(time.monotonic() - started)

    def wrong() -> None:
        time.sleep(0.05)
        raise ValueError("no such layer")

    with pytest.raises(ValueError, match="no such layer"):
        side_by_side([lambda: side_by_side([inner, inner], 2), wrong], 2)  # type: ignore[list-item, return-value]
    assert len(ended) == 2 and max(ended) < 5
