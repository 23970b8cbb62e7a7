"""A BuildResult as JSON in the work folder, so that a resumed build knows what a finished target stage gave."""

from __future__ import annotations

from pathlib import Path

from typing_extensions import TypedDict

from export.documents import read_json
from export.names import inside
from pipeline.backends import lowering_file
from pipeline.backends.base import BuildResult
from pipeline.files import write_json


class ResultFile(TypedDict):
    """What a target stage gave, see BuildResult."""

    files: list[str]
    metadata: dict[str, object]


def names(target: str) -> tuple[str, str]:
    """The two files of a record, in the work folder: above the lowered graph, wherever that lies."""
    return f"{target}.result.json", f"{target}.lowering.json"


def write(result: BuildResult, folder: Path, target: str) -> None:
    """Write the record of `target` into the work folder."""
    result_name, lowering_name = names(target)
    lowering_file.write(result.lowered, folder / lowering_name)
    write_json(folder / result_name, {"files": list(result.files), "metadata": dict(result.metadata)})


def read(folder: Path, target: str) -> BuildResult:
    """Inverse of `write`. Raises ContractError for a damaged record."""
    result_name, lowering_name = names(target)
    document = read_json(folder / result_name, ResultFile)
    for name in document["files"]:
        inside(folder, name, folder / result_name)
    return BuildResult(tuple(document["files"]), lowering_file.read(folder / lowering_name), document["metadata"])
