"""Target `ort_cuda`: the lowered graph in ops that onnxruntime's CUDA execution provider has, for onnxruntime-gpu."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pipeline import machine
from pipeline.backends import lowering_file, metadata_file, stock_runtime
from pipeline.backends.base import (
    DATA,
    MODEL,
    Arithmetic,
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
class OrtCudaOptions(Options):
    """attention: as that of `rtx`."""

    target: ClassVar[str] = "ort_cuda"
    attention: Literal["fp16", "fp32"] = "fp16"


class OrtCudaBackend(Backend[OrtCudaOptions]):
    """Builds anywhere, as nothing is compiled: the engine is the lowered graph, which any machine proves on its CPU.

    No GPU was at hand: its graph is built and proven, not run by the CUDA execution provider.
    """

    options_type = OrtCudaOptions
    package = stock_runtime.PACKAGE
    needs_gpu = True
    speed_rank = 4
    polygraphy = "graphs"
    file_names = frozenset({MODEL, DATA, metadata_file.NAME, lowering_file.NAME})
    disk_bytes_per_parameter = 2.5  # FP16 weights, where groups have real scales
    repeatable = True

    def in_auto(self) -> bool:
        """Built only where it is named."""
        return False

    def checks(self) -> list[Check]:
        """Which onnxruntime is installed, the execution providers that it has, and what runs on them here."""
        from pipeline.backends.ort_cuda.engine import machine_problem

        providers = stock_runtime.providers()
        problem = machine_problem(providers, machine.cuda_sm())
        packages = ", ".join(f"{name} {version}" for name, version in stock_runtime.packages().items())
        found = f"{packages or 'not installed'}; providers: {', '.join(providers) or 'none'}; built, not run"
        remedy = f"only needed to run the target ort_cuda; {problem or 'all is here'}"
        return [Check("ort_cuda", problem is None, found, False, remedy)]

    def fitness_problem(self, manifest: Manifest, source: Path) -> str | None:
        from pipeline.backends.ort_cuda.engine import machine_problem

        return machine_problem(stock_runtime.providers(), machine.cuda_sm()) or stock_runtime.fitness_problem(
            manifest, self.name
        )

    def problems(self, recipe: Recipe) -> list[str]:
        """Activations and attention that no lowering takes, and a missing onnxruntime."""
        from pipeline.backends.ort_cuda import build

        return [*self.package_problems(), *build.problems(recipe), *self.problems_of_gpus(recipe)]

    def lower(self, portable: Path, work_dir: Path, recipe: Recipe) -> LoweredGraph:
        from pipeline.backends.ort_cuda import build

        return build.lower(portable, work_dir, self.options(recipe))

    def build(self, lowered: LoweredGraph, out_dir: Path, recipe: Recipe) -> BuildResult:
        from pipeline.backends.ort_cuda import build

        return build.build(lowered, out_dir)

    def load(self, bundle_dir: Path, threads: int = 0) -> LoadedEngine:
        from pipeline.backends.ort_cuda.engine import OrtCudaEngine

        return OrtCudaEngine(bundle_dir / self.name, threads)

    def arithmetic(self, recipe: Recipe, runs_here: bool) -> Arithmetic:
        return self.options(recipe).attention
