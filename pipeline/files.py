"""Folders that are whole or absent: locked while they are written, published, and what a full disk says; JSON files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from export.documents import whole_file
from export.errors import RecipeError

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Libraries that write in their own way report a full disk in their own words: safetensors (Rust), NumPy's tofile.
DISK_MESSAGES = re.compile(
    rf"no space left on device|quota exceeded|file too large|os error ({'|'.join(map(str, DISK_ERRORS))})\b"
    r"|\d+ requested and \d+ written",
    re.IGNORECASE,
)
# Messages by which libraries report exhausted memory in an exception of their own kind.
OUT_OF_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "bad_alloc",
    "bad allocation",
    "out of memory",
    "failed to allocate memory",
    "can't start new thread",
)
# Either makes a folder a bundle, in which nothing else may be written: of one model, and of a pipeline's components.
MANIFEST_FILE, PIPELINE_FILE = "manifest.json", "pipeline.json"


class HeldError(RecipeError):
    """Another process writes into a folder at this time."""


def is_bundle(folder: Path) -> bool:
    """Is the folder sealed as a bundle, whole or not?"""
    return any((folder / name).is_file() for name in (MANIFEST_FILE, PIPELINE_FILE))


def is_out_of_disk(error: BaseException) -> bool:
    """Did writing fail for lack of space (or of quota, or of the allowed file size)?"""
    return (isinstance(error, OSError) and error.errno in DISK_ERRORS) or bool(DISK_MESSAGES.search(str(error)))


def is_out_of_memory(error: BaseException) -> bool:
    """Did memory run out, in Python or in a library that says so in its own words?"""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in OUT_OF_MEMORY)


def sha256_json(document: object) -> str:
    """SHA-256 of a JSON document, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, document: object) -> None:
    """Write a JSON file, which is then on the disk; a reader finds the old one or the new one."""
    with whole_file(path) as part:
        part.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        sync(part)


def sync(path: Path) -> None:
    """Have the system write a file (or the entries of a folder) to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(folder: Path, who: str) -> int:
    """Lock a folder until the descriptor that is returned is closed, or the process ends in whatever way.

    Raises HeldError naming the process if another `who` ("build") holds it.
    """
    import fcntl  # not on Windows, where bundles are loaded with this module

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = _holder(descriptor)
        os.close(descriptor)
        remedy = "wait for it, stop it, or write to another folder"
        raise HeldError(f"another {who}{holder} is writing {folder}; {remedy}") from error
    if not _is_at(descriptor, folder):  # its holder removed it between our two calls
        os.close(descriptor)
        raise HeldError(f"another {who} ended and removed {folder} at this moment; run the command again")
    return descriptor


@contextmanager
def locked(folder: Path, who: str) -> Iterator[None]:
    """Within, `lock`."""
    descriptor = lock(folder, who)
    try:
        yield
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    """The process that locked a file, in words; "" where the system does not tell (Linux does)."""
    table, locked = Path("/proc/locks"), os.fstat(descriptor)
    place = f"{os.major(locked.st_dev):02x}:{os.minor(locked.st_dev):02x}:{locked.st_ino}"
    rows = [line.split() for line in table.read_text(encoding="utf-8").splitlines()] if table.is_file() else []
    holders = [row[4] for row in rows if len(row) > 5 and row[1] == "FLOCK" and row[5] == place]
    return f" (process {holders[0]})" if holders else ""


def _is_at(descriptor: int, path: Path) -> bool:
    """Is the open folder still the one of that name?"""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def refuse_unwritable(path: Path, is_folder: bool, flag: str) -> None:
    """Raise RecipeError, before any work, if no file (or folder) can be written at `path`, which `flag` names."""
    if path.exists() and (path.is_dir() != is_folder or not (path.is_dir() or path.is_file())):
        kind = "a folder" if path.is_dir() else "a file" if path.is_file() else "no plain file"
        raise RecipeError(f"{path} is {kind}; give {flag} the name of a {'folder' if is_folder else 'file'}")
    refuse_in_bundle(path.resolve().parents, path, flag)
    parent = next(place for place in (path.absolute(), *path.absolute().parents) if os.path.lexists(place))
    if parent == path.absolute() and not is_folder:
        parent = parent.parent
    if not parent.is_dir():
        raise RecipeError(f"{parent} is not a folder, so {path} cannot be written; choose another {flag}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RecipeError(f"{parent} may not be written to; choose another {flag}, or change its permissions")


def refuse_in_bundle(folders: Iterable[Path], path: Path, flag: str) -> None:
    """Raise RecipeError if one of `folders` is a bundle, which a file at `path` would damage: it is sealed."""
    if bundle := next((folder for folder in folders if is_bundle(folder)), None):
        raise RecipeError(f"{path} is in the bundle {bundle}, which a new file would damage; choose another {flag}")


def tree(folder: Path) -> list[str]:
    """All files and links under `folder` as relative posix paths, sorted; linked folders are not entered."""
    paths = []
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        paths += [(Path(parent) / name).relative_to(folder).as_posix() for name in names + links]
    return sorted(paths)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def publish(folder: Path, destination: Path, aside: Path) -> None:
    """Rename the finished `folder` to `destination`; what stood there is first moved to `aside` and then removed.

    All three are on one file system. A stop in between leaves the old folder at `aside` or nothing of it, never a
    mixture at `destination`.
    """
    for parent, _, names in os.walk(folder, topdown=False):
        for path in (*(Path(parent, name) for name in names), Path(parent)):
            sync(path)
    if destination.exists():
        remove(aside)
        os.rename(destination, aside)
    os.rename(folder, destination)
    sync(destination.parent)
    remove(aside)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `output` at the end, if nothing was raised."""
    destination = output.absolute()
    partial, aside = (destination.with_name(f"{destination.name}.{end}") for end in ("partial", "replaced"))
    remove(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        publish(partial, destination, aside)
    finally:
        remove(partial)
