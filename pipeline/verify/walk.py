"""Forward passes of a PyTorch module that stop at every quantized linear and go on with whatever output they are given.

Between two stops lies one stretch of the model: norm and modulation, attention, an activation function, gates and
residuals, embedders. Several passes walk side by side, one in float64 and others in float32, so that each stretch is
computed on the same inputs in every arithmetic and nothing but the current layer is held in memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.backends.base import Arrays

if TYPE_CHECKING:
    import torch

    from export.models.load import LoadedModel

# What a pass yields when it is through: the model's own output, in place of a layer's input.
OUTPUT = ""


@dataclass(frozen=True)
class Stop:
    """Where a pass stands: before the linear `layer`, with its input x [..., K], or at the end (OUTPUT) with the
    model's output."""

    layer: str
    x: NDArray[Any]


class Walk:
    """One forward pass in a thread of its own, which only runs while `start` or `go_on` waits for it.

    `module` is what `stopping_module` made. `context` holds during the pass (jitter, parts in FP16).
    """

    def __init__(
        self,
        module: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        context: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._module, self._inputs, self._context = module, inputs, context
        self._turn, self._arrived = threading.Semaphore(0), threading.Semaphore(0)
        self._stop: Stop | None = None
        self._output: NDArray[Any] | None = None
        self._error: BaseException | None = None
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> Stop:
        """Walk to the first linear."""
        self._thread.start()
        return self._wait()

    def go_on(self, output: NDArray[Any] | None) -> Stop:
        """Take `output` [rows, N] (None: zeros) for that of the linear at which the pass stands; walk to the next."""
        self._output = output
        self._turn.release()
        return self._wait()

    def abandon(self) -> None:
        """End a pass that will not be walked to its end."""
        if self._thread.ident is None:
            return
        self._abandoned = True
        self._turn.release()
        self._thread.join()

    def _wait(self) -> Stop:
        self._arrived.acquire()
        if self._error is not None:
            raise self._error
        assert self._stop is not None
        return self._stop

    def _run(self) -> None:
        import torch

        try:
            with torch.no_grad(), self._context():  # inference mode would hide parts of composite operations
                _Port.current.walk = self
                output = self._module(**self._inputs)
            self._stop = Stop(OUTPUT, output.numpy())
        except _AbandonedError:
            return
        except BaseException as error:  # handed to whoever waits
            self._error = error
        self._arrived.release()

    def at(self, layer: str, x: torch.Tensor, out_features: int) -> torch.Tensor:
        """Called by a port in the pass's own thread."""
        import torch

        self._stop = Stop(layer, x.numpy())
        self._arrived.release()
        self._turn.acquire()
        if self._abandoned:
            raise _AbandonedError
        shape = (*x.shape[:-1], out_features)
        if self._output is None:
            return x.new_zeros(shape)
        return torch.from_numpy(np.ascontiguousarray(self._output)).to(x.dtype).reshape(shape)


class _AbandonedError(Exception):
    """Ends the thread of a pass that nobody waits for."""


class _Port:
    """Which walk the current thread belongs to."""

    current = threading.local()


def stopping_module(model: LoadedModel, dtype: torch.dtype) -> torch.nn.Module:
    """`model` as a module of `dtype` whose quantized linears are stops; all other tensors are shared or converted."""
    from torch import nn

    from pipeline.backends.reference import reference_module

    class Port(nn.Module):
        """Stands for one quantized linear."""

        def __init__(self, layer: str, out_features: int) -> None:
            super().__init__()
            self.layer, self.out_features = layer, out_features

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            walk: Walk = _Port.current.walk
            return walk.at(self.layer, x, self.out_features)

    ports: dict[str, nn.Module] = {ref.name: Port(ref.name, ref.module.out_features) for ref in model.linears()}
    return reference_module(model, ports, dtype)


def tensors_of(inputs: Arrays, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Model inputs as tensors; floats in `dtype`."""
    import torch

    tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
