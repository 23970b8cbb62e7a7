"""`python -m pipeline.doctor`: can this machine build and run engines, and what is missing?"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from export.errors import EnvironmentLacksError, UserError
from pipeline import machine
from pipeline import recipe as recipes
from pipeline.backends.cuda import engine as cuda_run
from pipeline.backends.trt import engine as trt_run
from pipeline.command import Answer, Parser, Table, parser, run
from pipeline.compiler import NEEDED
from pipeline.list import zoo_models
from pipeline.machine import cuda_sm
from pipeline.signals import leave
from plugins.cpu import library
from plugins.gpu import compiled
from plugins.tensorrt.aot import plugin_name
from plugins.tensorrt.plugins import EXAMPLES
from plugins.tensorrt_rtx import plugin
from plugins.tensorrt_rtx.payload import NAMESPACE, PLUGINS, VERSION

GIB = 2**30
# The default build of the bundled model peaks below 2 GiB; importing torch and an ONNX exporter takes most of it.
NEEDED_MEMORY_BYTES = 2 * GIB
NEEDED_DISK_BYTES = 1 * GIB
MINIMUM_PYTHON = (3, 11)
# Tools with a check of their own below.
OWN_CHECKS = ("onnxruntime", "tensorrt_rtx", "tensorrt", "triton")


@dataclass(frozen=True)
class Check:
    """One row: what was looked at, what was found, and if it is not ok, the remedy. needed: by the default build."""

    name: str
    ok: bool
    found: str
    needed: bool = False
    remedy: str = ""


def python_check() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    return Check("python", sys.version_info[:2] >= MINIMUM_PYTHON, found, True, "install Python 3.11 or newer")


def tool_checks() -> list[Check]:
    """Every Python tool: its version, or how to install it. Tools are looked up, not imported."""
    return [_tool_check(module) for module in machine.TOOLS if module not in OWN_CHECKS]


def _tool_check(module: str) -> Check:
    installed = find_spec(module) is not None
    needed = module in NEEDED
    return Check(module, installed, machine.tool_version(module) or "not installed", needed, _install(module))


def _install(module: str) -> str:
    return f"pip install {machine.TOOLS[module]}"


def onnxruntime_check() -> Check:
    """onnxruntime is imported, because a wheel for another machine installs and then does not load."""
    try:
        found = import_module("onnxruntime")
    except ImportError as error:
        return Check("onnxruntime", False, f"does not load: {error}", True, _install("onnxruntime"))
    return Check("onnxruntime", True, f"{found.__version__}, runs the targets cpu and onnx", True)


def rtx_check() -> Check:
    """tensorrt_rtx and the GPUs that its builder takes (no GPU is needed to build)."""
    try:
        rtx = import_module("tensorrt_rtx")
    except ImportError as error:
        return Check("tensorrt_rtx", False, str(error), False, "pip install tensorrt-rtx, to build the target rtx")
    sms = [name for name in rtx.ComputeCapability.__members__ if name.startswith("SM")]
    return Check("tensorrt_rtx", True, f"{rtx.__version__}, builds for {' '.join(sms)}")


def rtx_plugins_check() -> Check:
    """Our plugins in the registry of TensorRT-RTX, as it finds them by name, version and namespace."""
    name, remedy = "tensorrt_rtx plugins", "only needed for rtx.path=plugin"
    try:
        names = plugin.registered()
    except EnvironmentLacksError as error:
        return Check(name, False, "none", False, f"{remedy}; {error}")
    found = f"namespace {NAMESPACE}, version {VERSION}: {' '.join(names) or 'none'}; compiled, not run"
    missing = [*sorted(set(PLUGINS.values()) - set(names)), *compiled.problems()]
    return Check(name, not missing, found, False, f"{remedy}; missing: {', '.join(missing)}")


def tensorrt_check() -> Check:
    """What the target trt lacks here, and our plugins: those in TensorRT's registry, else those it would register."""
    problems = trt_run.environment_problems(cuda_sm())
    wanted = tuple(map(plugin_name, EXAMPLES))
    try:
        names, where = trt_run.registered_plugins(), "registered"
    except ImportError as error:
        names, where = wanted, "would register"
        problems = problems or [f"tensorrt does not load: {error}"]
    if missing := sorted(set(wanted) - set(names)):
        problems = [*problems, f"missing: {', '.join(missing)}"]
    listed = f"{where} in namespace {NAMESPACE}, version {VERSION}: {' '.join(names) or 'none'}"
    found = f"{machine.tool_version('tensorrt') or 'not installed'}; {listed}; not run"
    return Check("tensorrt", not problems, found, False, f"only needed for the target trt; {'; '.join(problems)}")


def gpu_check() -> Check:
    sm = cuda_sm()
    remedy = "only needed to run the targets rtx and cuda; building them needs no GPU"
    return Check("NVIDIA GPU", sm > 0, f"SM {sm}" if sm else "none visible", False, remedy)


