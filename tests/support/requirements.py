"""What requirements of packages mean on this machine: the installed distributions that they ask for, and their size."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def requirements(rows: Iterable[str]) -> list[Requirement]:
    """Those that hold on this machine and belong to no extra."""
    return [row for row in map(Requirement, rows) if row.marker is None or row.marker.evaluate({"extra": ""})]


def closure(rows: Iterable[str]) -> dict[str, metadata.Distribution]:
    """The installed distributions that requirements ask for, and all that these ask for, by name."""
    distributions: dict[str, metadata.Distribution] = {}
    waiting = requirements(rows)
    while waiting:
        row = waiting.pop()
        if row.name not in distributions:
            distributions[row.name] = metadata.distribution(row.name)
            version = distributions[row.name].version
            assert row.specifier.contains(version, prereleases=True), f"{row} is asked for, {version} is installed"
            waiting += requirements(distributions[row.name].requires or ())
    return distributions


def size_bytes(row: metadata.Distribution) -> int:
    """Size of an installed distribution's files, in bytes."""
    paths = [Path(str(row.locate_file(file))) for file in row.files or ()]
    return sum(path.stat().st_size for path in paths if path.is_file())
