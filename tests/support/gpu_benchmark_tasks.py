"""A section of the GPU benchmark without a GPU, for the tests of what runs sections."""

from __future__ import annotations

import os
import time

from benchmarks.gpu.run import Device, Task

# What a document says of a GPU that is not there.
FACTS = {
    "name": "NVIDIA Nothing 1",
    "compute_capability": 90,
    "multiprocessors": 1,
    "memory_bytes": 1,
    "l2_bytes": 1,
    "cuda": "13.0",
}


def _break() -> dict:
    raise RuntimeError("this GPU has none\nof that")


def _sleep() -> dict:
    time.sleep(600)
    return {}


def tasks(device: Device) -> list[Task]:
    return [
        Task("one", lambda: {"passed": True, "process": os.getpid()}),
        Task("two", _break),
        Task("three", lambda: {"passed": True, "process": os.getpid()}),
    ]


def losing(device: Device) -> list[Task]:
    """A worker that says of its second task that the GPU is gone."""
    return [Task("one", dict), Task("two", lambda: {"failed": "illegal access", "lost": True}), Task("three", dict)]


def endless(device: Device) -> list[Task]:
    return [Task("quick", dict), Task("slow", _sleep)]
