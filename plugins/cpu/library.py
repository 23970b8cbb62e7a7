"""The kernel library of the `cpu` target: part of this package, compiled with it or at first use, registered in stock
onnxruntime.

Only what was compiled from the sources beside this file is ever loaded: what a wheel carries (packaged.py), else a file
in the user's cache. That lies in a folder named by those sources and the machine's binary interface, and is named by
its compiler; the folder and the file belong to the user, and nobody else may write them; a record beside it says what
was compiled, and another file than that is compiled again. A bundle holds no code: it names the version it was proven
with.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from export.cache_folder import cache_folder
from export.errors import EnvironmentLacksError
from plugins.cpu import packaged

if TYPE_CHECKING:
    from onnxruntime import SessionOptions

logger = logging.getLogger(__name__)
NAME = "kernels.so"  # while it is made for the cache, where it is called by its compiler
# Of its ops, as bindings.c registers them.
DOMAIN = "fpq.native"
FOLDER = Path(__file__).resolve().parent
# Kernels that know nothing of onnxruntime.
KERNELS = (
    "packed_gemm.c",
    "packed_gemm_avx2.c",
    "packed_gemm_vnni.c",
    "packed_gemm_amx.c",
    "packed_gemm_arm.c",
    "packed_gemm_i8mm.c",
    "half_gemm.c",
    "attention.c",
    "quantized_attention.c",
    "quantized_attention_vnni.c",
    "quantized_operands.c",
    "quantized_weights.c",
    "token_chain.c",
)
SOURCES = (
    "bindings.c",
    "token_chain_op.c",
    "packed_gemm_op.c",
    *KERNELS,
    "half_gemm_op.c",
    "attention_op.c",
    "limits.c",
    "scratch.c",
)
HEADERS = (
    "ort_abi.h",
    "ort_op.h",
    "attention.h",
    "attention_tiles.h",
    "attention_turn.h",
    "epilogue.h",
    "epilogue_op.h",
    "exponential.h",
    "half_gemm.h",
    "half_gemm_tiles.h",
    "limits.h",
    "packed_gemm.h",
    "packed_gemm_variant.h",
    "quantized_attention.h",
    "quantized_weights.h",
    "quantizer_op.h",
    "scratch.h",
    "span.h",
    "token_chain.h",
    "variants.h",
    "yield.h",
)
# No contraction: a fused multiply-add would round once where the rules of the ops round twice.
FLAGS = ("-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fvisibility=hidden", "-s")
X86_FLAGS = ("-mprefer-vector-width=512",)
POSIX_FLAGS = ("-fPIC",)
# GCC is left out on Windows: there it keeps 32-byte vectors at addresses that are multiples of 16 alone.
WINDOWS_FLAGS = ("--target=x86_64-w64-windows-gnu", "-static")
COMPILERS = ("clang",) if sys.platform == "win32" else ("cc", "gcc", "clang")
TIMEOUT_S = 120
COMPILER_REMEDY = "install a C compiler (Debian, Ubuntu: apt install gcc libc6-dev)"
REMEDY = f"{COMPILER_REMEDY}, or build with --set cpu.path=stock"
DAMAGE_REMEDY = "a C compiler makes it anew"
COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
# Libraries that could be kept nowhere: compiled for this process, removed at its end.
_UNCACHED: dict[str, tempfile.TemporaryDirectory[str]] = {}


# --- which version -------------------------------------------------------------------------------------------------


def code(text: str) -> str:
    """C code without comments and layout, which decide nothing.

    >>> code("int a; /* one */\\n\\n  int b; // two")
    'int a; int b;'
    """
    return " ".join(COMMENT.sub(" ", text).split())


@cache
def version() -> str:
    """16 hexadecimal digits: what is computed, to the bit, is decided by the sources and by how they are compiled."""
    digest = hashlib.sha256(repr(FLAGS).encode())
    for name in (*SOURCES, *HEADERS):
        digest.update(f"\0{name}\0{code((FOLDER / name).read_text(encoding='utf-8'))}".encode())
    return digest.hexdigest()[:16]


PREFIX = "kernel_library_"


def requirement() -> str:
    """How an engine's metadata names the version of the library that it was proven with."""
    return PREFIX + version()


# --- compiling -----------------------------------------------------------------------------------------------------


def compiler() -> str:
    """Path of the C compiler. Raises EnvironmentLacksError with the remedy if there is none."""
    if sys.platform == "win32" and platform.machine() != "AMD64":
        raise EnvironmentLacksError(f"cpu.path fused is not for Windows on {platform.machine()}; use stock")
    path = next(filter(None, map(shutil.which, COMPILERS)), None)
    if path is None:
        raise EnvironmentLacksError(f"cpu.path fused needs one of {', '.join(COMPILERS)}; {REMEDY}")
    return path


