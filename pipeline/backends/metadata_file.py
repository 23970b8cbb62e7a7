"""metadata.json of a target: what an engine needs and takes. The same facts stand in the manifest's row of the target.

Every engine has the types of what is read of its own again; backends write more for people.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

from annotated_types import Ge, Len, Lt
from typing_extensions import TypedDict

from export.documents import Rules, read_json

NAME = "metadata.json"
RULES = Rules(remedy="build the engine again")
VERSION_1 = Rules(remedy="build the engine again", version=1)

Sha256 = Annotated[str, Len(64, 64)]
ComputeCapability = Annotated[int, Ge(10), Lt(1000)]
Size = Annotated[int, Ge(0), Lt(2**31)]


class LoweredHashes(TypedDict):
    """Hashes of the lowered graph that the engine of a GPU was built from."""

    onnx_sha256: Sha256
    onnx_data_sha256: Sha256


class Shapes(TypedDict):
    """shapes: least, usual and largest shape of every input."""

    shapes: dict[str, tuple[list[Size], list[Size], list[Size]]]


T = TypeVar("T")


def read(folder: Path, schema: type[T], rules: Rules = RULES) -> T:
    """metadata.json in the folder of a target. Raises ContractError for a damaged file or another schema."""
    return read_json(folder / NAME, schema, rules)
