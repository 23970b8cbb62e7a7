"""lowering.json: what a lowering chose and where its quantized linears are, next to the engine it belongs to."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path

from export.errors import ContractError
from pipeline.backends.base import Choice, LoweredGraph, ProbeRow

SCHEMA_VERSION = 1
NAME = "lowering.json"
# Fields of a probe row that are written only where they say something.
OPTIONAL_NAMES = ("low_rank", "gemm_groups", "gemm_columns")
OPTIONAL = {field.name: field.default for field in fields(ProbeRow) if field.name in OPTIONAL_NAMES}


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
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = document.get("schema_version")
        if found != SCHEMA_VERSION:
            raise ContractError(f"{path}: schema {found}, this version reads {SCHEMA_VERSION}; build the engine again")
        choices = tuple(Choice(**row) for row in document["choices"])
        probes = tuple(ProbeRow(**{**row, **_tuples(row)}) for row in document["probes"])
        return LoweredGraph(path.parent / document["graph"], probes, choices)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ContractError(f"{path} is not a lowering file ({error}); build the engine again") from error


def _stated(row: dict) -> dict:
    """A probe without what few layers have."""
    return {key: value for key, value in row.items() if key not in OPTIONAL or value != OPTIONAL[key]}


def _tuples(row: dict) -> dict:
    return {key: tuple(row[key]) for key in ("codes", "limb_weights", "gemm_columns") if key in row}
