"""Facts of this machine and its tools, found without importing them (but `visible_sm`); peak memory of this process."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import math
import os
import platform
import re
import resource
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, TypedDict

from export.about import PROGRAM as PROGRAM
from export.about import own_version as own_version
from export.errors import EnvironmentLacksError, RecipeError, ResourceError

logger = logging.getLogger(__name__)

# Modules whose versions may change a result.
TOOLS = (
    "numpy", "torch", "diffusers", "transformers", "tokenizers", "safetensors", "onnx", "onnx_ir", "onnxscript",
    "onnxruntime", "tensorrt_rtx", "tensorrt", "triton",
)  # fmt: skip
# What the compiler needs beside the run-time part, and the extra `build` installs; a bundle runs without any of it.
COMPILER = ("torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript", "jinja2")
# What `serve` needs and the extra `serve` installs, and what --ray of any verb needs beside, of the extra `ray`.
SERVER, RAY = ("fastapi", "prometheus_client", "uvicorn"), ("ray",)
# The distribution that installs the module onnxruntime for NVIDIA GPUs: by it alone the CPU's targets run, too.
ONNXRUNTIME_GPU = "onnxruntime-gpu"
OTHER_DISTRIBUTIONS = {"onnxruntime": (ONNXRUNTIME_GPU,)}
DISTRIBUTIONS = {"modelopt": "nvidia-modelopt"}  # of modules that are called otherwise
SOURCES = (".py", ".c", ".h")
CPUINFO = Path("/proc/cpuinfo")
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")


def distribution(module: str) -> str:
    """What pip calls the package of a module."""
    return DISTRIBUTIONS.get(module, module.replace("_", "-"))


def installed_version(name: str) -> str:
    """Version of an installed distribution, or '' if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def tool_version(module: str) -> str:
    """Version of an installed tool by its module name, or '' if it is not installed."""
    names = (distribution(module), *OTHER_DISTRIBUTIONS.get(module, ()))
    return next((version for name in names if (version := installed_version(name))), "")


def tool_versions(more: Iterable[str] = ()) -> dict[str, str]:
    """Versions of all installed tools that may change a result, and of Python. more: modules beside those of TOOLS."""
    versions = {name: tool_version(name) for name in (*TOOLS, *more)}
    return {"python": platform.python_version(), **{name: version for name, version in versions.items() if version}}


def release(version: str) -> tuple[str, ...]:
    """Major and minor number of a tool's version."""
    return tuple(version.split(".")[:2])


def require(modules: tuple[str, ...], purpose: str, extra: str | None = None) -> None:
    """Raise EnvironmentLacksError if one of `modules` cannot be imported (they are only looked up, not imported).

    extra: of this package, which installs them; None: each has its own name.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        names = f"'ditc[{extra}]'" if extra else " ".join(map(distribution, missing))
        raise EnvironmentLacksError(f"{purpose} needs {', '.join(missing)}; install with: pip install {names}")


def require_compiler(purpose: str) -> None:
    """Raise EnvironmentLacksError where the run-time part is installed without the compiler."""
    require(COMPILER, purpose, "build")


@cache
def code_version() -> str:
    """SHA-256 over the compiler's own sources: what they are decides what a build gives."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for package in ("export", "plugins", "pipeline"):
        for path in sorted(path for path in (root / package).rglob("*") if path.suffix in SOURCES):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def cpu_name() -> str:
    """Model name of the processor."""
    match = re.search(r"^model name\s*:\s*(.+)$", _text(CPUINFO), re.MULTILINE)
    return match.group(1) if match else platform.processor() or platform.machine()


def cpu_flags() -> tuple[str, ...]:
    """The instruction sets among CPU_FLAGS that this processor has (Linux; empty elsewhere)."""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _text(CPUINFO), re.MULTILINE)
    present = set(match.group(1).split()) if match else set()
    return tuple(flag for flag in CPU_FLAGS if flag in present)


def cpu_count() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- how many threads may compute -----------------------------------------------------------------------------------

MOST_THREADS = 1024
ROOT = Path("/")  # where /proc and /sys lie


def threads(asked: int | None = None) -> int:
    """Threads of one engine call: `asked`, or one for each core that this process may use, its container's CPU time
    and OMP_NUM_THREADS allow. Raises RecipeError for a number that is none."""
    if asked is not None:
        if not 1 <= asked <= MOST_THREADS:
            raise RecipeError(f"{asked} threads were asked for; use 1 to {MOST_THREADS}, or leave it to the machine")
        return asked
    limits = (core_count(), container_cpus(), omp_threads())
    return max(1, math.floor(min(limit for limit in limits if limit is not None)))


