"""Tasks in several processes on one GPU: for checks and for compiling, where nothing is timed.

Triton compiles a kernel in one to two seconds on one processor; what it compiled is in its cache on the disk for the
process that times it.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

from benchmarks.gpu_run import Clock, Context, Task, row_of

MOST_WORKERS = 8
THREADS = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
_tasks: list[Task] = []  # of a worker process


def _begin(module: str, function: str, context: Context) -> None:
    _tasks.extend(getattr(importlib.import_module(module), function)(context))


def _run(index: int) -> dict[str, Any]:
    return row_of(_tasks[index])


def work_off_in_processes(
    module: str, function: str, context: Context, clock: Clock, keep: Callable[[dict[str, Any]], None], workers: int
) -> list[str]:
    """`work_off` of the tasks that `module.function(context)` gives, by `workers` processes, in any order."""
    names = [task.name for task in getattr(importlib.import_module(module), function)(context)]
    for key, value in THREADS.items():
        os.environ.setdefault(key, value)  # for the workers: this process has its threads already
    done = set()
    with multiprocessing.get_context("spawn").Pool(workers, _begin, (module, function, context)) as pool:
        rows = pool.imap_unordered(_run, range(len(names)))
        for _ in names:
            try:
                row = rows.next(timeout=max(clock.left, 0.0))
            except multiprocessing.TimeoutError:
                break
            done.add(row["name"])
            keep(row)
    return [name for name in names if name not in done]
