"""Contexts that watch or disturb the PyTorch reference while they last: recorded inputs, jitter, parts in FP16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.gates import ROUNDING
from pipeline.passes.lower_rtx_kept import LARGE_ELEMENTS


@dataclass
class Recorder:
    """Inputs of every quantized linear, [rows, K] float32, one array for each recorded call."""

    active: bool = True
    inputs: dict[str, list[NDArray[np.float32]]] = field(default_factory=dict)

    def __call__(self, module: Any, arguments: tuple[Any, ...]) -> None:
        if self.active:
            x = arguments[0].detach()
            self.inputs.setdefault(module.layer_name, []).append(x.reshape(-1, x.shape[-1]).float().numpy().copy())


@contextmanager
def recording(module: Any) -> Iterator[Recorder]:
    """Record what the quantized linears of the reference `module` read."""
    record = Recorder()
    with _hooked(module, record):
        yield record


@contextmanager
def jittered(module: Any, seed: int, ulps: float) -> Iterator[None]:
    """Move every quantizer's input by up to `ulps`: of the number itself, and of its row's root mean square (what
    an error made before a cancellation leaves)."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def move(part: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x = arguments[0]
        size = x.abs() + x.square().mean(-1, keepdim=True).sqrt()
        noise = torch.rand(x.shape, generator=generator, dtype=x.dtype) * 2 - 1
        return (x + noise * size * (ulps * ROUNDING), *arguments[1:])

    with _hooked(module, move):
        yield


@contextmanager
def _hooked(module: Any, hook: Callable[..., Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for part in module.modules():
            if hasattr(part, "layer_name"):
                stack.callback(part.register_forward_pre_hook(hook).remove)
        yield


@contextmanager
def half_parts(module: Any) -> Iterator[None]:
    """Attention, and large unquantized linears, round operands and result to FP16; sums and softmax stay float32."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention
    from torch.overrides import TorchFunctionMode

    class HalfAttention(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is not scaled_dot_product_attention:
                return func(*args, **(kwargs or {}))
            operands = [argument.half().float() for argument in args[:3]]
            return func(*operands, *args[3:], **(kwargs or {})).half().float()

    with ExitStack() as stack:
        for part in module.modules():
            if isinstance(part, torch.nn.Linear) and part.weight.numel() >= LARGE_ELEMENTS:
                stack.callback(part.register_forward_pre_hook(lambda _, inputs: inputs[0].half().float()).remove)
                stack.callback(part.register_forward_hook(lambda _, inputs, output: output.half().float()).remove)
        stack.enter_context(HalfAttention())
        yield


# Arithmetic of a target -> context in which the reference's module computes so.
ARITHMETICS: dict[str, Callable[[Any], Any]] = {"fp32": nullcontext, "fp16": half_parts}
