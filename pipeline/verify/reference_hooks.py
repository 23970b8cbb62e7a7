"""Contexts that watch or disturb the PyTorch reference while they last: recorded inputs, jitter, parts in FP16."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from export.formats.operands import ROUNDING
from pipeline.backends.base import LARGE_ELEMENTS, Arithmetic
from pipeline.distance import ratio_db

if TYPE_CHECKING:
    import torch

    Tensors = tuple[torch.Tensor, ...]
    Function = Callable[..., torch.Tensor]
    Keywords = Mapping[str, object]
    Hook = Callable[..., object]

# Added to a run's seed for what moves the sums of its norms: more than the stretches' runs, whose seeds count from 0.
SUMS_SEED = 4
# Operations whose result may be smaller than what they round: 0.5 x (1 + tanh) near -1. Jitter is relative to this.
ROUNDED_OPERAND: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"gelu": lambda x: x.abs() / 2}
# Operations that move numbers and round none.
MOVES = frozenset(
    ("arange", "cat", "clone", "constant_pad_nd", "copy_", "detach", "embedding", "empty", "full", "gather", "index",
     "index_select", "lift_fresh", "new_zeros", "ones", "repeat", "stack", "zeros", "_to_copy", "_unsafe_view")
)  # fmt: skip

# Numbers of the table: those of the hidden layer of 900 tokens at true size, 16 MiB. A larger tensor gets them again.
NUMBERS = 2**22
# Of the table, apart from the seeds that runs have: a run's own draws have nothing to do with it.
TABLE_SEED = 2**40 + 1


class _Switch(threading.local):
    """Is something switched on? For each thread by itself, as passes of one module may go in step."""

    on = True


@dataclass
class Recorder:
    """Inputs of every quantized linear, [rows, K] float32, one array for each recorded call.

    Linears that read the same tensor one after the other (q, k and v) share one array.
    """

    switch: _Switch = field(default_factory=_Switch)
    inputs: dict[str, list[NDArray[np.float32]]] = field(default_factory=dict)
    last: tuple[torch.Tensor, NDArray[np.float32]] | None = None  # a tensor and its rows

    def __call__(self, module: torch.nn.Module, inputs: Tensors) -> None:
        if self.switch.on:
            x = inputs[0]
            if self.last is None or self.last[0] is not x:
                self.last = (x, x.reshape(-1, x.shape[-1]).float().numpy().copy())
            self.inputs.setdefault(module.layer_name, []).append(self.last[1])


@dataclass
class Comparison:
    """SQNR of every quantized linear's input against a Recorder's, without keeping the inputs themselves."""

    reference: dict[str, list[NDArray[np.float32]]]
    switch: _Switch = field(default_factory=_Switch)
    calls: dict[str, int] = field(default_factory=dict)
    powers: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __call__(self, module: torch.nn.Module, inputs: Tensors) -> None:
        name = module.layer_name
        if not self.switch.on or name not in self.reference:
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


@cache
def _table(dtype: torch.dtype) -> torch.Tensor:
    """[2 * NUMBERS], uniform in [-1, 1): the numbers twice, so that a slice of NUMBERS may begin anywhere."""
    import torch

    numbers = torch.rand(NUMBERS, generator=torch.Generator().manual_seed(TABLE_SEED), dtype=dtype) * 2 - 1
    return numbers.repeat(2)


class Noise:
    """Numbers uniform in [-1, 1) for one run, from its seed.

    A jittered run moves every result of every operation. Drawing as many new random numbers as the model computes takes
    longer than computing it; slices of one table that begin at random places are as good: no two operations meet the
    same numbers at the same places but by chance.
    """

    def __init__(self, seed: int) -> None:
        import torch

        self._generator = torch.Generator().manual_seed(seed)

    def moved(self, value: torch.Tensor, size: torch.Tensor, factor: float) -> torch.Tensor:
        """value + factor * size * noise, for value and size of one shape and one float type."""
        import torch

        noise = self._slice(value.numel(), value.dtype).view(value.shape)
        return torch.addcmul(value, size, noise, value=factor)

    def _slice(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        import torch

        first = int(torch.randint(NUMBERS, (), generator=self._generator))
        if count <= NUMBERS:
            return _table(dtype)[first : first + count]
        return _table(dtype)[first : first + NUMBERS].repeat(-(-count // NUMBERS))[:count]


@contextmanager
def jittered(module: torch.nn.Module, seed: int, ulps: float) -> Iterator[None]:
    """Move every quantizer's input by up to `ulps`: of the number itself, and of its row's root mean square (what
    an error made before a cancellation leaves). Of an attention that is quantized these are q, k and v, whose scales
    move the scores, so that integers of exponentials flip as well."""
    from pipeline.backends.reference import AttentionDenoiser

    noise = Noise(seed)

    def moved(x: torch.Tensor) -> torch.Tensor:
        size = x.abs() + x.square().mean(-1, keepdim=True).sqrt()
        return noise.moved(x, size, ulps * ROUNDING)

    def move(_: torch.nn.Module, inputs: Tensors) -> Tensors:
        return (moved(inputs[0]), *inputs[1:])

    with hooked(module, move), ExitStack() as stack:
        if isinstance(module, AttentionDenoiser):
            module.before = moved
            stack.callback(setattr, module, "before", None)
        yield


@contextmanager
def operations_jittered(seed: int, ulps: float) -> Iterator[None]:
    """Every operation that rounds moves its float32 result by up to `ulps` units of 2^-24, at random."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    noise = Noise(seed)
    generator = torch.Generator().manual_seed(seed + SUMS_SEED)  # its own: the two must not move together

    def moved(value: object, extra: torch.Tensor | None) -> object:
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        return noise.moved(value, value if extra is None else value.abs() + extra, ulps * ROUNDING)

    class Jitter(TorchDispatchMode):
        def __torch_dispatch__(
            self,
            func: torch._ops.OpOverload,
            types: object,
            args: tuple[torch.Tensor, ...] = (),
            kwargs: Mapping[str, object] | None = None,
        ) -> object:
            output = func(*args, **(kwargs or {}))
            name = func._schema.name.split("::")[1]
            if name in MOVES or any(value.alias_info for value in func._schema.returns):
                return output
            if name == "native_layer_norm" and output[0].dtype == torch.float32:
                output = (_in_one_pass(output, args, generator), *output[1:])
            extra = ROUNDED_OPERAND[name](args[0]) if name in ROUNDED_OPERAND else None
            if isinstance(output, tuple | list):
                return type(output)([moved(value, extra) for value in output])
            return moved(output, extra)

    with Jitter():
        yield


def _in_one_pass(
    outputs: tuple[torch.Tensor, ...], arguments: tuple[torch.Tensor, ...], generator: torch.Generator
) -> torch.Tensor:
    """A LayerNorm whose sums of x and of x^2 are added up one number after the other, as runtimes may and PyTorch does
    not: variance = mean(x^2) - mean(x)^2.

    Adding K numbers of one sign so rounds by 2^-24 sqrt(K) / 3 of the sum, root mean square (the k-th partial sum is
    k / K of it, and each rounding has 1 / sqrt(3) of its bound). The variance, a difference, gets mean(x^2) / variance
    times that, and its root half.
    """
    import torch

    normalized, mean, reciprocal = outputs
    _, shape, weight, bias, _ = arguments
    rounding = ROUNDING * float(np.prod(shape)) ** 0.5 / 3
    offset = (mean * reciprocal).abs()  # the mean in standard deviations
    scale_error, mean_error = (torch.randn(mean.shape, generator=generator) * rounding for _ in range(2))
    unshifted = normalized if bias is None else normalized - bias
    shift = mean_error * offset if weight is None else mean_error * offset * weight
    return normalized + unshifted * (scale_error * (1 + offset.square()) / 2) + shift


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
