"""The native library of the `cpu` target: compiled by the system's C compiler, registered in stock onnxruntime."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from export.errors import EnvironmentLacksError

NAME = "fpq_native.so"
FOLDER = Path(__file__).resolve().parent
SOURCES = ("bindings.c", "token_chain.c")
COMPILERS = ("cc", "gcc", "clang")
# No contraction: a fused multiply-add would round once where the rules of the ops round twice.
FLAGS = ("-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", "-fvisibility=hidden", "-s")
X86_FLAGS = ("-mprefer-vector-width=512",)
TIMEOUT_S = 120
REMEDY = "install a C compiler (Debian, Ubuntu: apt install gcc libc6-dev), or build with --set cpu.path=stock"


def requirement() -> str:
    """What a machine must run for a library that is compiled here."""
    return f"native_{platform.system().lower()}_{platform.machine()}"


def compiler() -> str:
    """Path of the C compiler. Raises EnvironmentLacksError with the remedy if there is none."""
    if sys.platform not in ("linux", "darwin"):
        raise EnvironmentLacksError(f"cpu.path native is for Linux and macOS, this is {sys.platform}; use stock")
    found = next(filter(None, map(shutil.which, COMPILERS)), None)
    if found is None:
        raise EnvironmentLacksError(f"cpu.path native needs one of {', '.join(COMPILERS)}; {REMEDY}")
    return found


def build(path: Path, flags: tuple[str, ...] = (), sources: tuple[str, ...] = SOURCES) -> None:
    """Compile the library to `path`; the same compiler gives the same bytes. Raises EnvironmentLacksError."""
    wide = X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else ()
    command = [compiler(), *FLAGS, *wide, *flags, *sources, "-o", str(path.absolute())]
    done = subprocess.run(
        command,
        cwd=FOLDER,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        timeout=TIMEOUT_S,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise EnvironmentLacksError(f"{command[0]} cannot compile the native ops ({' '.join(lines[:1])}); {REMEDY}")


def problems() -> list[str]:
    """Why the library cannot be compiled here: it is tried, so that a compiler without a C library is found, too."""
    with tempfile.TemporaryDirectory(prefix="ditc-") as folder:
        try:
            build(Path(folder) / NAME)
        except EnvironmentLacksError as error:
            return [str(error)]
    return []


def register(options: Any, folder: Path) -> None:
    """Give session options the ops of the library in `folder`, if one lies there. Raises EnvironmentLacksError."""
    path = folder / NAME
    if not path.is_file():
        return
    try:
        options.register_custom_ops_library(str(path.resolve()))
    except Exception as error:  # onnxruntime raises its own classes, one for each cause
        raise EnvironmentLacksError(f"{path} does not load here ({error}); build the engine on this machine") from error
