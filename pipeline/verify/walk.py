"""Forward passes of a PyTorch module that stop at every quantized linear and quantized attention, and go on with
whatever output they are given.

Between two stops lies one stretch of the model: norm and modulation, attention in float, an activation function, gates
and residuals, embedders. Several passes walk side by side, one in float64 and others in float32, so that each stretch
is computed on the same inputs in every arithmetic and nothing but the current layer is held in memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np

from pipeline.backends.base import Arrays
from pipeline.distance import Array

if TYPE_CHECKING:
    import torch

    from export.models.load import LoadedModel
    from export.models.torch_modules import Denoiser


@dataclass(frozen=True)
class Stop:
    """Where a pass stands: before the linear `layer`, with its input x [..., K], or at the end (None) with an output of
    the model, of which it stands at one after the other."""

    layer: str | None
    x: Array
    output: str | None = None


@dataclass(frozen=True)
class AttentionStop:
    """Where a pass stands: before the attention `layer`, with q [B, H, Tq, D], k and v [B, H, Tk, D], the mask that
    broadcasts to [B, H, Tq, Tk], None for none, and the factor of the scores."""

    layer: str
    q: Array
    k: Array
    v: Array
    mask: Array | None
    scale: float


AnyStop = Stop | AttentionStop


class Walk:
    """One forward pass in a thread of its own, which only runs while `start` or `go_on` waits for it.

    `module` is what `stopping_module` made. `context` holds during the pass (jitter, parts in FP16). attentions: does
    it stop at them as well?
    """

    def __init__(
        self,
        module: Denoiser,
        inputs: dict[str, torch.Tensor],
        context: Callable[[], AbstractContextManager[None]],
        attentions: bool = False,
    ) -> None:
        self._module, self._inputs, self._context, self._attentions = module, inputs, context, attentions
        # Where the pass arrives, or the error that ends it; and what it goes on with, or what ends it.
        self._stops: SimpleQueue[AnyStop | BaseException] = SimpleQueue()
        self._outputs: SimpleQueue[Array | _AbandonedError | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> AnyStop:
        """Walk to the first stop."""
        self._thread.start()
        return self.next()

    def go_on(self, output: Array | None) -> AnyStop:
        """Take `output`, of a linear [rows, N], of an attention like q (None: zeros), for that of what the pass stands
        at; walk to the next stop."""
        self._outputs.put(output)
        return self.next()

    def abandon(self) -> None:
        """End a pass that will not be walked to its end."""
        if self._thread.ident is not None:
            self._outputs.put(_AbandonedError())
            self._thread.join()

    def next(self) -> AnyStop:
        """At the end, the next output's."""
        stop = self._stops.get()
        if isinstance(stop, BaseException):
            raise stop
        return stop

    def _run(self) -> None:
        import torch

        try:
            with ExitStack() as stack:
                stack.enter_context(torch.no_grad())  # inference mode would hide parts of composite operations
                stack.enter_context(self._context())
                if self._attentions:
                    stack.enter_context(self._stopping_at_attentions())
                _current.walk = self
                outputs = self._module.outputs(**self._inputs)
            for name, output in outputs.items():
                self._stops.put(Stop(None, output.numpy(), name))
        except _AbandonedError:
            return
        except BaseException as error:  # handed to whoever waits
            self._stops.put(error)

    def at(self, layer: str, x: torch.Tensor, out_features: int) -> torch.Tensor:
        """Called by a port in the pass's own thread."""
        return self._stopped(Stop(layer, x.numpy()), x, (*x.shape[:-1], out_features))

    def _stopping_at_attentions(self) -> AbstractContextManager[None]:
        from export.models.attention_calls import attention_calls

        def at(
            name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
        ) -> torch.Tensor:
            of_mask = None if mask is None else mask.numpy()
            stop = AttentionStop(name, q.numpy(), k.numpy(), v.numpy(), of_mask, scale)
            return self._stopped(stop, q, (*q.shape[:-1], v.shape[-1]))

        return attention_calls(self._module.transformer, at)

    def _stopped(self, stop: AnyStop, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Wait for what the pass goes on with, a tensor of this shape and the type of `like`."""
        import torch

        self._stops.put(stop)
        output = self._outputs.get()
        if isinstance(output, _AbandonedError):
            raise output
        if output is None:
            return like.new_zeros(shape)
        return torch.from_numpy(np.ascontiguousarray(output)).to(like.dtype).reshape(shape)


class _AbandonedError(Exception):
    """Ends the thread of a pass that nobody waits for."""


# Which walk the current thread belongs to.
_current = threading.local()


def stopping_module(model: LoadedModel, dtype: torch.dtype) -> Denoiser:
    """`model` as a module of `dtype` whose quantized linears are stops; all other tensors are shared or converted."""
    from torch import nn

    from pipeline.backends.reference import reference_module

    class Port(nn.Module):
        """Stands for one quantized linear."""

        def __init__(self, layer: str, out_features: int) -> None:
            super().__init__()
            self.layer, self.out_features = layer, out_features

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            walk: Walk = _current.walk
            return walk.at(self.layer, x, self.out_features)

    ports: dict[str, nn.Module] = {ref.name: Port(ref.name, ref.module.out_features) for ref in model.linears()}
    return reference_module(model, ports, dtype)


def tensors_of(inputs: Arrays, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Model inputs as tensors; floats in `dtype`."""
    import torch

    tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