def build(path: Path, flags: tuple[str, ...] = (), sources: tuple[str, ...] = SOURCES) -> None:
    """Compile the library to `path`; the same compiler gives the same bytes. Raises EnvironmentLacksError."""
    wide = X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else ()
    system = WINDOWS_FLAGS if sys.platform == "win32" else POSIX_FLAGS
    command = [compiler(), *FLAGS, *wide, *system, *flags, *sources, "-o", str(path.absolute())]
    try:
        done = subprocess.run(
            command, cwd=FOLDER, capture_output=True, encoding="utf-8", errors="replace", check=False, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise EnvironmentLacksError(f"{command[0]} does not end within {TIMEOUT_S} s; {REMEDY}") from error
    except OSError as error:
        raise EnvironmentLacksError(f"{command[0]} does not run ({error}); {REMEDY}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise EnvironmentLacksError(f"{command[0]} cannot compile the native ops ({' '.join(lines[:1])}); {REMEDY}")


# --- the user's cache ----------------------------------------------------------------------------------------------


def library_folder() -> Path:
    """Where libraries of these sources lie for this system, processor and C library."""
    interface = (platform.system(), platform.machine(), *platform.libc_ver())
    return cache_folder("native", "-".join((version(), *filter(None, interface))))


def compiler_key(path: str) -> str:
    """16 hexadecimal digits that tell compilers and their releases apart."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, check=False, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise EnvironmentLacksError(f"{path} --version does not end within {TIMEOUT_S} s; {REMEDY}") from error
    except OSError as error:
        raise EnvironmentLacksError(f"{path} does not run ({error}); {REMEDY}") from error
    return hashlib.sha256(os.path.realpath(path).encode() + b"\0" + done.stdout).hexdigest()[:16]


def refusal(path: Path) -> str:
    """Why a file or folder may not be trusted with code, '' if it may: only its owner, this user, can have written it.

    A link is refused: what it names may be replaced by others."""
    facts = path.lstat()
    if not (stat.S_ISREG(facts.st_mode) or stat.S_ISDIR(facts.st_mode)):
        return "is neither a file nor a folder"
    if facts.st_uid != os.getuid():
        return f"belongs to user {facts.st_uid}, not to you"
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "can be written by others"
    return ""


def exposure(path: Path) -> str:
    """Why others may put something else in the place of `path`, '' if they may not: a folder above it is theirs too."""
    for folder in path.parent.resolve().parents:
        mode = folder.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return f"lies in {folder}, which can be written by others"
    return ""


def trusted(path: Path) -> bool:
    """May this library be loaded? Otherwise the log says why not."""
    for place in (path.parent, path):
        try:
            why = refusal(place) or exposure(place)
        except OSError:  # not there, or not to be read
            return False
        if why:
            logger.warning("%s %s: the kernel library in it is not used; remove it", place, why)
            return False
    return True


def kept(path: Path) -> bool:
    """Is this library of the cache to be used? Only its user can have written it, and it is what was compiled.

    It is not loaded here: the same compiler would make the same bytes again."""
    if not trusted(path):
        return False
    damage = packaged.damage(path, version(), DAMAGE_REMEDY)
    if damage is not None:
        logger.warning("%s", damage)
    return damage is None


def path_of_library() -> Path:
    """The library's file: the package's own, else from the cache, or compiled now. Raises EnvironmentLacksError where
    none is possible."""
    refused = packaged.problem(FOLDER, version())
    if refused is None:
        return FOLDER / packaged.NAME
    if sys.platform == "win32":  # nothing says there that a file in the cache is the user's own work
        raise EnvironmentLacksError(f"{refused}; on Windows cpu.path fused needs a wheel with one; use stock")
    folder = library_folder()
    try:
        chosen = compiler()
    except EnvironmentLacksError as error:
        path = next(filter(kept, sorted(folder.glob("*.so"))), None)
        if path is not None:
            return path
        remedy = f"{COMPILER_REMEDY}, or build the engine with --set cpu.path=stock"
        raise EnvironmentLacksError(
            f"{refused}; so cpu.path fused needs a C compiler to make it, and {folder} holds none; {remedy}"
        ) from error
    path = folder / f"{compiler_key(chosen)}.so"
    return path if kept(path) else _compiled(path)


def problem() -> str | None:
    """Why there is no library here, None if there is one that loads, compiled now if need be."""
    try:
        path = path_of_library()
    except EnvironmentLacksError as error:
        return str(error)
    try:
        ctypes.CDLL(str(path.resolve()))
    except OSError as error:  # a folder without the right to run code, for one
        return _not_loaded(path, error)
    return None


def _not_loaded(path: Path, error: Exception) -> str:
    return f"{path} does not load here ({error}); remove it, it is then made again"


def _compiled(path: Path) -> Path:
    """Compile into the cache under a temporary name, then rename; where the cache cannot be used, for this process."""
    try:
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".making-") as folder:  # only the user may enter it
            packaged.add(Path(folder), version(), build)
            (Path(folder) / packaged.NAME).chmod(0o700)
            os.replace(Path(folder) / packaged.RECORD, path.with_suffix(".json"))
            os.replace(Path(folder) / packaged.NAME, path)
        logger.info("compiled the kernel library into %s", path)
        if trusted(path):
            return path
    except OSError as error:
        logger.warning("the kernel library cannot be kept in %s (%s); it is compiled again next time", path, error)
    if path.name not in _UNCACHED:
        try:
            _UNCACHED[path.name] = tempfile.TemporaryDirectory(prefix="ditc-")
        except OSError as error:
            raise EnvironmentLacksError(f"the kernel library can be kept nowhere ({error}); set TMPDIR") from error
        build(Path(_UNCACHED[path.name].name) / NAME)
    return Path(_UNCACHED[path.name].name) / NAME


def register(options: SessionOptions) -> None:
    """Give session options the ops of the library. Raises EnvironmentLacksError where it cannot be made or does not
    load."""
    path = path_of_library()
    try:
        options.register_custom_ops_library(str(path.resolve()))
    except Exception as error:  # onnxruntime raises its own classes, one for each cause
        raise EnvironmentLacksError(_not_loaded(path, error)) from error