def triton_check() -> Check:
    """Triton, of a release that the kernels are written for, with its assemblers."""
    version = machine.tool_version("triton") if find_spec("triton") else ""
    try:
        problems = compiled.problems() if version else ["pip install triton"]
    except EnvironmentLacksError as error:
        problems = [f"triton {version} does not load: {error.__cause__}"]
    remedy = f"only needed for kernels of the targets cuda and trt, and rtx.path=plugin; {'; '.join(problems)}"
    return Check("triton", not problems, version or "not installed", False, remedy)


def cuda_check() -> Check:
    """What running the target cuda needs, together: a GPU, a PyTorch with CUDA, triton."""
    sm, cuda = cuda_sm(), torch_cuda()
    triton = machine.tool_version("triton") if find_spec("triton") else ""
    problems = [] if cuda else ["this PyTorch is built without CUDA; install one from https://pytorch.org"]
    problem = cuda_run.machine_problem({}, sm, triton)
    problems += [problem] if problem else []
    found = f"{f'SM {sm}' if sm else 'no GPU'}, CUDA of torch {cuda or 'none'}, triton {triton or 'none'}"
    return Check("cuda", not problems, found, False, f"only needed to run the target cuda; {'; '.join(problems)}")


def torch_cuda() -> str:
    """The CUDA release that PyTorch is built with, '' for none; read from its version file, without importing it."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return ""
    return str(runpy.run_path(str(Path(spec.origin).with_name("version.py")))["cuda"] or "")


def compiler_check() -> Check:
    """A C compiler, which `cpu.path=native` alone needs."""
    try:
        return Check("C compiler", True, library.compiler())
    except EnvironmentLacksError as error:
        return Check("C compiler", False, "none found", False, f"only needed for cpu.path=native; {error}")


def cpu_check() -> Check:
    flags = machine.cpu_flags()
    fast = any(flag in flags for flag in ("avx512_vnni", "avx_vnni", "asimddp", "i8mm"))
    remedy = "no INT8 dot products (VNNI): engines are right here, but not fast"
    return Check(
        "processor", fast, f"{machine.cpu_name()}, {machine.cpu_count()} cpus, {' '.join(flags)}", False, remedy
    )


def memory_check() -> Check:
    import psutil

    memory = psutil.virtual_memory()
    found = f"{memory.available / GIB:.1f} GiB free of {memory.total / GIB:.1f}"
    return Check(
        "memory", memory.available >= NEEDED_MEMORY_BYTES, found, True, "close other programs: 2 GiB are needed"
    )


def disk_check() -> Check:
    import psutil

    free = psutil.disk_usage(str(Path.cwd())).free
    return Check(
        "disk",
        free >= NEEDED_DISK_BYTES,
        f"{free / GIB:.1f} GiB free here",
        True,
        "free 1 GiB, or build elsewhere with -o",
    )


def recipe_check() -> Check:
    names = recipes.recipe_names()
    try:
        for name in names:
            recipes.load(name)
    except UserError as error:
        return Check("recipes", False, str(error), True, "install the package again")
    return Check("recipes", bool(names), ", ".join(names) or "none", True, "install the package again")


def model_check() -> Check:
    names = zoo_models()
    remedy = "install the package again, or name a model with -m"
    return Check("bundled models", bool(names), ", ".join(names) or "none", True, remedy)


CHECKS: tuple[Callable[[], Check], ...] = (
    onnxruntime_check,
    rtx_check,
    rtx_plugins_check,
    tensorrt_check,
    gpu_check,
    triton_check,
    cuda_check,
    compiler_check,
    cpu_check,
    memory_check,
    disk_check,
    recipe_check,
    model_check,
)


def work(args: Any, answer: Answer) -> int:
    """Answer with all checks; exit 3 if something is missing that the default build needs."""
    checks = [python_check(), *tool_checks(), *(check() for check in CHECKS)]
    missing = [check.name for check in checks if check.needed and not check.ok]
    rows = [(_state(check), check.name, check.found) for check in checks]
    remedies = [(check.name, check.remedy) for check in checks if not check.ok]
    verdict = f"the default build cannot run: {', '.join(missing)}" if missing else "the default build can run"
    document = {"ok": not missing, "checks": [asdict(check) for check in checks]}
    tables = [Table(("", "what", "found"), rows), *([Table(("what", "remedy"), remedies)] if remedies else [])]
    answer.document(document, *tables, verdict)
    return EnvironmentLacksError.exit_code if missing else 0


def _state(check: Check) -> str:
    return "ok" if check.ok else "MISSING" if check.needed else "-"


def make_parser() -> Parser:
    """All flags of `doctor`."""
    return parser("doctor", "Check what this machine can build and run, and what is missing.")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(make_parser(), work, argv)


if __name__ == "__main__":
    leave(main)
