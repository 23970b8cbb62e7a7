"""What the sections of the GPU benchmark share: the machine they run on, tasks and deadlines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.timing import error_line

if TYPE_CHECKING:
    import torch

FLOATS = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True)
class Device:
    """What runs the kernels. type: as torch says it, "cpu" under Triton's interpreter. sm: compute capability, there 0."""

    type: str
    sm: int
    l2_bytes: int = 50 << 20
    tiny: bool = False

    def tensor(self, array: Any) -> torch.Tensor:
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
        return self.sm >= 89

    def loss(self) -> str:
        """Why this process can use the GPU no more (a kernel's illegal access ends its context), or ""."""
        if self.interpreted:
            return ""
        import torch

        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            return error_line(error)
        return ""


class GpuLostError(Exception):
    """This process can use the GPU no more; another one can."""


@dataclass(frozen=True)
class Task:
    """One row of a section. seconds: what it may take, a guess; it is not begun with less left of the budget."""

    name: str
    run: Callable[[], dict[str, Any]]
    seconds: float = 2.0


@dataclass
class Clock:
    """A budget, counted from when this was made."""

    budget_s: float
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.budget_s - (time.monotonic() - self.started)


def work_off(tasks: Iterable[Task], device: Device, clock: Clock, keep: Callable[[dict[str, Any]], None]) -> list[str]:
    """Run tasks in order while the budget lasts, handing each row to `keep` -> names of those not reached.

    Raises GpuLostError after the row of a task that lost the GPU.
    """
    missed = []
    for task in tasks:
        if clock.left < task.seconds:
            missed.append(task.name)
            continue
        row = row_of(task, device)
        keep(row)
        if row.get("lost"):
            raise GpuLostError(task.name)
    return missed


def failed_of(refused: dict[str, str], ours: tuple[str, ...]) -> dict[str, str]:
    """What a row says if one of our own contestants could not run; nothing where only others could not.

    >>> failed_of({"packed": "RuntimeError: x", "fp8": "y"}, ("packed",)), failed_of({"fp8": "y"}, ("packed",))
    ({'failed': 'packed: RuntimeError: x'}, {})
    """
    failures = [f"{name}: {refused[name]}" for name in ours if name in refused]
    return {"failed": "; ".join(failures)} if failures else {}


def row_of(task: Task, device: Device) -> dict[str, Any]:
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
