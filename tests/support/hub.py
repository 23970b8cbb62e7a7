"""Folders laid out as the hub's cache does: snapshots/REVISION/NAME links to blobs/SHA256."""

from __future__ import annotations

import shutil
from pathlib import Path

from export.documents import sha256

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def snapshot(folder: Path, repository: Path, below: str = "", commit: str = COMMIT, ref: str = "main") -> Path:
    """Copy `folder` into the cache folder of a repository; returns where it lies, `below` its snapshot."""
    target = repository / "snapshots" / commit / below
    (repository / "blobs").mkdir(parents=True, exist_ok=True)
    for path in folder.rglob("*"):
        if path.is_file():
            blob, link = repository / "blobs" / sha256(path), target / path.relative_to(folder)
            shutil.copyfile(path, blob)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(Path(*[".."] * (len(link.relative_to(repository).parts) - 1), "blobs", blob.name))
    (repository / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / ref).write_text(commit, encoding="utf-8")
    return target
