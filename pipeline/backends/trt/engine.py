"""Runs a TensorRT engine on an NVIDIA GPU, captured in a CUDA graph for each set of input shapes.

Needs tensorrt and a PyTorch with CUDA (for memory, streams and graphs); no plugin library. Not run: TensorRT was not at
hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import TypedDict

from export.errors import EnvironmentLacksError
from pipeline import machine
from pipeline.backends import metadata_file
from pipeline.backends.base import Arrays
from pipeline.backends.tensorrt.engine import ENGINE, TRT, Buffers, DeserializedEngine
from pipeline.machine import visible_sm
from plugins.tensorrt import plugins
from plugins.tensorrt.payload import NAMESPACE, VERSION, compile_problems

if TYPE_CHECKING:
    import torch

# The first release whose quick-deployable plugins have ahead-of-time implementations.
MINIMUM_VERSION = (10, 9)


class TrtNeeds(TypedDict):
    """The release that loads the engine, and the GPUs that it holds code for."""

    tensorrt: str
    compute_capabilities: list[metadata_file.ComputeCapability]


class TrtMetadata(TrtNeeds, metadata_file.Shapes):
    """metadata.json of the target."""


def environment_problems(sm: int) -> list[str]:
    """What this machine lacks for building; `sm`: compute capability of its GPU, 0 for none."""
    try:
        machine.require((TRT,), "target trt")
    except EnvironmentLacksError as error:
        return [str(error)]
    version, least = machine.tool_version(TRT), ".".join(map(str, MINIMUM_VERSION))
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < MINIMUM_VERSION:
        return [f"target trt needs tensorrt {least} or newer, this is {version or 'unknown'}; pip install -U tensorrt"]
    if not sm:
        return ["target trt is built on the NVIDIA GPU that it is for, and none is visible; use --target rtx or cpu"]
    return [f"target trt: {problem}" for problem in compile_problems((sm,))]


def registered_plugins() -> tuple[str, ...]:
    """Names of our plugins that TensorRT's own registry finds. Raises ImportError where it is not installed."""
    names, registry = plugins.register(TRT), import_module(TRT).get_plugin_registry()
    return tuple(name for name in names if registry.get_creator(name, VERSION, NAMESPACE) is not None)


def machine_problem(metadata: TrtNeeds, version: str, sm: int) -> str | None:
    """Why tensorrt `version` and a GPU of capability `sm` (0: none) cannot run an engine; None if they can."""
    built, listed = metadata["tensorrt"], metadata["compute_capabilities"]
    if not version:
        return "target trt needs tensorrt; install with: pip install tensorrt"
    if not sm:
        return "running the target trt needs an NVIDIA GPU and a PyTorch with CUDA; none is visible here"
    if sm not in listed:
        return f"the engine was built on a GPU of SM {listed}, this one is SM {sm}; build again here"
    if machine.release(version) != machine.release(built):
        return f"the engine was built with tensorrt {built}, this is {version}; install that release or build again"
    return None


@dataclass
class Captured:
    """Fixed buffers and the graph of one call on them."""

    buffers: Buffers
    graph: torch.cuda.CUDAGraph

    @classmethod
    def make(cls, buffers: Buffers) -> Captured:
        """Run once so that everything lazy is done, and capture. On the current stream, which is the buffers'."""
        import torch

        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        buffers.bind()  # outputs, too: their shapes were not known before
        buffers.execute()
        stream.synchronize()
        # What other threads do on the GPU meanwhile is not part of the capture and does not break it.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            buffers.execute()
        return cls(buffers, graph)

    def run(self, arrays: Arrays) -> Arrays:
        """Copy in, replay, copy out."""
        self.buffers.copy_in(arrays)
        self.graph.replay()
        return self.buffers.copy_out()


class TrtEngine(DeserializedEngine):
    """A context, buffers and a captured graph for each set of input shapes."""

    module = TRT

    def __init__(self, folder: Path) -> None:
        """Raises EnvironmentLacksError before anything is deserialized where this machine cannot run the engine."""
        machine.require((TRT, "torch"), "running the target trt")
        metadata = metadata_file.read(folder, TrtMetadata)
        if problem := machine_problem(metadata, machine.tool_version(TRT), visible_sm()):
            raise EnvironmentLacksError(problem)
        super().__init__(folder / ENGINE, metadata)

    def _prepared(self, arrays: Arrays) -> Captured:
        """A captured call keeps its context's shapes and addresses: each has a context of its own."""
        context = self._engine.create_execution_context()
        return Captured.make(Buffers.make(context, self._stream.cuda_stream, arrays, self._outputs))
