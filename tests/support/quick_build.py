"""`python -m tests.support.quick_build`: pipeline.build with the fewest measurements and no trace of its own, for tests
of everything else; and bundles without any proof, for tests of what runs them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pipeline import build, compile_pipeline, compiler
from pipeline.bench import measure
from pipeline.signals import leave

# What a build imports: a server that has done so forks a process for each build in a moment.
IMPORTED = (
    __name__,
    "torch.onnx",
    "onnxruntime",
    "diffusers.models.transformers.pixart_transformer_2d",
    "export.trace",
    "pipeline.bench.measure",
    "pipeline.calibrate",
    "pipeline.verify.page",
    "pipeline.verify.proof",
    "tensorrt_rtx",
    "tests.support.traces",
)


def measure_little(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Three rounds of calls, pictures derived from them, no fresh processes for memory. put: monkeypatch.setattr to
    have it undone."""
    put(measure, "CALLS_BUDGET_S", 0.0)
    put(measure, "PICTURES_BUDGET_S", 0.0)
    put(measure, "peak_memory", lambda *_: None)


def build_unproven(output: Path, *flags: str) -> Path:
    """A bundle by rounding to nearest, of the bundled model or another, whose gates and measurements are left out."""
    left_out = ((compiler, "verified"), (compiler, "benched"), (compile_pipeline, "proven"))
    with ExitStack() as stack:
        for module, name in left_out:
            stack.enter_context(patch.object(module, name, lambda *_: None))
        assert build.main(["--engine", "pixart_w4a6", "--set", "method=rtn", *flags, "-o", str(output)]) == 0
    return output


def shorten() -> None:
    """The fewest measurements, and the run's own trace of the model."""
    from export import to_onnx
    from tests.support.traces import traced

    measure_little()
    to_onnx._traced = traced


def answering(answers: Connection, log: Path, args: Sequence[str]) -> None:
    """A build in a process of its own, forked for it: stdout is `answers`, stderr goes to a file."""
    os.dup2(answers.fileno(), 1)
    answers.close()
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - as long as the process
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else ignored where the tests run in the background
    shorten()
    leave(lambda: build.main(args))


if __name__ == "__main__":
    shorten()
    leave(build.main)
