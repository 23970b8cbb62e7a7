"""Loads TensorRT-RTX so that its ONNX parser finds plugins: gives the wheel the library name that it lacks.

For a custom op the parser opens `libtensorrt_rtx.so` by that name to reach the plugin registry, and aborts the process
where it is not found. The wheel has only `libtensorrt_rtx.so.1`. `load` therefore opens a library of a few hundred
bytes first, whose own name is the missing one and which needs the real library: the system's loader then answers the
parser with it. The bytes are written here, so that no compiler or linker is needed.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
import tempfile
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from export.errors import EnvironmentLacksError

REAL, MISSING = "libtensorrt_rtx.so.1", "libtensorrt_rtx.so"
LIBRARIES = "tensorrt_rtx_libs"
INSTALL = "install with: pip install tensorrt-rtx"
REMEDY = "use --set rtx.path=tensorrt, which needs no plugins"
# e_machine of the processors that TensorRT-RTX comes for, by platform.machine().
MACHINES = {"x86_64": 62, "aarch64": 183}

# Names and numbers of the System V ABI, generic part, chapters 4 and 5.
ET_DYN, EV_CURRENT, CLASS_64, LITTLE_ENDIAN = 3, 1, 2, 1
PT_LOAD, PT_DYNAMIC, PT_GNU_STACK, READ_WRITE = 1, 2, 0x6474E551, 6
DT_NULL, DT_NEEDED, DT_HASH, DT_STRTAB, DT_SYMTAB, DT_STRSZ, DT_SYMENT, DT_SONAME = 0, 1, 4, 5, 6, 10, 11, 14
PAGE = 0x1000
HEADER, PROGRAM_HEADER, SYMBOL = struct.Struct("<16sHHIQQQIHHHHHH"), struct.Struct("<IIQQQQQQ"), 24
DYNAMIC, HASH = struct.Struct("<qQ"), struct.Struct("<4I")


def alias_library(soname: str, needed: str, machine: int) -> bytes:
    """An ELF shared object called `soname` that holds nothing and needs the library `needed`.

    Layout: header, three program headers, dynamic section, hash table and symbol table without a symbol, strings. One
    segment maps all of it at address 0, so addresses are offsets. PT_GNU_STACK says that no stack need be executable.
    """
    strings = b"\0" + needed.encode() + b"\0" + soname.encode() + b"\0"
    dynamic_at = HEADER.size + 3 * PROGRAM_HEADER.size
    hash_at = dynamic_at + 8 * DYNAMIC.size
    symbols_at = hash_at + HASH.size
    strings_at = symbols_at + SYMBOL
    size = strings_at + len(strings)
    entries = (
        (DT_NEEDED, 1),
        (DT_SONAME, 2 + len(needed)),
        (DT_HASH, hash_at),
        (DT_STRTAB, strings_at),
        (DT_SYMTAB, symbols_at),
        (DT_STRSZ, len(strings)),
        (DT_SYMENT, SYMBOL),
        (DT_NULL, 0),
    )
    ident = b"\x7fELF" + bytes((CLASS_64, LITTLE_ENDIAN, EV_CURRENT)) + bytes(9)
    sizes = (HEADER.size, PROGRAM_HEADER.size, 3, 0, 0, 0)  # no section headers
    header = HEADER.pack(ident, ET_DYN, machine, EV_CURRENT, 0, HEADER.size, 0, 0, *sizes)
    dynamic_size = len(entries) * DYNAMIC.size
    segments = (
        (PT_LOAD, READ_WRITE, 0, 0, 0, size, size, PAGE),
        (PT_DYNAMIC, READ_WRITE, dynamic_at, dynamic_at, dynamic_at, dynamic_size, dynamic_size, 8),
        (PT_GNU_STACK, READ_WRITE, 0, 0, 0, 0, 0, 16),
    )
    programs = b"".join(PROGRAM_HEADER.pack(*segment) for segment in segments)
    dynamic = b"".join(DYNAMIC.pack(*entry) for entry in entries)
    empty_hash = HASH.pack(1, 1, 0, 0)  # one bucket, one chain entry: the symbol that every table begins with
    return header + programs + dynamic + empty_hash + bytes(SYMBOL) + strings


def load() -> ModuleType:
    """The module tensorrt_rtx, with plugins usable. A second call changes nothing.

    Raises EnvironmentLacksError where the package is missing or the library name cannot be supplied.
    """
    _named_library()
    return import_module("tensorrt_rtx")


@cache
def _named_library() -> ctypes.CDLL:
    """The open library that answers to the missing name: of the wheel, else of a system package."""
    if find_spec("tensorrt_rtx") is None:
        raise EnvironmentLacksError(f"plugins for TensorRT-RTX need tensorrt_rtx; {INSTALL}")
    if (real := _wheel_library()) is not None:
        return _open_alias(real)
    try:
        return ctypes.CDLL(MISSING, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise EnvironmentLacksError(
            f"{LIBRARIES} has no {REAL} on this machine ({error}); {INSTALL}, or {REMEDY}"
        ) from error


def _wheel_library() -> Path | None:
    """The wheel's library, None where it is not where wheels put it."""
    spec = find_spec(LIBRARIES)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    return next((folder / REAL for folder in folders if (folder / REAL).is_file()), None)


def _open_alias(real: Path) -> ctypes.CDLL:
    """Open the real library by its path, then the alias, which finds it open."""
    machine = MACHINES.get(platform.machine())
    if machine is None or sys.platform != "linux":
        here = f"{sys.platform} on {platform.machine()}"
        known = " or ".join(MACHINES)
        raise EnvironmentLacksError(f"plugins for TensorRT-RTX need Linux on {known}, not {here}; {REMEDY}")
    handle, name = tempfile.mkstemp(prefix="ditc-", suffix=".so")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(alias_library(MISSING, REAL, machine))
        ctypes.CDLL(str(real), mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise EnvironmentLacksError(f"{MISSING} cannot be supplied ({error}); {REMEDY}") from error
    finally:
        os.unlink(name)
