"""Tasks in several processes on one GPU: for checks and for compiling, where nothing is timed.

Triton compiles a kernel in one to two seconds on one processor; what it compiled is in its cache on the disk for the
process that times it.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Callable, Container
from typing import Any

from benchmarks.gpu.run import Clock, Device, GpuLostError, Task, row_of

MOST_WORKERS = 12
THREADS = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
_work: list[tuple[Task, Device]] = []  # of a worker process


def _begin(module: str, function: str, device: Device) -> None:
    _work.extend((task, device) for task in getattr(importlib.import_module(module), function)(device))


def _run(index: int) -> dict[str, Any]:
    return row_of(*_work[index])


def work_off_in_processes(
    module: str,
    function: str,
    device: Device,
    clock: Clock,
    keep: Callable[[dict[str, Any]], None],
    workers: int,
    done_before: Container[str] = (),
) -> list[str]:
    """`work_off` of the tasks that `module.function(device)` gives, by `workers` processes, in any order."""
    names = [task.name for task in getattr(importlib.import_module(module), function)(device)]
    indices = [index for index, name in enumerate(names) if name not in done_before]
    for key, value in THREADS.items():
        os.environ.setdefault(key, value)  # for the workers: this process has its threads already
    done = set()
    with multiprocessing.get_context("spawn").Pool(workers, _begin, (module, function, device)) as pool:
        rows = pool.imap_unordered(_run, indices)
        for _ in indices:
            try:
                row = rows.next(timeout=max(clock.left, 0.0))
            except multiprocessing.TimeoutError:
                break
            done.add(row["name"])
            keep(row)
            if row.get("lost"):
                raise GpuLostError(row["name"])
    return [names[index] for index in indices if names[index] not in done]
