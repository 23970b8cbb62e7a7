"""A folder of results that can be made again: written atomically, read by several processes, never trusted.

An entry is one file: the SHA-256 of the rest in hexadecimal, a line feed, JSON. An entry that is cut off, changed or
of another version is removed as if it were not there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from export.cache_folder import cache_folder

log = logging.getLogger(__name__)


def folder() -> Path:
    """Where compiled kernels lie."""
    return cache_folder("kernels")


def key_of(parts: Any) -> str:
    """Name of the entry for JSON-like `parts`: 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def read(key: str) -> Any | None:
    """The value of an entry, None if there is none. A damaged entry is removed with a warning."""
    path = folder() / key
    try:
        digest, _, body = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    if digest.decode(errors="replace") != hashlib.sha256(body).hexdigest():
        log.warning("%s is damaged; it is removed and made again", path)
        path.unlink(missing_ok=True)
        return None
    return json.loads(body)


def write(key: str, value: Any) -> None:
    """Write an entry beside its place and rename it, so that no reader ever sees a part of it."""
    folder().mkdir(parents=True, exist_ok=True)
    body = json.dumps(value).encode()
    with tempfile.NamedTemporaryFile(dir=folder(), prefix=f".{key}-", delete=False) as file:
        try:
            file.write(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, folder() / key)
        finally:
            Path(file.name).unlink(missing_ok=True)  # there only if something failed
