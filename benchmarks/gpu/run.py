"""What the sections of the GPU benchmark share: the device, tasks and deadlines, tasks one by one or in processes."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from numpy.typing import NDArray

from benchmarks.record import Json
from plugins.gpu.tiles import FIRST_FP8

if TYPE_CHECKING:
    import torch

Array: TypeAlias = NDArray[Any]  # codes, bytes or floats
FLOATS = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True)
class Device:
    """What runs the kernels. type: "cuda", or "cpu" for Triton's interpreter. sm: compute capability, there 0."""

    type: str
    sm: int
    l2_bytes: int = 50 << 20
    tiny: bool = False

    def tensor(self, array: Array) -> torch.Tensor:
        """A NumPy array on the device."""
        import torch

        return torch.from_numpy(array).contiguous().to(self.type)

    def dtype(self, name: str) -> torch.dtype:
        """The torch type of "fp16", "bf16" or "fp32"."""
        import torch

        dtype: torch.dtype = getattr(torch, FLOATS[name])
        return dtype

    @property
    def interpreted(self) -> bool:
        return self.type == "cpu"

    @property
    def has_fp8(self) -> bool:
        return self.sm >= FIRST_FP8

    def loss(self) -> str | None:
        """Why this process can use the GPU no more (a kernel's illegal access ends its context), if it cannot."""
        if self.interpreted:
            return None
        import torch

        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            return error_line(error)
        return None


class GpuLostError(Exception):
    """This process can use the GPU no more; another one can."""


@dataclass(frozen=True)
class Task:
    """One row of a section. seconds: what it may take, a guess; it is not begun with less left of the budget."""

    name: str
    run: Callable[[], Json]
    seconds: float = 2.0


@dataclass
class Clock:
    """A budget, counted from when this was made."""

    budget_s: float
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.budget_s - (time.monotonic() - self.started)


def row_of(task: Task, device: Device) -> Json:
    """Run a task. One that raises has the row {"name", "failed": why}: what a GPU lacks must not cost the others.

    "lost": the GPU is of no use to this process any more.
    """
    try:
        row = task.run()
    except Exception as error:  # stated in the row and in the exit code
        row = {"failed": error_line(error)}
    if loss := device.loss():
        row = {"failed": row.get("failed", loss), "lost": True}
    return {"name": task.name, **row}


def failed_of(refused: dict[str, str], ours: Iterable[str]) -> dict[str, str]:
    """What a row says if one of our own contestants could not run; nothing where only others could not.

    >>> failed_of({"packed": "RuntimeError: x", "fp8": "y"}, ("packed",)), failed_of({"fp8": "y"}, ("packed",))
    ({'failed': 'packed: RuntimeError: x'}, {})
    """
    failures = [f"{name}: {refused[name]}" for name in ours if name in refused]
    return {"failed": "; ".join(failures)} if failures else {}


def error_line(error: Exception) -> str:
    """An error on one line.

    >>> error_line(RuntimeError("not on this GPU; first\\nsecond"))
    'RuntimeError: not on this GPU; first'
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def work_off(tasks: Iterable[Task], device: Device, clock: Clock, keep: Callable[[Json], None]) -> list[str]:
    """Run tasks in order while the budget lasts, handing each row to `keep` -> names of those not reached.

    Raises GpuLostError after the row of a task that lost the GPU.
    """
    missed = []
    for task in tasks:
        if clock.left < task.seconds:
            missed.append(task.name)
        else:
            _keep(row_of(task, device), keep)
    return missed


def _keep(row: Json, keep: Callable[[Json], None]) -> None:
    keep(row)
    if row.get("lost"):
        raise GpuLostError(row["name"])


# --- in processes: for checks and for compiling, where nothing is timed -----------------------------------------------
# Triton compiles a kernel in one to two seconds on one processor; what it compiled is in its cache on the disk for the
# process that times it.

MOST_WORKERS = 12
THREADS = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
_work: list[tuple[Task, Device]] = []  # of a worker process


def tasks_of(module: str, function: str, device: Device) -> list[Task]:
    """The tasks that `module.function(device)` gives."""
    tasks: list[Task] = getattr(importlib.import_module(module), function)(device)
    return tasks


def _begin(module: str, function: str, device: Device) -> None:
    _work.extend((task, device) for task in tasks_of(module, function, device))


def _run(index: int) -> Json:
    return row_of(*_work[index])


def work_off_in_processes(
    module: str,
    function: str,
    device: Device,
    clock: Clock,
    keep: Callable[[Json], None],
    workers: int,
    done_before: Collection[str] = (),
) -> list[str]:
    """`work_off` of `tasks_of(module, function, device)` but for those done before, by `workers` processes, in any
    order."""
    names = [task.name for task in tasks_of(module, function, device)]
    left = {index: name for index, name in enumerate(names) if name not in done_before}
    for key, value in THREADS.items():
        os.environ.setdefault(key, value)  # for the workers: this process has its threads already
    done = set()
    with multiprocessing.get_context("spawn").Pool(workers, _begin, (module, function, device)) as pool:
        rows = pool.imap_unordered(_run, left)
        for _ in left:
            try:
                row = rows.next(timeout=max(clock.left, 0.0))
            except multiprocessing.TimeoutError:
                break
            done.add(row["name"])
            _keep(row, keep)
    return [name for name in left.values() if name not in done]
