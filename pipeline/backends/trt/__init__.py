"""Target `trt`: a TensorRT engine whose quantized linears are this project's kernels, for the GPU at hand.

The network is strongly typed; the kernels are quick-deployable plugins whose PTX TensorRT embeds, so the engine needs
neither Python nor a plugin library to run. TensorRT builds on the GPU that the engine is for. Its package was not at
hand: the graph that the builder gets, the PTX and the launch sizes are tested, building and running are not run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pipeline import machine
from pipeline.backends import lowering_file, metadata_file
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
from pipeline.backends.tensorrt.engine import CONTEXT_MODEL, ENGINE, TRT, EpContext, KeepOnnx

if TYPE_CHECKING:
    from pipeline.recipe import Recipe


@dataclass(frozen=True)
class TrtOptions(Options):
    """attention, keep_onnx: as those of `rtx`. operands: as that of `cuda`. ep_context: as that of `rtx`, for the
    execution provider of TensorRT."""

    target: ClassVar[str] = "trt"
    attention: Literal["fp16", "fp32"] = "fp16"
    operands: Literal["auto", "fp8", "int8"] = "auto"
    keep_onnx: KeepOnnx = "auto"
    ep_context: EpContext = "none"


class TrtBackend(Backend[TrtOptions]):
    """Builds one engine for the GPU of this machine."""

    options_type = TrtOptions
    package = TRT
    needs_gpu = True
    speed_rank = 1
    polygraphy = "plan"
    kept_names = frozenset({MODEL, DATA})
    file_names = frozenset({ENGINE, CONTEXT_MODEL, metadata_file.NAME, lowering_file.NAME, *kept_names})
    disk_bytes_per_parameter = 1.5  # the packed weights, twice

    def in_auto(self) -> bool:
        """Built only where it is named."""
        return False

    def checks(self) -> list[Check]:
        """What it lacks here, and our plugins: those in TensorRT's registry, else those it would register."""
        from pipeline.backends.tensorrt import ep_context
        from pipeline.backends.trt import engine
        from plugins.tensorrt.aot import plugin_name
        from plugins.tensorrt.payload import NAMESPACE, VERSION
        from plugins.tensorrt.plugins import EXAMPLES

        problems, expected = engine.environment_problems(machine.cuda_sm()), tuple(map(plugin_name, EXAMPLES))
        try:
            names, where = engine.registered_plugins(), "registered"
        except ImportError as error:
            names, where = expected, "would register"
            problems = problems or [f"tensorrt does not load: {error}"]
        if missing := sorted(set(expected) - set(names)):
            problems = [*problems, f"missing: {', '.join(missing)}"]
        listed = f"{where} in namespace {NAMESPACE}, version {VERSION}: {' '.join(names) or 'none'}"
        state = f"{machine.tool_version(self.package) or 'not installed'}; {listed}; not run"
        remedy = f"only needed for the target trt; {'; '.join(problems)}"
        return [Check(self.package, not problems, state, False, remedy), ep_context.check(self.package)]

    def fitness_problem(self, manifest: Manifest, source: Path) -> str | None:
        from pipeline.backends.trt.engine import TrtNeeds, machine_problem

        needs = self.metadata(manifest, source, TrtNeeds)
        return machine_problem(needs, machine.tool_version(self.package), machine.cuda_sm())

    def problems(self, recipe: Recipe) -> list[str]:
        """What is missing here (TensorRT, a release that is new enough, its GPU, a compiler for the kernels), and what
        no kernel takes."""
        from pipeline.backends.trt import build, engine

        found = [*engine.environment_problems(machine.cuda_sm()), *build.problems(recipe)]
        return [*found, *self.problems_of_gpus(recipe)]

    def lower(self, portable: Path, work_dir: Path, recipe: Recipe) -> LoweredGraph:
        """The graph of fused ops, which is verified."""
        from pipeline.backends.trt import build

        return build.lower(portable, work_dir, self.options(recipe))

    def build(self, lowered: LoweredGraph, out_dir: Path, recipe: Recipe) -> BuildResult:
        from pipeline.backends.trt import build

        return build.build(lowered, out_dir, self.options(recipe), machine.cuda_sm(), recipe.sampling.batch_size)

    def kept_problem(self, folder: Path, lowered: LoweredGraph, recipe: Recipe) -> str | None:
        from pipeline.backends.tensorrt import kept_graph
        from pipeline.backends.trt.engine import TrtNeeds

        needs = metadata_file.read(folder, TrtNeeds)
        sms = tuple(needs["compute_capabilities"])
        return kept_graph.other_plugins(folder, lowered, recipe.sampling.batch_size, sms)

    def load(self, bundle_dir: Path, threads: int = 0) -> LoadedEngine:
        from pipeline.backends.trt.engine import TrtEngine

        return TrtEngine(bundle_dir / self.name)

    def arithmetic(self, recipe: Recipe, runs_here: bool) -> Arithmetic:
        return self.options(recipe).attention

    def not_run_note(self, graph: LoweredGraph) -> str:
        from pipeline.backends.tensorrt.plugin_payloads import PLUGINS_APART

        return f"{super().not_run_note(graph)}; {PLUGINS_APART}"
