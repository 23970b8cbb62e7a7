"""Types of manifest.json: what is read of it again. Keys beyond these may stand there and stay.

Apart from manifest.py, which takes what a build found: a bundle is opened, copied and shown by these types alone.
"""

from __future__ import annotations

from typing import Annotated, NotRequired

from annotated_types import Ge, Lt, MinLen
from typing_extensions import TypedDict

from pipeline.backends.metadata_file import Sha256
from pipeline.bundle.stages import StageTime

Bytes = Annotated[int, Ge(0), Lt(2**60)]
Count = Annotated[int, Ge(0), Lt(2**31)]
Name = Annotated[str, MinLen(1)]


class MergedAdapter(TypedDict):
    """An adapter that is part of the float model."""

    file: Name
    sha256: Sha256
    scale: float


class Model(TypedDict):
    """Where the float model came from. sha256: of its weights; where adapters are merged into them, of both."""

    source: Name
    revision: str
    sha256: Sha256
    family: Name
    adapters: NotRequired[list[MergedAdapter]]  # where there are any


class LowRank(TypedDict):
    """Low-rank branches beside a layer."""

    branches: Count
    rank: Count


class Layer(TypedDict):
    """One quantized linear; shape: [N, K]."""

    name: Name
    kind: str
    shape: tuple[Count, Count]
    weight_format: str
    activation_format: str
    granularity: str
    group_size: Count
    size_bytes: Bytes
    activation_scaling: NotRequired[str]
    activation_group: NotRequired[Count]
    activation_scale: NotRequired[float]
    activation_zero: NotRequired[float]
    balance: NotRequired[list[str]]
    low_rank: NotRequired[LowRank]


class Kept(TypedDict):
    """A layer that is not quantized, and why."""

    name: str
    reason: str


class Counts(TypedDict):
    """formats: "weight x activation" to layers."""

    quantized: Count
    kept: Count
    formats: dict[str, Count]


class Sizes(TypedDict):
    """Bytes of the quantized weights, of the same in fp16, and of all files of the bundle."""

    quantized_weights: Bytes
    same_weights_fp16: Bytes
    all_files: Bytes


class Chosen(TypedDict):
    """What a lowering chose for a layer, and why."""

    path: str
    why: str


class Target(TypedDict):
    """metadata: see pipeline/backends/metadata_file.py."""

    files: list[str]
    metadata: dict[str, object]
    choices: dict[str, Chosen]


class File(TypedDict):
    """Size in bytes and sha256 in hexadecimal digits."""

    size: Bytes
    sha256: Sha256


class Manifest(TypedDict):
    """The whole document. key: of everything that decides the bundle's bytes; bundles of earlier versions lack it.
    recipe: see pipeline/recipe.py."""

    schema_version: int
    key: NotRequired[Sha256]
    engine: Name
    recipe: dict[str, object]
    model: Model
    layers: list[Layer]
    kept: list[Kept]
    counts: Counts
    bytes: Sizes
    targets: Annotated[dict[str, Target], MinLen(1)]
    files: dict[str, File]
    tools: dict[str, str]
    code: str
    machine: dict[str, object]
    created: str
    stages: list[StageTime]
