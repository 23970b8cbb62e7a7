"""lowering.json: what a lowering chose and where its quantized linears are, next to the engine it belongs to."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path

from typing_extensions import TypedDict

from export.documents import Rules, read_json
from export.names import inside
from pipeline.backends.base import LoweredGraph
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
    inside = lowered.path.is_relative_to(path.parent)
    document = {
        "schema_version": SCHEMA_VERSION,
        "graph": lowered.path.relative_to(path.parent).as_posix() if inside else lowered.path.name,
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
