"""Contexts that watch or disturb the PyTorch reference while they last: recorded inputs, jitter, parts in FP16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.backends.base import LARGE_ELEMENTS, Arithmetic
from pipeline.distance import ratio_db
from pipeline.verify.noise import Noise
from pipeline.verify.oracle import ROUNDING

if TYPE_CHECKING:
    import torch


@dataclass
class Recorder:
    """Inputs of every quantized linear, [rows, K] float32, one array for each recorded call.

    Linears that read the same tensor one after the other (q, k and v) share one array.
    """

    active: bool = True
    inputs: dict[str, list[NDArray[np.float32]]] = field(default_factory=dict)
    last: tuple[Any, Any] = (None, None)  # a tensor and its rows

    def __call__(self, module: Any, arguments: tuple[Any, ...]) -> None:
        if self.active:
            x = arguments[0]
            if self.last[0] is not x:
                self.last = (x, x.reshape(-1, x.shape[-1]).float().numpy().copy())
            self.inputs.setdefault(module.layer_name, []).append(self.last[1])


@dataclass
class Comparison:
    """SQNR of every quantized linear's input against a Recorder's, without keeping the inputs themselves."""

    reference: dict[str, list[NDArray[np.float32]]]
    active: bool = True
    calls: dict[str, int] = field(default_factory=dict)
    powers: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __call__(self, module: Any, arguments: tuple[Any, ...]) -> None:
        name = module.layer_name
        if not self.active or name not in self.reference:
            return
        expected = self.reference[name][self.calls.get(name, 0)].astype(np.float64)
        actual = arguments[0].reshape(-1, arguments[0].shape[-1]).double().numpy()
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

    def move(part: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x = arguments[0]
        size = x.abs() + x.square().mean(-1, keepdim=True).sqrt()
        return (noise.moved(x, size, ulps * ROUNDING), *arguments[1:])

    with hooked(module, move):
        yield


@contextmanager
def hooked(module: torch.nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    """Call `hook(linear, inputs)` before every quantized linear of the reference `module`."""
    with ExitStack() as stack:
        for part in module.modules():
            if hasattr(part, "layer_name"):
                stack.callback(part.register_forward_pre_hook(hook).remove)
        yield


@contextmanager
def half_parts(module: torch.nn.Module) -> Iterator[None]:
    """Attention, and large unquantized linears, round operands and result to FP16; sums and softmax stay float32."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention
    from torch.overrides import TorchFunctionMode

    class HalfAttention(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is not scaled_dot_product_attention:
                return func(*args, **(kwargs or {}))
            operands = [_half(argument) for argument in args[:3]]
            return _half(func(*operands, *args[3:], **(kwargs or {})))

    with ExitStack() as stack:
        for part in module.modules():
            if isinstance(part, torch.nn.Linear) and part.weight.numel() >= LARGE_ELEMENTS:
                stack.callback(part.register_forward_pre_hook(lambda _, inputs: _half(inputs[0])).remove)
                stack.callback(part.register_forward_hook(lambda _, inputs, output: _half(output)).remove)
        stack.enter_context(HalfAttention())
        yield


@contextmanager
def half_tokens(module: torch.nn.Module) -> Iterator[None]:
    """Every tensor of tokens (three axes or more) rounds to FP16 where a function gives it; quantized linears compute
    in float32 within, on an input and to a result rounded so."""
    from torch.overrides import TorchFunctionMode

    class HalfTokens(TorchFunctionMode):
        inside = False

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            return output if self.inside else _rounded(output)

    mode = HalfTokens()

    def enter(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        mode.inside = True
        return (_rounded(arguments[0]), *arguments[1:])

    def leave(_module: Any, _arguments: Any, output: Any) -> Any:
        mode.inside = False
        return _rounded(output)

    with ExitStack() as stack:
        for part in module.modules():
            if hasattr(part, "layer_name"):
                stack.callback(part.register_forward_pre_hook(enter).remove)
                stack.callback(part.register_forward_hook(leave).remove)
        stack.enter_context(mode)
        yield


def _half(tensor: torch.Tensor) -> torch.Tensor:
    """Rounded to FP16, in the tensor's own type."""
    return tensor.half().to(tensor.dtype)


def _rounded(value: Any) -> Any:
    """A float32 tensor of tokens rounded to FP16; anything else as it is."""
    import torch

    tokens = isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.ndim >= 3
    return value.half().float() if tokens else value


@dataclass(frozen=True)
class ArithmeticRow:
    """What an engine may compute in beside its quantized linears.

    context: in which the reference's module computes so. of_graph: the arithmetic of such an engine's lowered graph.
    note: what a report says of such a target.
    """

    context: Callable[[torch.nn.Module], AbstractContextManager[Any]]
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
