"""What a row of the kernel table says: one Triton kernel, its arguments, its meaning, and how it is launched."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Role = Literal["input", "size", "output"]
Grid = tuple[int, int, int]


class Tile(Protocol):
    """How a kernel splits its work; what else a tile holds is between the kernel's heuristics and its constants."""

    @property
    def num_warps(self) -> int: ...
    @property
    def num_stages(self) -> int: ...


def launch_options(tile: Tile) -> dict[str, Any]:
    """Triton's options of a tile. a * b + c may become one fused operation: kernels that must not are written so."""
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Argument:
    """One run-time argument of a kernel, in the order of its signature: inputs, then sizes, then outputs.

    type: Triton's name; "*{input}" is a pointer to what the spec's field `input` names. shape: for people. when: the
    spec's property that must hold, else the kernel is compiled without the argument (the constant None takes its
    place). Pointers are aligned to 16 bytes.
    """

    name: str
    type: str
    role: Role
    shape: str = ""
    when: str = ""

    @property
    def is_pointer(self) -> bool:
        return self.type.startswith("*")

    def is_there(self, spec: Any) -> bool:
        return not self.when or bool(getattr(spec, self.when))

    def type_for(self, spec: Any) -> str:
        """The type with the spec's float types filled in: "*{input}" -> "*fp16"."""
        return self.type.format_map(_Fields(spec))


class _Fields(dict[str, str]):
    def __init__(self, spec: Any) -> None:
        super().__init__()
        self.spec = spec

    def __missing__(self, key: str) -> str:
        return str(getattr(self.spec, key))


@dataclass(frozen=True)
class Kernel:
    """One row of the table.

    name: also the function's name and the entry's name in the machine code. source: "module:function" of the
    @triton.jit function. spec: the class of what is known when it is compiled. reference(spec, **arrays by argument
    name) -> tuple of NumPy arrays, the outputs. tile(spec, rows, sm) -> the heuristics' choice for `rows` rows of the
    first input on compute capability `sm` (80, 90, ...; 0 under the interpreter). constants(spec, tile, sm) -> the
    kernel's constexpr arguments. grid(spec, tile, rows) -> programs.
    """

    name: str
    doc: str
    source: str
    spec: type
    arguments: tuple[Argument, ...]
    reference: Callable[..., tuple[Any, ...]]
    tile: Callable[[Any, int, int], Tile]
    constants: Callable[[Any, Any, int], dict[str, Any]]
    grid: Callable[[Any, Any, int], Grid]

    def function(self) -> Any:
        """The @triton.jit function; imports triton."""
        module, name = self.source.split(":")
        return getattr(importlib.import_module(module), name)

    def arguments_of(self, spec: Any) -> tuple[Argument, ...]:
        """The arguments that a kernel for `spec` really takes, in order."""
        return tuple(argument for argument in self.arguments if argument.is_there(spec))

    def all_constants(self, spec: Any, tile: Any, sm: int) -> dict[str, Any]:
        """Constexpr arguments and None for the run-time arguments that this spec does without."""
        absent = {argument.name: None for argument in self.arguments if not argument.is_there(spec)}
        return {**absent, **self.constants(spec, tile, sm)}
