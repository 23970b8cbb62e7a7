"""Runs an engine of TensorRT or TensorRT-RTX on an NVIDIA GPU: what both targets do alike.

Needs their module and a PyTorch with CUDA (for memory and streams).
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np

from export.errors import ContractError, EnvironmentLacksError, RecipeError, ResourceError
from pipeline.backends import feeds, metadata_file
from pipeline.backends.base import Arrays

if TYPE_CHECKING:
    from torch import Tensor

ENGINE = "model.engine"
# An ONNX file by which onnxruntime runs that engine, where the recipe asks for one.
CONTEXT_MODEL = "model_ctx.onnx"
# It has the name of the engine's file, which lies beside it, or all of the engine's bytes.
EpContext = Literal["none", "beside", "embedded"]
# The modules of both products; what the first builds is for GPUs which need not be here.
RTX, TRT = "tensorrt_rtx", "tensorrt"
# Options of both targets: is the ONNX that the builder got kept beside the engine? See kept_graph.
KeepOnnx = Literal["auto", "yes", "no"]


class PreparedCall(Protocol):
    """What runs inputs of one set of shapes. Copies in, runs, copies out."""

    def run(self, arrays: Arrays) -> Arrays: ...


class DeserializedEngine(ABC):
    """An engine on the current GPU. It may be called from any number of threads: what it runs in belongs to one call at
    a time, which a lock sees to."""

    module: ClassVar[str]

    def __init__(self, path: Path, metadata: metadata_file.Shapes) -> None:
        """metadata: as metadata.json has it, which this machine fits. Raises EnvironmentLacksError for an engine that
        the module refuses."""
        self.metadata = metadata
        self._lock = threading.Lock()
        self._calls: dict[tuple[object, ...], PreparedCall] = {}
        self._open(path)

    def _open(self, path: Path) -> None:
        import torch

        trt = import_module(self.module)
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise EnvironmentLacksError(f"{self.module} cannot load {path}; its messages above say why")
        self._stream = torch.cuda.Stream()
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self._outputs = [n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT]
        dtypes = {name: trt.nptype(self._engine.get_tensor_dtype(name)) for name in names}
        self.declared = feeds.of_bounds(self.metadata["shapes"], dtypes)

    @abstractmethod
    def _prepared(self, arrays: Arrays) -> PreparedCall:
        """What runs inputs of the shapes of `arrays`, on the current stream, which is the engine's."""

    def run(self, inputs: Arrays) -> Arrays:
        """Outputs by name for inputs by name, NumPy on both sides. Raises RecipeError for inputs that do not fit."""
        import torch

        arrays = {name: np.array(array, order="C") for name, array in inputs.items()}
        feeds.check_feeds(self.declared, arrays)
        shapes = tuple((name, array.shape) for name, array in sorted(arrays.items()))
        with self._lock, torch.cuda.stream(self._stream):
            if self._engine is None:
                raise RecipeError("the engine is closed; load it again")
            if shapes not in self._calls:
                self._calls[shapes] = self._prepared(arrays)
            return self._calls[shapes].run(arrays)

    def close(self) -> None:
        """Free the GPU, after the call that is running."""
        with self._lock:
            self._release()

    def _release(self) -> None:
        """Let go of what is open, if it still is."""
        self._calls.clear()
        self._engine = self._runtime = None


@dataclass
class Buffers:
    """Fixed device memory for one set of input shapes, bound to the context before each call. stream: its handle."""

    context: Any
    stream: int
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def make(
        cls, context: Any, stream: int, arrays: Arrays, output_names: Sequence[str], device: str = "cuda"
    ) -> Buffers:
        """Allocate for the shapes of `arrays`; output shapes are the context's answer to them."""
        import torch

        inputs = {name: torch.empty_like(torch.from_numpy(array), device=device) for name, array in arrays.items()}
        buffers = cls(context, stream, inputs)
        buffers.bind()
        for name in output_names:
            shape = tuple(context.get_tensor_shape(name))
            buffers.outputs[name] = torch.empty(shape, dtype=torch.float32, device=device)
        return buffers

    def bind(self) -> None:
        """Tell the context shapes and addresses."""
        for name, tensor in self.inputs.items():
            if not self.context.set_input_shape(name, tuple(tensor.shape)):
                raise ContractError(f"the engine refuses shape {tuple(tensor.shape)} of input {name}")
        for name, tensor in (self.inputs | self.outputs).items():
            self.context.set_tensor_address(name, tensor.data_ptr())

    def execute(self) -> None:
        """One call of the context on what is bound. Raises ResourceError if it refuses."""
        if not self.context.execute_async_v3(self.stream):
            raise ResourceError("the engine could not be run; the runtime's log says why (often GPU memory)")

    def copy_in(self, arrays: Arrays) -> None:
        import torch

        for name, array in arrays.items():
            self.inputs[name].copy_(torch.from_numpy(array))

    def copy_out(self) -> Arrays:
        """Waits for the stream."""
        return {name: tensor.to("cpu", copy=True).numpy() for name, tensor in self.outputs.items()}

    def run(self, arrays: Arrays) -> Arrays:
        """Copy in, run, copy out."""
        self.bind()
        self.copy_in(arrays)
        self.execute()
        return self.copy_out()
