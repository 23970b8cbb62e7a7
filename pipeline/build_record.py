"""A BuildResult as JSON in the work folder, so that a resumed build knows what a finished target stage gave."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.backends.base import BuildResult, Choice, LoweredGraph, ProbeRow
from pipeline.files import write_json


def write_result(result: BuildResult, path: Path, root: Path) -> None:
    """Write `result` to `path`; the lowered graph's file is noted relative to `root`."""
    document = asdict(result) | {"metadata": dict(result.metadata)}
    document["lowered"]["path"] = result.lowered.path.relative_to(root).as_posix()
    write_json(path, document)


def read_result(path: Path, root: Path) -> BuildResult:
    """Inverse of `write_result`."""
    document: dict[str, Any] = json.loads(path.read_text())
    lowered = document["lowered"]
    probes = tuple(_probe(row) for row in lowered["probes"])
    graph = LoweredGraph(root / lowered["path"], probes, tuple(Choice(**row) for row in lowered["choices"]))
    return BuildResult(tuple(document["files"]), graph, document["metadata"])


def _probe(row: dict[str, Any]) -> ProbeRow:
    lists = {key: tuple(row[key]) for key in ("codes", "limb_weights")}
    return ProbeRow(**{**row, **lists})
