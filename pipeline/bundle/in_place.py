"""Large files are used where they lie: hashed once in a process, held open, and looked at again with every call.

A private copy (snapshot.py) of an encoder of 2.7 GB would be written to the disk for every picture. What is guaranteed
here in its place, and against whom:

- Against other users: that what was verified is what is used. Files that one of them may write or exchange, by the
  modes, owners and access lists of the file and of every folder and link on the way to it, are not used in place.
- Against one's own programs, such as a copy or a download over the bundle: that no result of a changed file is given
  away. A change of an open file shows in its size or times, of which the status change time is set by the system alone.
  They are compared after the engine was loaded and after each of its calls; where they differ the file is hashed again,
  through the same descriptor, and the call fails unless its bytes are as before. That a file was renamed, linked,
  deleted or replaced by another one of its name does not matter to a loaded engine.
- Not guaranteed: that a file which is cut short, or whose disk goes away, while an engine reads it does no more than
  fail that call. The system then ends the process (SIGBUS), as it does with any program that maps its weights. Root,
  and whoever sets the system's clock back, can change what they like. A network file system may show the change that
  another machine makes seconds late.

Where the system keeps no such times (Windows), files are copied.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from export.documents import open_file
from export.errors import ContractError
from pipeline.backends.base import Arrays, LoadedEngine
from pipeline.backends.feeds import Declared
from pipeline.bundle.manifest_schema import File

logger = logging.getLogger(__name__)
# Of all files of an engine: smaller ones are copied, which takes a moment and needs no conditions.
LEAST_BYTES = 64 * 2**20
# A change within the same tick of a file system's clock as the one before leaves no trace; FAT's ticks are the longest.
SETTLED_NS = 2 * 10**9
# The first onnxruntime that takes external data behind the links of the hub's cache.
FOLLOWS_LINKS = (1, 25)
OTHERS = stat.S_IWGRP | stat.S_IWOTH
ACCESS_LIST = "system.posix_acl_access"


class Identity(NamedTuple):
    """What tells that a file is the same and was not written to. Times: of its content and of its status, in ns."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int


# Hashes of files as this process has read them.
_DIGESTS: dict[Identity, str] = {}


def identity(file: BufferedReader | Path) -> Identity:
    row = os.stat(file if isinstance(file, Path) else file.fileno())
    return Identity(row.st_dev, row.st_ino, row.st_size, row.st_mtime_ns, row.st_ctime_ns)


def digest(file: BufferedReader) -> str:
    """Hexadecimal SHA-256 of an open file; one that this process has hashed before, and that did not change since, is
    not read again."""
    before = identity(file)
    if before in _DIGESTS:
        return _DIGESTS[before]
    settled = time.time_ns() - max(before.modified, before.changed) > SETTLED_NS
    file.seek(0)
    if hasattr(os, "posix_fadvise"):
        # Linux reads ahead in pieces of up to 2 MiB, and whoever later maps the file gets each piece whole into its
        # memory for one number of it: 185 MB instead of 8 for the rows of 120 tokens in a vocabulary's table.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    value = hashlib.file_digest(file, "sha256").hexdigest()
    if os.name == "posix" and settled and identity(file) == before:
        _DIGESTS[before] = value
    return value


@dataclass
class HeldFile:
    """An open file of a bundle, as it was when it was hashed."""

    path: Path
    sha256: str
    file: BufferedReader
    identity: Identity


class HeldFiles:
    """Files that an engine was loaded from, open while it lives. May be checked from any number of threads."""

    def __init__(self, files: Sequence[HeldFile]) -> None:
        self._files = files
        self._hashing = threading.Lock()
        # With the last reference, which a call that outlasts the engine's end may have.
        weakref.finalize(self, _close, [row.file for row in files])

    def refuse_replaced(self) -> None:
        """Raise ContractError where a name is now that of another file than the one that was hashed."""
        self.check()
        for row in self._files:
            if identity(row.path) != row.identity:
                raise ContractError(f"{row.path} was replaced while the engine was loaded; load it again")

    def check(self) -> None:
        """Raise ContractError where a file's bytes have changed."""
        for row in self._files:
            if identity(row.file) != row.identity:
                self._hash_again(row)

    def _hash_again(self, row: HeldFile) -> None:
        with self._hashing:
            now = identity(row.file)
            if digest(row.file) != row.sha256:
                raise ContractError(f"{row.path} was changed after the engine was loaded; load it again")
            row.identity = now


