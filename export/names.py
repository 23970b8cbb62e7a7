"""Names of files that come out of a file: they may only mean files inside the folder that the file describes.

Every name in a manifest, a generation.json, an index of shards, a lowering file or the external data of an ONNX file
passes `inside` before it is read or written. Names are judged by the rules of all systems at once, since a folder made
on one is used on another.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath

from export.errors import ContractError, UserError

# Characters that some system reads as a separator, a drive, a stream or a pattern, and control characters.
FORBIDDEN = re.compile(r'[\\:*?"<>|\x00-\x1f\x7f-\x9f\ud800-\udfff]')
MOST_BYTES = 255
REMEDY = "do not use this folder, get it from its source"


def inside(folder: Path, name: str, named_in: Path, error: type[UserError] = ContractError) -> Path:
    """The path of the file called `name` in `folder`, which need not exist.

    name: as the file `named_in` has it, a relative path with "/" between its parts. Raises `error` if it could mean
    anything outside of the folder: by "..", as an absolute path, by a drive, by a link that leads out.
    """
    check_name(name, named_in, error)
    path = folder / name
    try:
        is_inside = leads_inside(path, folder)
    except UnicodeEncodeError as reason:
        raise error(f"{named_in}: file {name!r} cannot be named in this system's encoding; use UTF-8") from reason
    if not is_inside:
        raise error(f"{named_in}: file {name!r} leaves the folder by a link; {REMEDY}, or copy it with cp -rL")
    return path


def check_name(name: str, named_in: Path, error: type[UserError] = ContractError) -> None:
    """Raise `error` if `name` is no relative path of a file on every system; no file is looked at."""
    if why := _wrong(name):
        raise error(f"{named_in}: file {name!r} {why}; {REMEDY}")


def _wrong(name: str) -> str | None:
    """Why `name` is no relative path of a file on every system; None if it is one."""
    parts = name.split("/")
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor or ".." in parts or "\\" in name:
        return "leaves the folder"
    if FORBIDDEN.search(name) or any(map(_is_no_name, parts)):
        return "leaves the folder on some systems, or cannot be a name there"
    return None


def _is_no_name(part: str) -> bool:
    """Is there a system on which no file can have this name?"""
    too_long = len(part.encode()) > MOST_BYTES
    return too_long or part in ("", ".") or part[-1] in ". " or PureWindowsPath(part).is_reserved()


def leads_inside(path: Path, folder: Path) -> bool:
    """Does `path` lie in `folder`, or in the hub's cache beside it, when all links are followed?"""
    return path.resolve().is_relative_to(folder.resolve()) or is_hub_link(path, folder)


def is_hub_link(path: Path, folder: Path) -> bool:
    """Does `path`, below `folder`, end where the hub's cache keeps the content of its file?

    That is REPOSITORY/blobs/HASH for a link below REPOSITORY/snapshots/REVISION, and nothing deeper. It need not exist.
    """
    snapshots = next((parent for parent in folder.resolve().parents if parent.name == "snapshots"), None)
    if snapshots is None:
        return False
    blobs = snapshots.parent / "blobs"
    return path.resolve().parent == blobs and not blobs.is_symlink()


def as_one_name(name: str) -> str:
    """Equal for two names that are one file where case, or the form of accents, does not matter."""
    return unicodedata.normalize("NFC", name).casefold()


def distinct(names: Iterable[str], named_in: Path) -> None:
    """Raise ContractError if two of the names are one file where case, or the form of accents, does not matter."""
    known: dict[str, str] = {}
    for name in names:
        other = known.setdefault(as_one_name(name), name)
        if other != name:
            raise ContractError(f"{named_in}: {other!r} and {name!r} are one file on some systems; {REMEDY}")
