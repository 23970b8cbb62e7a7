"""Target `onnx`: the portable model itself, as it is handed to people, in stock ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from export.errors import ContractError
from pipeline import machine
from pipeline.backends import PORTABLE, stock_runtime
from pipeline.backends.base import (
    DATA,
    MODEL,
    Backend,
    BuildResult,
    Check,
    LoadedEngine,
    LoweredGraph,
    Manifest,
    Options,
)

if TYPE_CHECKING:
    from pipeline.recipe import Recipe


@dataclass(frozen=True)
class PortableOptions(Options):
    """There are none."""

    target: ClassVar[str] = PORTABLE


class PortableBackend(Backend[PortableOptions]):
    """A bundle has it unless it was dropped: its files, model.onnx and model.onnx.data, stand at the bundle's root."""

    options_type = PortableOptions
    package = stock_runtime.PACKAGE
    speed_rank = 6
    polygraphy = "portable"
    quantizes_attention = True  # by its function body, which takes longer than attention in float; it is slow anyway
    slow = True
    file_names = frozenset({MODEL, DATA})
    disk_bytes_per_parameter = 0.0  # every build makes its files
    repeatable = True  # nothing is made: it is looked at as it lies in the bundle

    @property
    def files(self) -> frozenset[str]:
        return self.file_names

    def in_auto(self) -> bool:
        """It is in every bundle, asked for or not."""
        return False

    def checks(self) -> list[Check]:
        return [stock_runtime.check()]

    def fitness_problem(self, manifest: Manifest, source: Path) -> str | None:
        return stock_runtime.fitness_problem(manifest, self.name)

    def problems(self, recipe: Recipe) -> list[str]:
        """Only onnxruntime can be missing: function bodies exist for whatever can be exported."""
        return self.package_problems()

    def lower(self, portable: Path, work_dir: Path, recipe: Recipe) -> LoweredGraph:
        """The portable file as it is, and where its quantized linears are. Raises ContractError if it has none and is
        no autoencoder's."""
        from pipeline.backends.portable.linears import read_linears

        linears = read_linears(portable)
        if not linears and recipe.half is None:
            raise ContractError(f"{portable} has no quantized linear; export the model again")
        return LoweredGraph(portable, tuple(row.probe for row in linears), tuple(row.choice for row in linears))

    def build(self, lowered: LoweredGraph, out_dir: Path, recipe: Recipe) -> BuildResult:
        """Nothing is written: the engine is the file that was exported."""
        return BuildResult((MODEL, DATA), lowered)

    def load(self, bundle_dir: Path, threads: int = 0) -> LoadedEngine:
        from pipeline.backends.portable.engine import PortableEngine

        machine.require((self.package,), "running the portable model")
        return PortableEngine(bundle_dir, threads)
