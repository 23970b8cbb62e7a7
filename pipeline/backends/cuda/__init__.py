"""Target `cuda`: our Triton kernels in a CUDA graph through PyTorch, on any NVIDIA GPU from SM 80 on.

Building needs no GPU: the engine is the lowered graph, its kernels are compiled where it runs. What is proven: the
graph in stock onnxruntime, layer by layer, against the oracle (codes, sums, scales, outputs), in float32; and, where
the engine runs, its pictures and steps with the activations that the recipe chose.
"""

from __future__ import annotations

import runpy
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from export.errors import EnvironmentLacksError
from pipeline import machine
from pipeline.backends import lowering_file, metadata_file
from pipeline.backends.base import (
    CONDITION,
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
    OverflowSearch,
)

if TYPE_CHECKING:
    from pipeline.recipe import Recipe


@dataclass(frozen=True)
class CudaOptions(Options):
    """How weights are stored, what lies between the kernels, and what they multiply.

    weights: "packed" keeps two codes in a byte, "expanded" a byte for each weight (twice the memory, faster with many
    tokens), "auto" chooses for each linear by its tokens. operands: what tensor cores multiply, "fp8", or "int8" where
    a layer's formats embed in it (integers always do); "auto" is "int8" on GPUs whose INT8 rate is the higher
    (plugins/gpu/tile_table.py), chosen where the engine is loaded, or built with machine code.
    """

    target: ClassVar[str] = "cuda"
    weights: Literal["auto", "packed", "expanded"] = "auto"
    activations: Literal["fp16", "fp32"] = "fp16"
    operands: Literal["auto", "fp8", "int8"] = "auto"


class CudaBackend(Backend[CudaOptions]):
    """Builds on any machine; the engine runs on GPUs."""

    options_type = CudaOptions
    package = "triton"
    needs_gpu = True
    speed_rank = 2
    polygraphy = "graphs"
    file_names = frozenset({MODEL, CONDITION, DATA, metadata_file.NAME, lowering_file.NAME})
    disk_bytes_per_parameter = 1.5  # the packed weights, twice

    def in_auto(self) -> bool:
        """Where it can run, too."""
        from pipeline.backends.cuda.engine import MIN_SM

        return super().in_auto() and machine.cuda_sm() >= MIN_SM

    def checks(self) -> list[Check]:
        return [self._triton_check(), self._target_check()]

    def _triton_check(self) -> Check:
        """Triton, of a release that the kernels are written for, with its assemblers."""
        from plugins.gpu import compile

        version = triton_version()
        try:
            problems = compile.problems() if version else ["pip install triton"]
        except EnvironmentLacksError as error:
            problems = [f"triton {version} does not load: {error.__cause__}"]
        remedy = f"only needed for kernels of the targets cuda and trt, and rtx.path=plugin; {'; '.join(problems)}"
        return Check("triton", not problems, version or "not installed", False, remedy)

    def _target_check(self) -> Check:
        """What running the target needs, together: a GPU, a PyTorch with CUDA, triton."""
        from pipeline.backends.cuda.engine import machine_problem

        sm, cuda, triton = machine.cuda_sm(), torch_cuda(), triton_version()
        problems = []
        if not find_spec("torch"):
            problems.append("pip install 'ditc[cuda]'")
        elif not cuda:
            problems.append("this PyTorch is built without CUDA; install one from https://pytorch.org")
        if problem := machine_problem({}, sm, triton):
            problems.append(problem)
        present = f"{f'SM {sm}' if sm else 'no GPU'}, CUDA of torch {cuda or 'none'}, triton {triton or 'none'}"
        return Check("cuda", not problems, present, False, f"only needed to run the target cuda; {'; '.join(problems)}")

    def fitness_problem(self, manifest: Manifest, source: Path) -> str | None:
        from pipeline.backends.cuda.engine import CudaNeeds, machine_problem

        needs = self.metadata(manifest, source, CudaNeeds)
        return machine_problem(needs, machine.cuda_sm(), machine.tool_version("triton"))

    def problems(self, recipe: Recipe) -> list[str]:
        """Formats, activations and attention that no kernel takes."""
        from pipeline.backends.cuda import build

        return [*build.problems(recipe), *self.problems_of_gpus(recipe)]

    def lower(self, portable: Path, work_dir: Path, recipe: Recipe) -> LoweredGraph:
        from pipeline.backends.cuda import build

        return build.lower(portable, work_dir, self.options(recipe))

    def build(self, lowered: LoweredGraph, out_dir: Path, recipe: Recipe) -> BuildResult:
        from pipeline.backends.cuda import build

        return build.build(lowered, out_dir, self.options(recipe))

    def load(self, bundle_dir: Path, threads: int = 0) -> LoadedEngine:
        from pipeline.backends.cuda.engine import CudaEngine

        return CudaEngine(bundle_dir / self.name)

    def arithmetic(self, recipe: Recipe, runs_here: bool) -> Arithmetic:
        """The lowered graph is float32 in any case."""
        return "fp16 tokens" if runs_here and self._halves(recipe) else "fp32"

    def overflow(self, graph: LoweredGraph, recipe: Recipe) -> OverflowSearch | None:
        from pipeline.backends.cuda.overflow import find_overflow

        return partial(find_overflow, graph.path) if self._halves(recipe) else None

    def _halves(self, recipe: Recipe) -> bool:
        return self.options(recipe).activations == "fp16"


def triton_version() -> str:
    """'' where it cannot be imported."""
    return machine.tool_version("triton") if find_spec("triton") else ""


def torch_cuda() -> str:
    """The CUDA release that PyTorch is built with, '' for none; read from its version file, without importing it."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return ""
    return str(runpy.run_path(str(Path(spec.origin).with_name("version.py")))["cuda"] or "")
