"""parity.json read back, for tests that compare it with the report that was written."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Any

from pipeline.verify.report import Gate, LayerResult, Report, SegmentResult, StepResult


def read_report(text: str) -> Report:
    """The report of a parity.json."""
    document = json.loads(text)
    kinds = {"gates": Gate, "layers": LayerResult, "steps": StepResult, "segments": SegmentResult}
    rows = {key: [_row(kind, row) for row in document[key]] for key, kind in kinds.items()}
    return Report(**rows, notes=document["notes"])


def _row(kind: Any, row: dict[str, Any]) -> Any:
    """null stands for nan, and the text "inf" for what JSON lacks; `passed` of a gate follows from the others."""
    types = {field.name: field.type for field in fields(kind)}
    pairs = ((key, value) for key, value in row.items() if key in types)
    return kind(**{key: _number(value) if types[key] == "float" else value for key, value in pairs})


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
