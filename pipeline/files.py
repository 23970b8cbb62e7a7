"""Files that are either whole or absent: atomic writes, streamed hashes, published folders, locks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from export.errors import RecipeError

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Libraries that write in their own way report a full disk in their own words: safetensors (Rust), NumPy's tofile.
DISK_MESSAGES = re.compile(
    rf"no space left on device|quota exceeded|file too large|os error ({'|'.join(map(str, DISK_ERRORS))})\b"
    r"|\d+ requested and \d+ written",
    re.IGNORECASE,
)


def is_out_of_disk(error: BaseException) -> bool:
    """Did writing fail for lack of space (or of quota, or of the allowed file size)?"""
    return (isinstance(error, OSError) and error.errno in DISK_ERRORS) or bool(DISK_MESSAGES.search(str(error)))


def sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_json(document: Any) -> str:
    """SHA-256 of a JSON document, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, document: Any) -> None:
    """Write a JSON file through a temporary name, so that a reader finds the old one or the new one."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    sync(part)
    os.replace(part, path)


def sync(path: Path) -> None:
    """Have the system write a file (or the entries of a folder) to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(folder: Path, who: str) -> int:
    """Lock a folder until the descriptor that is returned is closed, or the process ends in whatever way.

    Raises RecipeError if another `who` ("build") holds it.
    """
    import fcntl  # not on Windows, where bundles are loaded with this module

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        remedy = "wait for it, or choose another --output-dir"
        raise RecipeError(f"another {who} is writing {folder}; {remedy}") from error
    return descriptor


def tree(folder: Path) -> list[str]:
    """All files and links under `folder` as relative posix paths, sorted; linked folders are not entered."""
    found = []
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        found += [(Path(parent) / name).relative_to(folder).as_posix() for name in names + links]
    return sorted(found)


def is_hub_link(path: Path, folder: Path) -> bool:
    """Is a link in `folder` one of the hub's cache, REPOSITORY/snapshots/REVISION/... -> REPOSITORY/blobs/HASH?

    It must end at a plain file right in the `blobs` of the same repository, whose `snapshots` hold the folder.
    """
    snapshots = next((parent for parent in folder.resolve().parents if parent.name == "snapshots"), None)
    if snapshots is None:
        return False
    target, blobs = path.resolve(), snapshots.parent / "blobs"
    return target.parent == blobs and target.is_file() and not blobs.is_symlink()


def sync_tree(folder: Path) -> None:
    """`sync` for every file and folder below, and for the folder itself."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(parent) / name)
        sync(Path(parent))


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
    sync_tree(folder)
    if destination.exists():
        remove(aside)
        os.rename(destination, aside)
    os.rename(folder, destination)
    sync(destination.parent)
    remove(aside)
