"""Runs a TensorRT engine on an NVIDIA GPU, captured in a CUDA graph for each set of input shapes.

Needs tensorrt and a PyTorch with CUDA (for memory, streams and graphs); no plugin library. Not run: TensorRT was not at
hand.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import TypedDict

from export.errors import EnvironmentLacksError, RecipeError, ResourceError
from pipeline import machine
from pipeline.backends import feeds, metadata_file
from pipeline.backends.base import Arrays
from pipeline.backends.tensorrt.buffers import Buffers
from pipeline.backends.visible_gpu import visible_sm
from plugins.tensorrt import plugins
from plugins.tensorrt.payload import NAMESPACE, VERSION, compile_problems

ENGINE, METADATA = "model.engine", metadata_file.NAME
MODULE = "tensorrt"
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
        machine.require((MODULE,), "target trt")
    except EnvironmentLacksError as error:
        return [str(error)]
    version, least = machine.tool_version(MODULE), ".".join(map(str, MINIMUM_VERSION))
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < MINIMUM_VERSION:
        return [f"target trt needs tensorrt {least} or newer, this is {version or 'unknown'}; pip install -U tensorrt"]
    if not sm:
        return ["target trt is built on the NVIDIA GPU that it is for, and none is visible; use --target rtx or cpu"]
    return [f"target trt: {problem}" for problem in compile_problems((sm,))]


def registered_plugins() -> tuple[str, ...]:
    """Names of our plugins that TensorRT's own registry finds. Raises ImportError where it is not installed."""
    names, registry = plugins.register(MODULE), import_module(MODULE).get_plugin_registry()
    return tuple(name for name in names if registry.get_creator(name, VERSION, NAMESPACE) is not None)


def machine_problem(metadata: Mapping[str, Any], version: str, sm: int) -> str:
    """Why tensorrt `version` and a GPU of capability `sm` (0: none) cannot run an engine; empty if they can."""
    built, listed = metadata["tensorrt"], metadata["compute_capabilities"]
    if not version:
        return "target trt needs tensorrt; install with: pip install tensorrt"
    if not sm:
        return "running the target trt needs an NVIDIA GPU and a PyTorch with CUDA; none is visible here"
    if sm not in listed:
        return f"the engine was built on a GPU of SM {listed}, this one is SM {sm}; build again here"
    if machine.release(version) != machine.release(built):
        return f"the engine was built with tensorrt {built}, this is {version}; install that release or build again"
    return ""


@dataclass
class Captured:
    """Fixed buffers and the graph of one call on them."""

    buffers: Buffers
    graph: Any

    @classmethod
    def make(cls, context: Any, arrays: Arrays, outputs: list[str]) -> Captured:
        """Allocate, run once so that everything lazy is done, and capture. On the current stream."""
        import torch

        buffers, graph = Buffers.make(context, arrays, outputs, "cuda"), torch.cuda.CUDAGraph()
        buffers.bind()  # outputs, too: their shapes were not known before
        stream = torch.cuda.current_stream()
        execute(context, stream.cuda_stream)
        stream.synchronize()
        # What other threads do on the GPU meanwhile is not part of the capture and does not break it.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            execute(context, stream.cuda_stream)
        return cls(buffers, graph)

    def run(self, arrays: Arrays) -> Arrays:
        """Copy in, replay, copy out."""
        import torch

        for name, array in arrays.items():
            self.buffers.inputs[name].copy_(torch.from_numpy(array))
        self.graph.replay()
        return {name: tensor.to("cpu", copy=True).numpy() for name, tensor in self.buffers.outputs.items()}


def execute(context: Any, stream: int) -> None:
    """One call of the context on its bound buffers. Raises ResourceError if TensorRT refuses."""
    if not context.execute_async_v3(stream):
        raise ResourceError("the engine could not be run; the log of tensorrt says why (often GPU memory)")


class TrtEngine:
    """A deserialized engine on the current GPU. It may be called from any number of threads: a captured graph owns its
    buffers, so a lock lets one call run at a time."""

    def __init__(self, folder: Path) -> None:
        """Raises EnvironmentLacksError before anything is deserialized where this machine cannot run the engine."""
        machine.require((MODULE, "torch"), "running the target trt")
        self.metadata: dict[str, Any] = dict(metadata_file.read(folder, TrtMetadata))
        problem = machine_problem(self.metadata, machine.tool_version(MODULE), visible_sm())
        if problem:
            raise EnvironmentLacksError(problem)
        self._lock = threading.Lock()
        self._captured: dict[tuple[Any, ...], tuple[Any, Captured]] = {}
        self._open(folder / ENGINE)

    def _open(self, path: Path) -> None:
        import torch

        trt: Any = import_module(MODULE)
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise EnvironmentLacksError(f"tensorrt cannot load {path}; its messages above say why")
        self._stream = torch.cuda.Stream()
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self._outputs = [n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT]
        dtypes = {name: trt.nptype(self._engine.get_tensor_dtype(name)) for name in names}
        self._declared = feeds.of_bounds(self.metadata["shapes"], dtypes)

    def run(self, inputs: Arrays) -> Arrays:
        """Outputs by name for inputs by name, NumPy on both sides. Raises RecipeError for inputs that do not fit."""
        import torch

        arrays = {name: np.array(array, order="C") for name, array in inputs.items()}
        feeds.check_feeds(self._declared, arrays)
        key = tuple((name, array.shape) for name, array in sorted(arrays.items()))
        with self._lock, torch.cuda.stream(self._stream):
            if self._engine is None:
                raise RecipeError("the engine is closed; load it again")
            if key not in self._captured:  # a captured call keeps its context's shapes and addresses
                context = self._engine.create_execution_context()
                self._captured[key] = context, Captured.make(context, arrays, self._outputs)
            return self._captured[key][1].run(arrays)

    def close(self) -> None:
        """Free the GPU, after the call that is running."""
        with self._lock:
            self._captured.clear()
            self._engine = self._runtime = None
