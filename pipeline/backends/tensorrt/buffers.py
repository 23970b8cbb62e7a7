"""Device memory of one call of an engine of TensorRT or TensorRT-RTX."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from export.errors import ContractError, ResourceError
from pipeline.backends.base import Arrays


@dataclass
class Buffers:
    """Fixed device memory for one set of input shapes, bound to the context before each call."""

    context: Any
    inputs: dict[str, Any]
    outputs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def make(cls, context: Any, arrays: Arrays, output_names: list[str], device: str) -> Buffers:
        """Allocate for the shapes of `arrays`; output shapes are the context's answer to them."""
        import torch

        inputs = {name: torch.empty_like(torch.from_numpy(array), device=device) for name, array in arrays.items()}
        buffers = cls(context, inputs)
        buffers.bind()
        for name in output_names:
            buffers.outputs[name] = torch.empty(
                tuple(context.get_tensor_shape(name)), dtype=torch.float32, device=device
            )
        return buffers

    def bind(self) -> None:
        """Tell the context shapes and addresses."""
        for name, tensor in self.inputs.items():
            if not self.context.set_input_shape(name, tuple(tensor.shape)):
                raise ContractError(f"the engine refuses shape {tuple(tensor.shape)} of input {name}")
        for name, tensor in (self.inputs | self.outputs).items():
            self.context.set_tensor_address(name, tensor.data_ptr())

    def run(self, arrays: Arrays, stream: int) -> Arrays:
        """Copy in, run, copy out. The last copy waits for the stream."""
        import torch

        self.bind()
        for name, array in arrays.items():
            self.inputs[name].copy_(torch.from_numpy(array))
        if not self.context.execute_async_v3(stream):
            raise ResourceError("the engine could not be run; the log of tensorrt_rtx says why (often GPU memory)")
        return {name: tensor.to("cpu", copy=True).numpy() for name, tensor in self.outputs.items()}
