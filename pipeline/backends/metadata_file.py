"""metadata.json of a target: what an engine needs and takes. The same facts stand in the manifest's row of the target.

Only what is read again has a type here; every backend writes more for people.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypeVar

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
    """requires: capabilities without which the engine is not exact, see pipeline/passes/probes.py."""

    requires: list[str]


class Lowered(TypedDict):
    """Hashes of the lowered graph that the engine of a GPU was built from."""

    onnx_sha256: Sha256
    onnx_data_sha256: Sha256


class RtxNeeds(TypedDict):
    """The release that loads the engine, and the GPUs that it holds code for."""

    tensorrt_rtx: str
    compute_capabilities: list[ComputeCapability]


class TrtNeeds(TypedDict):
    """As RtxNeeds."""

    tensorrt: str
    compute_capabilities: list[ComputeCapability]


class CudaNeeds(TypedDict):
    """The least GPU that runs the engine."""

    least_sm: NotRequired[ComputeCapability]


class CpuNeeds(TypedDict):
    """As CpuMetadata."""

    requires: NotRequired[list[str]]


class Shapes(TypedDict):
    """shapes: least, usual and largest shape of every input."""

    shapes: dict[str, tuple[list[Size], list[Size], list[Size]]]


class RtxMetadata(RtxNeeds, Shapes):
    """metadata.json of the target rtx."""


class TrtMetadata(TrtNeeds, Shapes):
    """metadata.json of the target trt."""


class CudaInput(TypedDict):
    """A size that may vary is given by its name."""

    dtype: str
    shape: list[Size | str]


class CudaOptions(TypedDict):
    """Of the recipe, see recipe.Cuda."""

    weights: Literal["auto", "packed", "expanded"]
    activations: Literal["fp16", "fp32"]


class CudaMetadata(CudaNeeds):
    """metadata.json of the target cuda."""

    options: CudaOptions
    inputs: dict[str, CudaInput]


NEEDS: dict[str, Any] = {"cpu": CpuNeeds, "rtx": RtxNeeds, "cuda": CudaNeeds, "trt": TrtNeeds}
T = TypeVar("T")


def read(folder: Path, schema: type[T], rules: Rules = RULES) -> T:
    """metadata.json in the folder of a target. Raises ContractError for a damaged file or another schema."""
    return read_json(folder / NAME, schema, rules)


def check_needs(target: str, metadata: Any, source: Path) -> None:
    """What the manifest `source` says that `target` needs. Raises ContractError."""
    if target in NEEDS:
        validated(metadata, f"{source}: targets.{target}.metadata", NEEDS[target], RULES)


def lowered_hashes(target: str, metadata: Any, source: Path) -> Lowered:
    """Of the graph that the engine of `target` was built from, as the manifest `source` says. Raises ContractError."""
    return validated(metadata, f"{source}: targets.{target}.metadata", Lowered, RULES)
