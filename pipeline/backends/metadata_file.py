"""metadata.json of a target: what an engine needs and takes. The same facts stand in the manifest's row of the target.

Only what is read again has a type here; every backend writes more for people.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NotRequired, TypeVar

from annotated_types import Ge, Len, Lt
from typing_extensions import TypedDict

from export.documents import Rules, read_json, validated

NAME = "metadata.json"
RULES = Rules(remedy="build the engine again")
VERSION_1 = Rules(remedy="build the engine again", version=1)

Sha256 = Annotated[str, Len(64, 64)]
ComputeCapability = Annotated[int, Ge(10), Lt(1000)]
Size = Annotated[int, Ge(0), Lt(2**31)]


class CpuMetadata(TypedDict):
    """requires: capabilities without which the engine is not exact, see pipeline/backends/base.py."""

    requires: list[str]


class GpuMetadata(TypedDict):
    """The hashes are those of the lowered graph that the engine was built from."""

    onnx_sha256: Sha256
    onnx_data_sha256: Sha256


class RtxMetadata(GpuMetadata):
    """shapes: least, usual and largest shape of every input."""

    tensorrt_rtx: str
    compute_capabilities: list[ComputeCapability]
    shapes: dict[str, tuple[list[Size], list[Size], list[Size]]]


class TrtMetadata(GpuMetadata):
    """As RtxMetadata."""

    tensorrt: str
    compute_capabilities: list[ComputeCapability]
    shapes: dict[str, tuple[list[Size], list[Size], list[Size]]]


class CudaInput(TypedDict):
    """A size that may vary is given by its name."""

    dtype: str
    shape: list[Size | str]


class CudaMetadata(GpuMetadata):
    """options: of the recipe, see recipe.Cuda."""

    least_sm: NotRequired[ComputeCapability]
    options: dict[str, str]
    inputs: dict[str, CudaInput]


SCHEMAS: dict[str, Any] = {"cpu": CpuMetadata, "rtx": RtxMetadata, "cuda": CudaMetadata, "trt": TrtMetadata}
T = TypeVar("T")


def read(folder: Path, schema: type[T], rules: Rules = RULES) -> T:
    """metadata.json in the folder of a target. Raises ContractError for a damaged file or another schema."""
    return read_json(folder / NAME, schema, rules)


def check(target: str, metadata: Any, source: Path) -> None:
    """The manifest's copy of the metadata of `target`. Raises ContractError naming `source`."""
    if target in SCHEMAS:
        validated(metadata, f"{source}: targets.{target}.metadata", SCHEMAS[target], RULES)
