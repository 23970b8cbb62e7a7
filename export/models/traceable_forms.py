"""What the code of models computes with and no graph has a form for, in forms that a graph has.

Complex numbers become pairs of tensors, a mask of truth values what is added to an attention's scores, a number of
tokens that is made a tensor of stays a number that a graph knows. The values are the same but for roundings, except
where a mask leaves out everything that a query could see: here that gives the mean of the values, in torch zeros.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import GetAttrKey, register_pytree_node, tree_map_only

from export.errors import ModelError
from export.models.families import MOST_TOKENS

# Added to the scores of tokens that a mask leaves out, as diffusers adds it in models whose masks are numbers: the
# exponential of a score so far below the largest is 0, and FP16 holds it.
LEFT_OUT = -10_000.0
# What of a tensor only moves numbers: the same is done to both tensors of a pair.
MOVES = frozenset(
    ("clone", "contiguous", "detach", "expand", "flatten", "permute", "repeat", "reshape", "split", "squeeze", "to",
     "transpose", "unsqueeze", "view", "__getitem__")
)  # fmt: skip


class ComplexPair:
    """A complex tensor as two real ones, of any shape and the same. What the code of models does to its tables and
    heads is done to both; by anything else it is taken for the complex tensor."""

    def __init__(self, real: Tensor, imag: Tensor) -> None:
        self.real, self.imag = real, imag

    def __getattr__(self, name: str) -> Any:
        if name in MOVES:
            return lambda *args, **kwargs: self._moved(name, args, kwargs)
        if name in ("shape", "ndim", "device"):
            return getattr(self.real, name)
        raise AttributeError(f"{name} of complex numbers, which is computed in real ones, has no form here")

    def __getitem__(self, index: object) -> ComplexPair:
        pair: ComplexPair = self._moved("__getitem__", (index,), {})
        return pair

    def __mul__(self, other: ComplexPair) -> ComplexPair:
        return ComplexPair(
            self.real * other.real - self.imag * other.imag, self.real * other.imag + self.imag * other.real
        )

    def _moved(self, name: str, args: Sequence[object], kwargs: Mapping[str, object]) -> Any:
        real, imag = (getattr(part, name)(*args, **kwargs) for part in (self.real, self.imag))
        if isinstance(real, tuple | list):
            return tuple(ComplexPair(*parts) for parts in zip(real, imag, strict=True))
        return ComplexPair(real, imag)

    def complex(self) -> Tensor:
        """The tensor that it stands for."""
        return torch.complex(self.real, self.imag)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if func is torch.view_as_real:
            return torch.stack([args[0].real, args[0].imag], dim=-1)
        if func is torch.cat and all(isinstance(part, ComplexPair) for part in args[0]):
            named: Mapping[str, Any] = kwargs or {}
            return joined(*args, **named)
        arguments = (tuple(args), dict(kwargs or {}))
        whole = tree_map_only(ComplexPair, ComplexPair.complex, arguments, is_leaf=lambda x: isinstance(x, ComplexPair))
        return func(*whole[0], **whole[1])


# Whoever takes the arguments of a block apart finds two tensors.
register_pytree_node(
    ComplexPair,
    lambda pair: ([pair.real, pair.imag], None),
    lambda parts, _: ComplexPair(*parts),
    flatten_with_keys_fn=lambda pair: ([(GetAttrKey("real"), pair.real), (GetAttrKey("imag"), pair.imag)], None),
)


def joined(pairs: Sequence[ComplexPair], dim: int = 0) -> ComplexPair:
    """As torch.cat."""
    return ComplexPair(torch.cat([pair.real for pair in pairs], dim), torch.cat([pair.imag for pair in pairs], dim))


class _Forms(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        named = dict(kwargs or {})
        if func is torch.view_as_complex:
            return ComplexPair(*args[0].unbind(-1))
        if func is Tensor.masked_fill and args[0].dtype == torch.bool and not named:
            return args[0] | args[1] if args[2] else args[0] & ~args[1]  # runtimes choose among numbers alone
        if func is torch.as_tensor and isinstance(args[0], torch.SymInt):
            return torch.scalar_tensor(args[0], dtype=named.get("dtype") or torch.int64, device=named.get("device"))
        if func is scaled_dot_product_attention and "attn_mask" in named:
            query = args[0] if args else named["query"]
            named["attn_mask"] = _bias(named["attn_mask"], query.dtype)
        return func(*args, **named)


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask as what is added to scores of a type."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return (1 - mask.to(dtype)) * LEFT_OUT


@contextmanager
def traceable_forms() -> Iterator[None]:
    """Within, torch computes in forms that a graph has."""
    with _Forms():
        yield


@cache
def _formed(cls: Any) -> Any:
    """A class whose forward computes in these forms; the same one for a class, as blocks of one class are alike."""

    class Formed(cls):
        def forward(self, *args: object, **kwargs: object) -> object:
            with traceable_forms():
                return cls.forward(self, *args, **kwargs)

    Formed.__name__, Formed.__qualname__ = cls.__name__, cls.__qualname__
    return Formed


def use_forms_in_blocks(module: nn.Module) -> None:
    """Let repeated blocks compute in these forms when they run alone, too, as calibration runs them."""
    for child in module.children():
        if not isinstance(child, nn.ModuleList):
            use_forms_in_blocks(child)
            continue
        for block in child:
            if not isinstance(block, nn.Linear):
                cls: Any = type(block)
                block.__class__ = _formed(cls)


@dataclass(frozen=True)
class Prefix:
    """A part of a model that gives tables of positions and reads how many rows one of them has as a number, which would
    fix it in a graph. part: its path. counted: the argument of its forward that is the number. table: which of its
    results."""

    part: str
    counted: str
    table: int


def use_real_tables(module: nn.Module) -> None:
    """Put pairs in the places of complex tensors that are attributes of parts of a module, and neither parameters nor
    buffers."""
    for part in module.modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor) and value.is_complex():
                setattr(part, name, ComplexPair(value.real.clone(), value.imag.clone()))


def use_prefix(module: nn.Module, prefix: Prefix) -> None:
    """Let a part of a module compute a table for MOST_TOKENS, and give as many of its rows as it is asked for. Its
    forward raises ModelError where it is asked for no number."""
    part = module.get_submodule(prefix.part)
    cls: Any = type(part)
    signature = inspect.signature(cls.forward)

    class Prefixed(cls):  # a class, not a part around it: what the part holds keeps its path
        def forward(self, *args: object, **kwargs: object) -> tuple[object, ...]:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            rows, bound.arguments[prefix.counted] = bound.arguments[prefix.counted], MOST_TOKENS
            if rows is None:
                raise ModelError(
                    f"{cls.__name__}: its argument {prefix.counted} is None, so that nothing says how many rows of its "
                    "table are read; its model must pass it a number"
                )
            tables = list(cls.forward(*bound.args, **bound.kwargs))
            tables[prefix.table] = tables[prefix.table][:rows]
            return tuple(tables)

    Prefixed.__name__ = cls.__name__
    part.__class__ = Prefixed