def _close(files: Sequence[BufferedReader]) -> None:
    for file in files:
        file.close()


@dataclass
class HoldingEngine:
    """An engine, and the files that it was loaded from; see Engine."""

    engine: LoadedEngine
    files: HeldFiles | None

    @property
    def declared(self) -> tuple[Declared, ...]:
        """As of the engine."""
        return self.engine.declared

    def run(self, inputs: Arrays) -> Arrays:
        """As of the engine. Raises ContractError, too, where a file was changed under it."""
        files = self.files
        outputs = self.engine.run(inputs)
        if files is not None:
            files.check()
        return outputs

    def close(self) -> None:
        """As of the engine."""
        self.engine.close()
        self.files = None


def held_files(folder: Path, rows: Mapping[str, File]) -> HeldFiles | None:
    """The files `rows` (name -> size, sha256) of a bundle's folder, verified; None where a copy of them is to be used,
    which is then verified itself."""
    if sum(row["size"] for row in rows.values()) < LEAST_BYTES:
        return None
    held = [_held(folder / name, row) for name, row in rows.items()]
    files = HeldFiles([row for row in held if isinstance(row, HeldFile)])
    if reason := next((row for row in held if isinstance(row, str)), None):
        _tell_copied(folder, reason)
        return None
    return files


@cache
def _tell_copied(folder: Path, reason: str) -> None:
    """Once, however often it is loaded."""
    logger.info("%s: its engine is loaded from a private copy, as often as it is: %s", folder, reason)


def _held(path: Path, row: File) -> HeldFile | str:
    """A file, verified and open, or why it is not used in place."""
    if os.name != "posix":
        return "this system does not tell when a file was changed"
    if path.is_symlink() and _onnxruntime() < FOLLOWS_LINKS:
        return f"{path} is a link, which onnxruntime {'.'.join(map(str, _onnxruntime()))} does not follow"
    file = open_file(path)
    if reason := others_may_write(path):
        file.close()
        return reason
    before, value = identity(file), digest(file)
    if value != row["sha256"] or before not in _DIGESTS:
        file.close()
        return f"{path} was changed just now"
    return HeldFile(path, value, file, before)


@cache
def _onnxruntime() -> tuple[int, int]:
    major, minor = version("onnxruntime").split(".")[:2]
    return int(major), int(minor)


def others_may_write(path: Path) -> str | None:
    """By which file, folder or link another user than root and this one may change what `path` stands for; None: by
    none. In words, with the remedy."""
    for place in _way(path.absolute()):
        row = os.lstat(place)
        if row.st_uid not in (0, os.geteuid()):
            return f"{place} belongs to another user; make it root's or your own"
        if stat.S_ISLNK(row.st_mode):
            continue  # its mode means nothing, and who may exchange it is a matter of its folder
        sticky = stat.S_ISDIR(row.st_mode) and row.st_mode & stat.S_ISVTX  # what is in it is its owners' alone
        if row.st_mode & OTHERS and not sticky and not _is_private_group(place, row):
            return f"{place} can be written by other users (mode {stat.S_IMODE(row.st_mode):o}); chmod go-w"
    return None


def _way(path: Path) -> Iterator[Path]:
    """Everything that is looked up on the way to a file, links' targets too."""
    for place in (*reversed(path.parents), path):
        yield place
        if place.is_symlink():
            yield from _way(place.parent / place.readlink())


def _is_private_group(place: Path, row: os.stat_result) -> bool:
    """Is the group that may write it this user's alone, as many systems make one for everybody?"""
    import grp
    import pwd

    if row.st_mode & stat.S_IWOTH or _has_access_list(place):
        return False
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(row.st_gid)
    except KeyError:
        return False
    return user.pw_gid == row.st_gid and user.pw_name == group.gr_name and set(group.gr_mem) <= {user.pw_name}


def _has_access_list(place: Path) -> bool:
    """Are more users named than a mode can tell? So it is said where that cannot be asked."""
    try:
        return ACCESS_LIST in os.listxattr(place)
    except (AttributeError, OSError):
        return True
