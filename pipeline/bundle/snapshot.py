"""What is verified is what is used: a private copy of files, hashed while it is written.

Between a check and the load a file can be swapped or written to, and onnxruntime maps weights into memory, so that a
file changed in place changes the results of a live engine. So engines are loaded from a copy in a folder of this
user's that nobody else may enter, and the hash is that of the very bytes written there. After loading the copy is
removed: what is still mapped lives on without a name. Large files that nobody else may change are not copied for every
load: in_place.py has them, and what is guaranteed then.

Weights handed over in memory would need no copy on disk, but onnxruntime keeps such buffers beside its packed form
for as long as the session lives: 783 MiB instead of 416 for 400 MB of int8 weights.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from export.cache_folder import OVERRIDE, cache_folder
from export.errors import ContractError, ResourceError
from export.names import is_hub_link
from pipeline.bundle.manifest_schema import File

CHUNK_BYTES = 2**20
REMEDY = "copy or build the bundle again"


@contextmanager
def verified_copy(folder: Path, rows: Mapping[str, File]) -> Iterator[Path]:
    """A private folder with the files `rows` (name -> size, sha256) of `folder`, for as long as the context lasts.

    Raises ContractError where a file is not there or is not as its row says, and ResourceError where the disk is short.
    """
    # Where a system cannot remove what is still mapped (Windows), the copy stays behind.
    place = _place()
    _refuse_full_disk(place or Path(tempfile.gettempdir()), sum(row["size"] for row in rows.values()), folder)
    with tempfile.TemporaryDirectory(prefix="open-", dir=place, ignore_cleanup_errors=True) as private:
        for name, row in rows.items():
            target = Path(private) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as output:
                read_verified(folder, name, row, output)
        yield Path(private)


def _refuse_full_disk(place: Path, needed_bytes: int, source: Path) -> None:
    free = shutil.disk_usage(place).free
    if needed_bytes > free:
        raise ResourceError(
            f"{source}: a private copy of {needed_bytes / 1e6:.1f} MB is made to load it, {free / 1e6:.1f} MB are free "
            f"at {place}; free some space, or set {OVERRIDE} to a folder on another disk"
        )


def read_verified(folder: Path, name: str, row: File, output: BinaryIO) -> None:
    """Write the bytes of a plain file, or of a link of the hub's cache, to `output`. Raises ContractError unless they
    are those of the row."""
    path = folder / name
    if path.is_symlink() and is_hub_link(path, folder):
        path = path.resolve()
    digest, left = hashlib.sha256(), row["size"]
    with open(_descriptor(path), "rb", buffering=0) as source:
        while chunk := source.read(CHUNK_BYTES):
            left -= len(chunk)
            if left < 0:
                break
            digest.update(chunk)
            output.write(chunk)
    if left:
        read = "more" if left < 0 else row["size"] - left
        raise ContractError(f"{path} has {read} bytes, the manifest says {row['size']}; {REMEDY}")
    if digest.hexdigest() != row["sha256"]:
        raise ContractError(f"{path} differs from the manifest (sha256); {REMEDY}")


def _descriptor(path: Path) -> int:
    """An open plain file: no link is followed and no pipe waited for."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise ContractError(f"{path} cannot be read as a plain file ({error.strerror}); {REMEDY}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ContractError(f"{path} is not a plain file; {REMEDY}")
    return descriptor


def _place() -> Path | None:
    """The user's cache folder, which lies on a disk where /tmp may be memory; None: the system's temporary folder."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None
