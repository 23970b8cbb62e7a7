"""Target `rtx`: a TensorRT-RTX engine built ahead of time, on a machine that needs no GPU."""

from __future__ import annotations

from argparse import ArgumentTypeError
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from export.errors import EnvironmentLacksError
from pipeline import machine
from pipeline.backends import lowering_file, metadata_file
from pipeline.backends.base import (
    DATA,
    MODEL,
    Arithmetic,
    Backend,
    BuildResult,
    Check,
    Flag,
    LoadedEngine,
    LoweredGraph,
    Manifest,
    Options,
)
from pipeline.backends.tensorrt.engine import CONTEXT_MODEL, ENGINE, RTX, EpContext, KeepOnnx

if TYPE_CHECKING:
    from pipeline.recipe import Recipe


@dataclass(frozen=True)
class RtxOptions(Options):
    """How weights are stored, the GPUs (compute capabilities) that it is built for, and the precision of the rest.

    attention: "fp16" runs attention, and large unquantized linears, on FP16 operands; "fp32" nothing. path: "tensorrt"
    expresses quantized linears in TensorRT's own ops, "plugin" puts this project's kernels in their place; weights then
    stay packed, whatever `weights` says, and `operands` is as that of `cuda`, for all GPUs of `sm` alike. keep_onnx:
    does the bundle keep the graph that the builder got? "auto": a small one (tensorrt/kept_graph.py).

    ep_context: an ONNX file, too, by which onnxruntime's NvTensorRTRTX execution provider runs the engine, which lies
    "beside" it or is "embedded" in it.
    """

    target: ClassVar[str] = "rtx"
    former: ClassVar = {"path": {"native": "tensorrt"}}
    weights: Literal["fp8", "int8", "int4"] = "fp8"
    sm: tuple[int, ...] = (89, 120)
    attention: Literal["fp16", "fp32"] = "fp16"
    path: Literal["tensorrt", "plugin"] = "tensorrt"
    operands: Literal["auto", "fp8", "int8"] = "auto"
    keep_onnx: KeepOnnx = "auto"
    ep_context: EpContext = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "sm", tuple(self.sm))
        self.check(bool(self.sm), "sm", "name at least one compute capability, for example 89")
        self.check(all(0 < sm < 1000 for sm in self.sm), "sm", "a compute capability is for example 89")


def integers(text: str) -> tuple[int, ...]:
    """Integers with commas.

    >>> integers("89,120")
    (89, 120)
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not a list of integers such as 89,120") from error


class RtxBackend(Backend[RtxOptions]):
    """Builds one engine for all compute capabilities of its option `sm`."""

    options_type = RtxOptions
    package = RTX
    needs_gpu = True
    speed_rank = 3
    polygraphy = "graph and plan"
    kept_names = frozenset({MODEL, DATA})
    file_names = frozenset({ENGINE, CONTEXT_MODEL, metadata_file.NAME, lowering_file.NAME, *kept_names})
    disk_bytes_per_parameter = 2.5  # the lowered graph and the engine
    flags = (Flag("--target-sm", "sm", integers, "89,120", "GPUs that the rtx engine is built for"),)

    def checks(self) -> list[Check]:
        from pipeline.backends.tensorrt import ep_context

        return [self._package_check(), self._plugins_check(), ep_context.check(self.package)]

    def _package_check(self) -> Check:
        """tensorrt_rtx and the GPUs that its builder takes (no GPU is needed to build)."""
        try:
            rtx = import_module(self.package)
        except ImportError as error:
            return Check(self.package, False, str(error), False, "pip install tensorrt-rtx, to build the target rtx")
        sms = [name for name in rtx.ComputeCapability.__members__ if name.startswith("SM")]
        return Check(self.package, True, f"{rtx.__version__}, builds for {' '.join(sms)}")

    def _plugins_check(self) -> Check:
        """Our plugins in the registry of TensorRT-RTX, as it finds them by name, version and namespace."""
        from plugins.gpu import compile
        from plugins.tensorrt import rtx_plugin
        from plugins.tensorrt.payload import NAMESPACE, PLUGINS, VERSION

        name, remedy = "tensorrt_rtx plugins", "only needed for rtx.path=plugin"
        try:
            names = rtx_plugin.registered()
        except EnvironmentLacksError as error:
            return Check(name, False, "none", False, f"{remedy}; {error}")
        listed = f"namespace {NAMESPACE}, version {VERSION}: {' '.join(names) or 'none'}; compiled, not run"
        missing = [*sorted(set(PLUGINS.values()) - set(names)), *compile.problems()]
        return Check(name, not missing, listed, False, f"{remedy}; missing: {', '.join(missing)}")

    def fitness_problem(self, manifest: Manifest, source: Path) -> str | None:
        from pipeline.backends.rtx.engine import RtxNeeds, machine_problem

        needs = self.metadata(manifest, source, RtxNeeds)
        installed = machine.tool_version(self.package)
        if not installed:
            return "target rtx needs tensorrt-rtx; install with: pip install tensorrt-rtx"
        return machine_problem(needs, installed, machine.cuda_sm())

    def problems(self, recipe: Recipe) -> list[str]:
        """GPUs that the builder refuses, activations and attention that no lowering takes, and a missing package."""
        from pipeline.backends.rtx import build

        found = build.problems(recipe, self.options(recipe), self.package_problems())
        return [*found, *self.problems_of_gpus(recipe)]

    def lower(self, portable: Path, work_dir: Path, recipe: Recipe) -> LoweredGraph:
        from pipeline.backends.rtx import build

        return build.lower(portable, work_dir, self.options(recipe))

    def build(self, lowered: LoweredGraph, out_dir: Path, recipe: Recipe) -> BuildResult:
        from pipeline.backends.rtx import build

        return build.build(lowered, out_dir, self.options(recipe), recipe.sampling.batch_size)

    def kept_problem(self, folder: Path, lowered: LoweredGraph, recipe: Recipe) -> str | None:
        from pipeline.backends.tensorrt import kept_graph

        options = self.options(recipe)
        if options.path == "tensorrt":
            return kept_graph.other_graph(folder, lowered)
        return kept_graph.other_plugins(folder, lowered, recipe.sampling.batch_size, options.sm)

    def load(self, bundle_dir: Path, threads: int = 0) -> LoadedEngine:
        from pipeline.backends.rtx.engine import RtxEngine

        return RtxEngine(bundle_dir / self.name)

    def arithmetic(self, recipe: Recipe, runs_here: bool) -> Arithmetic:
        return self.options(recipe).attention

    def not_run_note(self, graph: LoweredGraph) -> str:
        from pipeline.backends.tensorrt.plugin_payloads import PLUGIN, PLUGINS_APART

        apart = any(choice.path.startswith(PLUGIN) for choice in graph.choices)
        return super().not_run_note(graph) + (f"; {PLUGINS_APART}" if apart else "")