def core_count() -> int:
    """Cores of the processors that this process may use: two hyperthreads of one core are no two."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    siblings = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    rows = {number: _text(ROOT / siblings.format(number)) for number in os.sched_getaffinity(0)}
    return len({row.strip() or str(number) for number, row in rows.items()})


def omp_threads() -> int | None:
    """OMP_NUM_THREADS: its first number ("4,2" is 4 at the outer level); None where it is not set or not a number."""
    match = re.match(r"\s*(\d+)", os.environ.get("OMP_NUM_THREADS", ""))
    return int(match.group(1)) or None if match else None


def container_cpus() -> float | None:
    """CPU time that the container allows, in processors; None without a limit.

    The least of the limits of this process' control group and of the groups above it, of version 2 (cpu.max) or
    version 1 (cpu.cfs_quota_us). A container may see its own group as the root.
    """
    limits = (_quota(group) for group in _control_groups("cpu"))
    return min((limit for limit in limits if limit is not None), default=None)


def _control_groups(controller: str) -> Iterator[Path]:
    """Folders of this process' control group for a controller, and of those above it, wherever they may lie."""
    for line in _text(ROOT / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        mounts = [ROOT / "sys/fs/cgroup"] if not controllers else []
        mounts += [ROOT / "sys/fs/cgroup" / name for name in (controllers, controller, "unified") if name]
        group = Path(path.lstrip("/"))
        yield from (mount / part for mount in mounts for part in (group, *group.parents))


def _quota(group: Path) -> float | None:
    """Processors of one control group: microseconds of CPU time in a period of so many."""
    numbers = _text(group / "cpu.max").split() or [
        *_text(group / "cpu.cfs_quota_us").split(), *_text(group / "cpu.cfs_period_us").split()
    ]  # fmt: skip
    if len(numbers) != 2 or not all(number.isdigit() for number in numbers) or not int(numbers[1]):
        return None  # "max", -1, or no file: no limit
    return int(numbers[0]) / int(numbers[1]) or None


def _text(path: Path) -> str:
    """A file's text, "" where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


class Facts(TypedDict):
    """What documents say of a machine: nothing that changes between two runs on it."""

    system: str
    architecture: str
    cpu: str
    cpu_flags: list[str]
    cpus: int
    memory_bytes: int


def facts() -> Facts:
    """Of this machine."""
    import psutil

    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu": cpu_name(),
        "cpu_flags": list(cpu_flags()),
        "cpus": cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
    }


class FreeMemory(NamedTuple):
    """Memory that new work can take without swapping. within: which limit it ends at, in words after a number of bytes
    that "are free"; remedy: what makes more of it."""

    size_bytes: int
    within: str = ""
    remedy: str = "close other programs"


def free_memory() -> FreeMemory:
    """By whichever leaves the least: the machine, the limit of the container, or that of the process."""
    import psutil

    container, process = container_memory_bytes(), _address_space_left()
    rows = [FreeMemory(int(psutil.virtual_memory().available))]
    if container is not None:
        within = " within the container's limit"
        rows.append(FreeMemory(container, within, "give the container more memory, or close other programs in it"))
    if process is not None:
        rows.append(FreeMemory(process, " within the limit of `ulimit -v`", "raise that limit"))
    return min(rows, key=lambda row: row.size_bytes)


def _address_space_left() -> int | None:
    """What the process may yet map (`ulimit -v`); None without a limit."""
    import psutil

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else max(0, limit - int(psutil.Process().memory_info().vms))


def container_memory_bytes() -> int | None:
    """Memory that the container's limits leave to new work; None without a limit. Groups as of `container_cpus`."""
    left = (_memory_left(group) for group in _control_groups("memory"))
    return min((size for size in left if size is not None), default=None)


def _memory_left(group: Path) -> int | None:
    """Of one control group, of version 2 or 1. What holds contents of files counts as free: it is given up when asked
    for."""
    for limit, used, files in (
        ("memory.max", "memory.current", "file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
    ):
        numbers = [_text(group / name).strip() for name in (limit, used)]
        if all(number.isdigit() for number in numbers):  # "max", or no file: no limit
            kept = re.search(rf"^{files} (\d+)$", _text(group / "memory.stat"), re.MULTILINE)
            return max(0, int(numbers[0]) - int(numbers[1]) + (int(kept.group(1)) if kept else 0))
    return None


def refuse_too_large(needed_bytes: int, what: str, remedy: str) -> None:
    """Log what work takes and raise ResourceError if so much is not free. what: a sentence up to the number; remedy:
    what helps beside more memory."""
    free = free_memory()
    logger.info("%s %.2f GiB", what, needed_bytes / 2**30)
    if needed_bytes > free.size_bytes:
        raise ResourceError(
            f"{what} {needed_bytes / 2**30:.1f} GiB, {free.size_bytes / 2**30:.1f} GiB are free{free.within}; "
            f"{free.remedy}, or {remedy}"
        )


def reset_peak_memory() -> None:
    """Start a new measurement of the peak resident size, where the kernel allows it (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return  # then peak_memory_bytes is the highest value of the whole process, never too low


def peak_memory_bytes() -> int:
    """Peak resident size since `reset_peak_memory`, in bytes."""
    match = re.search(r"^VmHWM:\s*(\d+) kB", _text(Path("/proc/self/status")), re.MULTILINE)
    if match:  # getrusage would count what the parent process had when it started this one
        return int(match.group(1)) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cuda_sm() -> int:
    """Compute capability of the first GPU, for example 89, asked of the driver; 0 if there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    major, minor, device = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return 0
    # 75 and 76: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
    for value, attribute in ((major, 75), (minor, 76)):
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return major.value * 10 + minor.value


def visible_sm() -> int:
    """Compute capability of PyTorch's current GPU, which its engines run on; 0 without one. Imports PyTorch."""
    import torch

    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability()
    return int(major * 10 + minor)
