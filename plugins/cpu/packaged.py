"""The kernel library that a wheel carries: compiled when the wheel was built, with a record of what it is beside it.

It lies among this package's own files, which are trusted with code as they are. The record guards against what happens
to files: a library of other sources, left from another release, and one that was damaged or changed after the build.
One in the user's cache has such a record too.
"""

from __future__ import annotations

import ctypes
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from export.documents import Rules, read_json, sha256
from export.errors import EnvironmentLacksError

logger = logging.getLogger(__name__)
NAME = "kernels.dll" if sys.platform == "win32" else "kernels.so"
RECORD = "kernels.json"
ABSENT = "this installation carries no compiled kernel library"
REMEDY = "install the package again"


@dataclass(frozen=True)
class Record:
    """version: that of the sources it was compiled from, see `library.version`; sha256: of the file, hexadecimal."""

    version: str
    sha256: str


def add(folder: Path, version: str, build: Callable[[Path], None]) -> None:
    """Compile the library into a folder of C sources of this version, by `build`, and write its record.

    What an earlier build left there goes first. Raises EnvironmentLacksError as `build` does; then there is neither."""
    for name in (NAME, RECORD):
        (folder / name).unlink(missing_ok=True)
    build(folder / NAME)
    record = Record(version=version, sha256=sha256(folder / NAME))
    (folder / RECORD).write_text(json.dumps(asdict(record)) + "\n", encoding="utf-8")


@cache
def problem(folder: Path, version: str) -> str | None:
    """Why the library in `folder` is not used, None if it is: of the sources with this version, whole, and it loads.

    A folder without one is as it should be where the package came without; any other problem is logged, once."""
    path = folder / NAME
    if not path.exists():
        return ABSENT
    fault = damage(path, version) or _load_fault(path)
    if fault is not None:
        logger.warning("%s", fault)
    return fault


def damage(path: Path, version: str, remedy: str = REMEDY) -> str | None:
    """Why the library `path` is not the one that was compiled from sources of this version, None if it is, to the byte:
    the record beside it says so. `remedy` ends the text."""
    record_path = path.with_suffix(".json")
    try:
        record = read_json(record_path, Record, Rules(EnvironmentLacksError, remedy))
        digest = sha256(path, EnvironmentLacksError, remedy)
    except EnvironmentLacksError as error:
        return f"{path} is not used: {error}"
    if record.version != version:
        return f"{path} is of version {record.version}, its sources of {version}; {remedy}"
    if record.sha256 != digest:
        return f"{path} is damaged: its sha256 is {digest}, {record_path.name} says {record.sha256}; {remedy}"
    return None


def _load_fault(path: Path) -> str | None:
    try:
        ctypes.CDLL(str(path))
    except OSError as error:  # of another system or processor, or in a place where code may not run
        return f"{path} does not load here ({error}); {REMEDY}"
    return None
