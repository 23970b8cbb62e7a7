"""A Ray cluster of this machine for tests, in processes of a Python that has Ray; see ray_cluster.py."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.tools.environments import CannotBeHadError
from tests.support.environments import python_with, without_xdist

ROOT = Path(__file__).parents[2]
REQUIREMENT = "ray[serve]>=2.50"
# Ray gives a node half a minute to start, which on a machine that does much beside is not enough.
TRIES = 4
WAITED_S = 600  # on a machine that does much beside


@pytest.fixture(scope="module")
def python() -> str:
    """One that imports Ray."""
    try:
        return str(python_with("ray", REQUIREMENT))
    except CannotBeHadError as error:
        pytest.skip(str(error))


@contextlib.contextmanager
def cluster(python: str) -> Iterator[tuple[str, psutil.Process]]:
    """Its address, and the process that all of its own descend from."""
    for _ in range(TRIES):
        process = start_cluster(python)
        parent = psutil.Process(process.pid)
        try:
            assert process.stdout is not None
            if address := process.stdout.readline().strip():
                yield address, parent
                return
        finally:
            end(process, parent)
    pytest.fail(f"the cluster did not start in {TRIES} tries")


def start_cluster(python: str) -> subprocess.Popen[str]:
    command, pipe = [python, "-m", "tests.support.ray_cluster"], subprocess.PIPE
    own = {"PYTHONPATH": str(ROOT)}  # workers run this tree, whichever is installed
    return subprocess.Popen(command, cwd=ROOT, env={**without_xdist(), **own}, stdin=pipe, stdout=pipe, text=True)


def end(process: subprocess.Popen[str], parent: psutil.Process) -> None:
    """The cluster, and what is left of it."""
    own = parent.children(recursive=True) if process.poll() is None else []
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(120)
    finally:
        process.kill()
        for left in own:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()


def until(true: Any) -> None:
    end = time.monotonic() + WAITED_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.2)
