"""`python -m pipeline.doctor`: can this machine build and run engines, and what is missing?"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

from export.errors import EnvironmentLacksError, UserError
from export.models.sources import zoo_models
from pipeline import machine
from pipeline import recipe as recipes
from pipeline.backends import BACKENDS
from pipeline.backends.base import Check
from pipeline.bundle.hub import CLIENT
from pipeline.command import Answer, Parser, Table, parser, run
from pipeline.signals import leave

GIB = 2**30
# The default build of the bundled model peaks below 2 GiB; importing torch and an ONNX exporter takes most of it.
NEEDED_MEMORY_BYTES = 2 * GIB
NEEDED_DISK_BYTES = 1 * GIB
MINIMUM_PYTHON = (3, 11)
# Checks that a bundle must pass to run on the targets cpu and onnx; the other needed ones are the build's.
RUNNING = ("python", "onnxruntime")
# Only the compiler needs it: torch and onnx stand on many machines for other reasons, and the target cuda runs by them.
SIGN_OF_THE_COMPILER = "onnxscript"


def tool_checks() -> list[Check]:
    """Python, and its tools that no backend looks after: versions, or how to install them. They are looked up, not
    imported."""
    new = sys.version_info[:2] >= MINIMUM_PYTHON
    python = Check("python", new, platform.python_version(), True, "install Python 3.11 or newer")
    own = {backend.package for backend in BACKENDS.values()}
    return [python, *(_tool_check(module) for module in machine.TOOLS if module not in own)]


def target_checks() -> list[Check]:
    """What every backend has to say of this machine; what several say alike, once."""
    return list(dict.fromkeys(check for backend in BACKENDS.values() for check in backend.checks()))


def _tool_check(module: str) -> Check:
    needed, version = module in machine.COMPILER, machine.tool_version(module) or "not installed"
    package = "'ditc[build]'" if needed else machine.distribution(module)
    return Check(module, find_spec(module) is not None, version, needed, f"pip install {package}")


def extra_checks() -> list[Check]:
    """What needs an extra, and whether that is installed."""
    return [
        _extra_check("serve", "serve", machine.SERVER),
        _extra_check("serve --ray, sweep --ray", "ray", machine.RAY),
        _extra_check("push, hf://OWNER/NAME", "hub", CLIENT),
        _extra_check("verify --polygraphy", "polygraphy", ("polygraphy",)),
        _extra_check("calibrating with ModelOpt", "modelopt", ("modelopt",)),
    ]


def _extra_check(name: str, extra: str, modules: tuple[str, ...]) -> Check:
    """Of what an extra installs."""
    missing = [module for module in modules if find_spec(module) is None]
    installed = ", ".join(f"{machine.distribution(module)} {machine.tool_version(module)}" for module in modules)
    found = f"no {', '.join(map(machine.distribution, missing))}" if missing else installed
    return Check(name, not missing, found, False, f"pip install 'ditc[{extra}]'")


def machine_checks() -> list[Check]:
    """The GPU, and what is free here."""
    import psutil

    sm, memory, disk = machine.cuda_sm(), machine.free_memory(), psutil.disk_usage(str(Path.cwd()))
    gpu_remedy = f"only needed to run the targets {', '.join(name for name, row in BACKENDS.items() if row.needs_gpu)}"
    total = psutil.virtual_memory().total
    free = f"{memory.size_bytes / GIB:.1f} GiB free of {total / GIB:.1f}{memory.within}"
    free_disk = f"{disk.free / GIB:.1f} GiB"
    enough, enough_disk = memory.size_bytes >= NEEDED_MEMORY_BYTES, disk.free >= NEEDED_DISK_BYTES
    return [
        Check("NVIDIA GPU", sm > 0, f"SM {sm}" if sm else "none visible", False, gpu_remedy),
        Check("memory", enough, free, True, f"{memory.remedy}: 2 GiB are needed"),
        Check("disk", enough_disk, f"{free_disk} free here", True, "free 1 GiB, or build elsewhere with -o"),
    ]


def recipe_check() -> Check:
    remedy = "install the package again"
    try:
        names = [recipes.load(name).name for name in recipes.recipe_names()]
    except UserError as error:
        return Check("recipes", False, str(error), True, remedy)
    return Check("recipes", bool(names), ", ".join(names) or "none", True, remedy)


def model_check() -> Check:
    names = zoo_models()
    remedy = "install the package again, or name a model with -m"
    return Check("bundled models", bool(names), ", ".join(names) or "none", True, remedy)


def work(args: argparse.Namespace, answer: Answer) -> int:
    """Answer with all checks; exit 3 if something is missing that is needed: by the default build where the compiler is
    installed, by a bundle in any case."""
    compiler = find_spec(SIGN_OF_THE_COMPILER) is not None
    checks = [*tool_checks(), *target_checks(), *extra_checks(), *machine_checks(), recipe_check(), model_check()]
    if not compiler:
        checks = [replace(check, needed=check.name in RUNNING) for check in checks]
    missing = [check.name for check in checks if check.needed and not check.ok]
    unable = [name for name in missing if name in RUNNING]
    runs = f"no bundle can run: {', '.join(unable)}" if unable else "bundles can run"
    builds = f"the default build cannot run: {', '.join(missing)}" if missing else "the default build can run"
    if not compiler:
        builds = "nothing can be built: the compiler is not installed, pip install 'ditc[build]'"
    rows = [(_state(check), check.name, check.found) for check in checks]
    remedies = [(check.name, check.remedy) for check in checks if not check.ok]
    document = {"ok": compiler and not missing, "runs": not unable, "checks": [asdict(check) for check in checks]}
    tables = [Table(("", "what", "found"), rows), *([Table(("what", "remedy"), remedies)] if remedies else [])]
    answer.document(document, *tables, f"{runs}\n{builds}")
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
