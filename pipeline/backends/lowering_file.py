"""lowering.json: what a lowering chose and where its quantized linears are, next to the engine it belongs to; and the
record of a finished target in the work folder, from which a resumed build reads what that stage gave.

Apart from metadata_file, which is all that engines read: a lowering is read again by gates and builds alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path

from typing_extensions import TypedDict

from export.documents import Rules, read_json
from export.names import inside
from pipeline.backends.base import BuildResult, LoweredGraph
from pipeline.files import write_json
from pipeline.passes.probes import Choice, ProbeRow

SCHEMA_VERSION = 1
RULES = Rules(
    remedy="build the engine again", version=SCHEMA_VERSION, version_remedy="build the engine again", extra="forbid"
)
NAME = "lowering.json"
# Fields of a probe row that are written only where they say something.
OPTIONAL_NAMES = ("low_rank", "gemm_groups", "gemm_columns", "codes_format", "operands")
OPTIONAL = {field.name: field.default for field in fields(ProbeRow) if field.name in OPTIONAL_NAMES}


class LoweringFile(TypedDict):
    """graph: name of the lowered graph, in the folder of this file or below."""

    schema_version: int
    graph: str
    choices: list[Choice]
    probes: list[ProbeRow]


def write(lowered: LoweredGraph, path: Path) -> None:
    """Write probes and choices as JSON; `lowered.path` is stored relative to the file's folder where it lies there."""
    below = lowered.path.is_relative_to(path.parent)
    document = {
        "schema_version": SCHEMA_VERSION,
        "graph": lowered.path.relative_to(path.parent).as_posix() if below else lowered.path.name,
        "choices": [asdict(choice) for choice in lowered.choices],
        "probes": [_stated(asdict(probe)) for probe in lowered.probes],
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> LoweredGraph:
    """Inverse of `write`. Raises ContractError for another schema or a damaged file."""
    document = read_json(path, LoweringFile, RULES)
    graph = inside(path.parent, document["graph"], path)
    return LoweredGraph(graph, tuple(map(_without_empty_names, document["probes"])), tuple(document["choices"]))


def _stated(row: dict) -> dict:
    """A probe without what few layers have; the absent names of others are empty."""
    stated = {key: value for key, value in row.items() if key not in OPTIONAL or value != OPTIONAL[key]}
    return {key: "" if value is None else value for key, value in stated.items()}


def _without_empty_names(row: ProbeRow) -> ProbeRow:
    """The inverse of what `_stated` writes for an absent name."""
    return replace(row, act_scale=row.act_scale or None, gemm_scale=row.gemm_scale or None)


# --- the record of a target's stage ----------------------------------------------------------------------------------


class ResultFile(TypedDict):
    """What a target stage gave, see BuildResult."""

    files: list[str]
    metadata: dict[str, object]


def record_names(target: str) -> tuple[str, str]:
    """The two files of a record, in the work folder: above the lowered graph, wherever that lies."""
    return f"{target}.result.json", f"{target}.lowering.json"


def write_record(result: BuildResult, folder: Path, target: str) -> None:
    """Write the record of `target` into the work folder."""
    result_name, lowering_name = record_names(target)
    write(result.lowered, folder / lowering_name)
    write_json(folder / result_name, {"files": list(result.files), "metadata": dict(result.metadata)})


def read_record(folder: Path, target: str) -> BuildResult:
    """Inverse of `write_record`. Raises ContractError for a damaged record."""
    result_name, lowering_name = record_names(target)
    document = read_json(folder / result_name, ResultFile)
    for name in document["files"]:
        inside(folder, name, folder / result_name)
    return BuildResult(tuple(document["files"]), read(folder / lowering_name), document["metadata"])
