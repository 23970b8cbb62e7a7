"""Target `cpu`: integer GEMMs in ONNX Runtime, with ops of our own and packed weights, or stock ones and int8."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from export.errors import EnvironmentLacksError
from pipeline import machine
from pipeline.backends import lowering_file, metadata_file, stock_runtime
from pipeline.backends.base import (
    CONDITION,
    DATA,
    MODEL,
    TIMESTEP,
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

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CpuOptions(Options):
    """path: "stock" is onnxruntime alone; "fused" adds ops of our kernel library: GEMMs on packed weights, what lies
    between them, attention; "auto" is "fused" where the library is to be had."""

    target: ClassVar[str] = "cpu"
    former: ClassVar = {"path": {"native": "fused"}}
    path: Literal["auto", "fused", "stock"] = "auto"


class CpuBackend(Backend[CpuOptions]):
    """Builds for the CPU it runs on."""

    options_type = CpuOptions
    package = stock_runtime.PACKAGE
    speed_rank = 5
    polygraphy = "own graphs"
    quantizes_attention = True
    file_names = frozenset({MODEL, CONDITION, TIMESTEP, DATA, metadata_file.NAME, lowering_file.NAME})
    disk_bytes_per_parameter = 1.5  # INT8 weights
    repeatable = True

    def in_auto(self) -> bool:
        """Always: where its package is missing, a build says so by name."""
        return True

    def checks(self) -> list[Check]:
        return [stock_runtime.check(), self._library_check(), self._processor_check()]

    def _library_check(self) -> Check:
        from plugins.cpu import library, packaged

        if packaged.problem(library.FOLDER, library.version()) is None:
            return Check("kernel library", True, f"{library.version()}, in this installation")
        try:
            return Check("kernel library", True, f"compiled at first use by {library.compiler()}")
        except EnvironmentLacksError as error:
            return Check("kernel library", False, "none", False, f"cpu.path=fused is not to be had; {error}")

    def _processor_check(self) -> Check:
        from pipeline.backends.cpu.engine import WIDE_SUM_SETS

        sets = machine.cpu_flags()
        processor = f"{machine.cpu_name()}, {machine.cpu_count()} cpus, {' '.join(sets)}"
        remedy = "no INT8 dot products (VNNI, Arm): engines are right here, but less fast"
        return Check("processor", not WIDE_SUM_SETS.isdisjoint(sets), processor, False, remedy)

    def fitness_problem(self, manifest: Manifest, source: Path) -> str | None:
        from pipeline.backends.cpu.engine import CpuNeeds, lacking, provided
        from plugins.cpu import library

        needs = self.metadata(manifest, source, CpuNeeds).get("requires", [])
        if problem := stock_runtime.fitness_problem(manifest, self.name):
            return problem
        problem = lacking(needs, provided(machine.cpu_flags()))
        return library.problem() if problem is None and library.requirement() in needs else problem

    def quantizes_attention_by_default(self, recipe: Recipe) -> bool:
        """By the kernel library; its function body in stock ops takes several times as long as attention in float."""
        return self.options(self.settled(recipe)).path == "fused"

    def settled(self, recipe: Recipe) -> Recipe:
        from plugins.cpu import library

        options = self.options(recipe)
        if options.path != "auto":
            return recipe
        if problem := library.problem():
            logger.info("cpu.path is stock here: %s", problem)
        return recipe.with_options(replace(options, path="stock" if problem else "fused"))

    def problems(self, recipe: Recipe) -> list[str]:
        """What is missing for a build: onnxruntime, or the library of our ops."""
        from plugins.cpu import library

        problem = library.problem() if self.options(recipe).path == "fused" else None
        return self.package_problems() or ([problem] if problem else [])

    def lower(self, portable: Path, work_dir: Path, recipe: Recipe) -> LoweredGraph:
        from pipeline.backends.cpu import build
        from pipeline.backends.cpu.engine import provided

        options, quantized = self.options(self.settled(recipe)), recipe.half is None
        return build.lower(portable, work_dir, options, provided(machine.cpu_flags()), quantized)

    def build(self, lowered: LoweredGraph, out_dir: Path, recipe: Recipe) -> BuildResult:
        from pipeline.backends.cpu import build

        return build.build(lowered, out_dir)

    def load(self, bundle_dir: Path, threads: int = 0) -> LoadedEngine:
        from pipeline.backends.cpu.engine import CpuEngine, lacking, provided, required

        machine.require((self.package,), "running the cpu engine")
        folder = bundle_dir / self.name
        if problem := lacking(required(folder), provided(machine.cpu_flags())):
            raise EnvironmentLacksError(problem)
        return CpuEngine(folder, threads)
