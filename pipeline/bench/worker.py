"""One contestant in a process of its own, asked by lines of JSON; `python -m pipeline.bench.worker` is the process.

Each line on stdin is a command, each line on stdout its answer; whatever libraries print goes to stderr. Arrays are
handed over as files. A process whose stdin ends, because who started it is gone, ends too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import NotRequired, TextIO

import numpy as np
from typing_extensions import TypedDict

from export.errors import UserError
from pipeline import machine
from pipeline.backends.base import Arrays
from pipeline.bench.convert import FloatModel, how_it_ended
from pipeline.bench.runners import RUNTIMES, Runner, Spec
from pipeline.generate.case import Case

# What opens, compiles or calls longer than this is given up; torch.compile takes minutes on a slow machine.
TIMEOUT_S = 1800.0


class Answer(TypedDict):
    """s: seconds that the command itself took. peak_rss_bytes: of the process so far. failed: why it did nothing."""

    s: NotRequired[float]
    peak_rss_bytes: NotRequired[int]
    failed: NotRequired[str]


class WorkerError(Exception):
    """A contestant's process failed; the message says how, in its last words."""


# --- arrays in files ------------------------------------------------------------------------------------------------


def save_arrays(path: Path, arrays: Mapping[str, object]) -> Path:
    """Write named arrays."""
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def load_arrays(path: Path) -> Arrays:
    """As `save_arrays` wrote them."""
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


PROMPTED, PLAIN, NOISE, REST = "prompted.", "plain.", "noise", "rest"


def save_case(path: Path, case: Case) -> Path:
    """Write what is drawn: arrays, and the rest as JSON in an array of text."""
    prompted, plain = case.conditioning
    rest = {key: getattr(case, key) for key in ("prompts", "sampler", "timestep_scale", "n_steps", "guidance_scale")}
    text = json.dumps({**rest, "output": case.output, "shared": sorted(case.shared), "size": case.size})
    parts = [(PROMPTED, prompted), (PLAIN, plain)]
    arrays = {f"{prefix}{name}": value for prefix, part in parts for name, value in part.items()}
    return save_arrays(path, {**arrays, NOISE: case.noise, REST: np.array(text)})


def load_case(path: Path) -> Case:
    """As `save_case` wrote it."""
    arrays = load_arrays(path)
    rest = json.loads(str(arrays[REST]))
    prompted, plain = (
        {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
        for prefix in (PROMPTED, PLAIN)
    )
    rest |= {"prompts": tuple(rest["prompts"]), "shared": frozenset(rest["shared"])}
    rest["size"] = rest["size"] and tuple(rest["size"])
    return Case(conditioning=(prompted, plain), noise=arrays[NOISE], **rest)


# --- who asks -------------------------------------------------------------------------------------------------------


class Worker:
    """A process with one contestant, opened when this returns; `opened` is its answer to that.

    Raises WorkerError, as all of its methods do, if the process fails.
    """

    def __init__(self, spec: Spec, inputs: Path, log: Path, timeout_s: float = TIMEOUT_S) -> None:
        """inputs: of the first calls, a file of `save_arrays`. log: what the process writes to stderr goes there."""
        self.log, self.timeout_s = log, timeout_s
        # OpenMP, which PyTorch's compiled kernels and others use, reads its number of threads when it is loaded.
        environment = {**os.environ, "OMP_NUM_THREADS": str(spec.threads)}
        with log.open("w", encoding="utf-8") as words:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.bench.worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words, text=True, encoding="utf-8",
                env=environment,
            )  # fmt: skip
        self.opened = self._ask(do="open", spec=asdict(spec), inputs=str(inputs))

    def feed(self, inputs: Path) -> Answer:
        """Later calls take these inputs."""
        return self._ask(do="feed", inputs=str(inputs))

    def call(self, forget: bool = False, output: Path | None = None) -> Answer:
        """Time one call. forget: with nothing kept of the condition. output: file for its outputs, None for no file."""
        return self._ask(do="call", forget=forget, output=None if output is None else str(output))

    def draw(self, case: Path) -> Answer:
        """Time the pictures of a file of `save_case`, the condition not kept."""
        return self._ask(do="draw", case=str(case))

    def _ask(self, **command: object) -> Answer:
        assert self.process.stdin is not None and self.process.stdout is not None
        overdue = threading.Timer(self.timeout_s, self.process.kill)
        overdue.start()
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            in_time = overdue.is_alive()
            overdue.cancel()
        if not line:
            self.close()
            late = "" if in_time else f"it took more than {self.timeout_s:g} s; "
            raise WorkerError(f"{late}{how_it_ended(self.process.returncode, self.log)}")
        answer: Answer = json.loads(line)
        if "failed" in answer:
            self.close()
            raise WorkerError(answer["failed"])
        return answer

    def close(self) -> None:
        """End the process, at once where a call of it is under way."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None and not pipe.closed:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue  # it has ended by itself
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


# --- the process ----------------------------------------------------------------------------------------------------


class Server:
    """What the process does with commands."""

    def __init__(self) -> None:
        self.runner: Runner | None = None
        self.inputs: Arrays = {}
        self.timed_calls = 0

    def answer(self, command: dict[str, object]) -> Answer:
        """Do one command."""
        name = str(command["do"])
        seconds = {"open": self._open, "feed": self._feed, "call": self._call, "draw": self._draw}[name](command)
        return {"s": seconds, "peak_rss_bytes": machine.peak_memory_bytes()}

    def _open(self, command: dict[str, object]) -> float:
        spec = _spec(command["spec"])
        runtime = RUNTIMES[spec.runtime]
        for module in runtime.imports:
            import_module(module)
        self._feed(command)
        started = time.perf_counter()
        self.runner = runtime.open(spec, self.inputs)
        return time.perf_counter() - started

    def _feed(self, command: dict[str, object]) -> float:
        self.inputs = load_arrays(Path(str(command["inputs"])))
        return 0.0

    def _call(self, command: dict[str, object]) -> float:
        assert self.runner is not None
        if command["forget"]:
            self.runner.forget()
        inputs = self.inputs if command["output"] is not None else self._next_step()
        started = time.perf_counter()
        outputs = self.runner.run(inputs)
        seconds = time.perf_counter() - started
        if command["output"] is not None:
            save_arrays(Path(str(command["output"])), outputs)
        return seconds

    def _next_step(self) -> Arrays:
        """The inputs at a timestep that no call had before, though it differs by units in the last place: each step of
        a picture has its own, and engines keep what they computed for one."""
        self.timed_calls += 1
        timestep = self.inputs.get("timestep")
        if timestep is None:
            return self.inputs
        return self.inputs | {"timestep": timestep + self.timed_calls * np.spacing(np.abs(timestep))}

    def _draw(self, command: dict[str, object]) -> float:
        assert self.runner is not None
        case = load_case(Path(str(command["case"])))
        self.runner.forget()
        started = time.perf_counter()
        case.draw(self.runner.run)
        return time.perf_counter() - started


def _spec(stated: object) -> Spec:
    assert isinstance(stated, dict)
    model = stated.pop("model")
    return Spec(**stated, model=None if model is None else FloatModel(**model))


def serve(commands: TextIO, answers: TextIO) -> None:
    """Answer every line of `commands` by one of `answers`, until they end. What the user can mend is answered in words;
    anything else ends the process with its traceback."""
    server = Server()
    for line in commands:
        try:
            answer = server.answer(json.loads(line))
        except UserError as error:
            answer = {"failed": str(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> int:
    """The process. Its own answers keep stdout to themselves."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
