"""What a target is: a lowering, a builder, and an engine that runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from pipeline.passes.probes import Capabilities, Choice, ProbeRow

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class LoweredGraph:
    """A lowered ONNX file, where its quantized linears are, and what was chosen for each."""

    path: Path
    probes: tuple[ProbeRow, ...]
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class BuildResult:
    """Files written by a backend (relative to the bundle), its lowered graph, and facts for the manifest.

    `lowered.path` is an ONNX file that stock onnxruntime runs; for `rtx` it is the very graph given to the builder.
    """

    files: tuple[str, ...]
    lowered: LoweredGraph
    metadata: Mapping[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """A built denoiser. Inputs and outputs are NumPy arrays named as in the portable model.

    Both methods may be called from any number of threads at once: each call of `run` gets the results of its own
    inputs, or RecipeError in words where they do not fit (see `feeds`) or the engine is closed.
    """

    def run(self, inputs: Arrays) -> Arrays: ...

    def close(self) -> None: ...


class Backend(Protocol):
    """One row of `pipeline.backends.BACKENDS`."""

    name: str
    capabilities: Capabilities

    def problems(self, recipe: Any) -> list[str]:
        """What this machine or recipe lacks for a build, as messages with a remedy; empty if nothing."""
        ...

    def lower(self, portable: Path, work_dir: Path, recipe: Any) -> LoweredGraph:
        """Lower the portable model (path of model.onnx) into an ONNX file under `work_dir`; deterministic bytes."""
        ...

    def build(self, lowered: LoweredGraph, out_dir: Path, recipe: Any) -> BuildResult:
        """Make the engine from the lowered graph and write it into `out_dir` (the target's folder of the bundle)."""
        ...

    def load(self, bundle_dir: Path, threads: int = 0) -> Engine:
        """Engine of a folder of verified files that may go once it is loaded.

        threads: of one call, for engines that compute on the CPU; 0: as many as `machine.threads` allows."""
        ...
