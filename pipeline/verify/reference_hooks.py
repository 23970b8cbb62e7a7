"""Contexts that watch or disturb the PyTorch reference while they last: recorded inputs, jitter, parts in FP16."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from export.formats.operands import ROUNDING
from pipeline.backends.base import LARGE_ELEMENTS, Arithmetic
from pipeline.distance import ratio_db
from pipeline.verify.noise import Noise

if TYPE_CHECKING:
    import torch

    Tensors = tuple[torch.Tensor, ...]
    Function = Callable[..., torch.Tensor]
    Keywords = Mapping[str, object]
    Hook = Callable[..., object]


@dataclass
class Recorder:
    """Inputs of every quantized linear, [rows, K] float32, one array for each recorded call.

    Linears that read the same tensor one after the other (q, k and v) share one array.
    """

    active: bool = True
    inputs: dict[str, list[NDArray[np.float32]]] = field(default_factory=dict)
    last: tuple[torch.Tensor, NDArray[np.float32]] | None = None  # a tensor and its rows

    def __call__(self, module: torch.nn.Module, inputs: Tensors) -> None:
        if self.active:
            x = inputs[0]
            if self.last is None or self.last[0] is not x:
                self.last = (x, x.reshape(-1, x.shape[-1]).float().numpy().copy())
            self.inputs.setdefault(module.layer_name, []).append(self.last[1])


@dataclass
class Comparison:
    """SQNR of every quantized linear's input against a Recorder's, without keeping the inputs themselves."""

    reference: dict[str, list[NDArray[np.float32]]]
    active: bool = True
    calls: dict[str, int] = field(default_factory=dict)
    powers: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __call__(self, module: torch.nn.Module, inputs: Tensors) -> None:
        name = module.layer_name
        if not self.active or name not in self.reference:
            return
        expected = self.reference[name][self.calls.get(name, 0)].astype(np.float64)
        actual = inputs[0].reshape(-1, inputs[0].shape[-1]).double().numpy()
        signal, noise = self.powers.get(name, (0.0, 0.0))
        self.powers[name] = signal + float(np.sum(expected**2)), noise + float(np.sum((actual - expected) ** 2))
        self.calls[name] = self.calls.get(name, 0) + 1

    @property
    def sqnr_db(self) -> dict[str, float]:
        """By layer, over all compared calls."""
        return {name: ratio_db(*powers) for name, powers in self.powers.items()}


@contextmanager
def jittered(module: torch.nn.Module, seed: int, ulps: float) -> Iterator[None]:
    """Move every quantizer's input by up to `ulps`: of the number itself, and of its row's root mean square (what
    an error made before a cancellation leaves)."""
    noise = Noise(seed)

    def move(_: torch.nn.Module, inputs: Tensors) -> Tensors:
        x = inputs[0]
        size = x.abs() + x.square().mean(-1, keepdim=True).sqrt()
        return (noise.moved(x, size, ulps * ROUNDING), *inputs[1:])

    with hooked(module, move):
        yield


@contextmanager
def hooked(module: torch.nn.Module, before: Hook, after: Hook | None = None) -> Iterator[None]:
    """Call `before(linear, inputs)` and `after(linear, inputs, output)` at every quantized linear of `module`."""
    with ExitStack() as stack:
        for part in module.modules():
            if hasattr(part, "layer_name"):
                stack.callback(part.register_forward_pre_hook(before).remove)
                if after is not None:
                    stack.callback(part.register_forward_hook(after).remove)
        yield


@contextmanager
def functions_called(call: Callable[[Function, Tensors, Keywords], object]) -> Iterator[None]:
    """Within, PyTorch's functions are called by `call(function, arguments, keywords)`."""
    from torch.overrides import TorchFunctionMode

    class Mode(TorchFunctionMode):
        def __torch_function__(
            self, func: Function, types: object, args: Tensors = (), kwargs: Keywords | None = None
        ) -> object:
            return call(func, args, kwargs or {})

    with Mode():
        yield


@contextmanager
def half_parts(module: torch.nn.Module) -> Iterator[None]:
    """Attention, and large unquantized linears, round operands and result to FP16; sums and softmax stay float32."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    def half_attention(function: Function, tensors: Tensors, keywords: Keywords) -> torch.Tensor:
        if function is not scaled_dot_product_attention:
            return function(*tensors, **keywords)
        return _half(function(*map(_half, tensors[:3]), *tensors[3:], **keywords))

    with ExitStack() as stack:
        for part in module.modules():
            if isinstance(part, torch.nn.Linear) and part.weight.numel() >= LARGE_ELEMENTS:
                stack.callback(part.register_forward_pre_hook(lambda _, inputs: _half(inputs[0])).remove)
                stack.callback(part.register_forward_hook(lambda _, inputs, output: _half(output)).remove)
        stack.enter_context(functions_called(half_attention))
        yield


@contextmanager
def half_tokens(module: torch.nn.Module) -> Iterator[None]:
    """Every tensor of tokens (three axes or more) rounds to FP16 where a function gives it; quantized linears compute
    in float32 within, on an input and to a result rounded so."""
    inside = False

    def half_outside(function: Function, tensors: Tensors, keywords: Keywords) -> object:
        output = function(*tensors, **keywords)
        return output if inside else _rounded(output)

    def enter(_: torch.nn.Module, inputs: Tensors) -> tuple[object, ...]:
        nonlocal inside
        inside = True
        return (_rounded(inputs[0]), *inputs[1:])

    def leave(_: torch.nn.Module, _inputs: Tensors, output: torch.Tensor) -> object:
        nonlocal inside
        inside = False
        return _rounded(output)

    with hooked(module, enter, leave), functions_called(half_outside):
        yield


def _half(tensor: torch.Tensor) -> torch.Tensor:
    """Rounded to FP16, in the tensor's own type."""
    return tensor.half().to(tensor.dtype)


def _rounded(value: object) -> object:
    """A float32 tensor of tokens rounded to FP16; anything else as it is."""
    import torch

    if isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.ndim >= 3:
        return value.half().float()
    return value


@dataclass(frozen=True)
class ArithmeticRow:
    """What an engine may compute in beside its quantized linears.

    context: in which the reference's module computes so. of_graph: the arithmetic of such an engine's lowered graph.
    note: what a report says of such a target.
    """

    context: Callable[[torch.nn.Module], AbstractContextManager[None]]
    of_graph: Arithmetic
    note: str | None = None


_ROUNDED = "the limits come from runs of the reference that round so too"
ARITHMETICS: dict[Arithmetic, ArithmeticRow] = {
    "fp32": ArithmeticRow(nullcontext, "fp32"),
    "fp16": ArithmeticRow(half_parts, "fp16", f"attention in FP16; {_ROUNDED}"),
    "fp16 tokens": ArithmeticRow(
        half_tokens, "fp32", f"tensors of tokens in FP16; {_ROUNDED}; layers are proven in float32"
    ),
}
