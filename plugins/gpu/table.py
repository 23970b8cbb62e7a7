"""The table of GPU kernels: one row each, in the order in which a linear layer meets them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from plugins.gpu import reference, tiles
from plugins.gpu.spec import GemmSpec, PackSpec, QuantizeSpec

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


# --- the rows --------------------------------------------------------------------------------------------------------

_CODES = Argument("codes", "*u8", "output", "[M, C] operand bytes")
_TOKEN_SCALES = Argument("scales", "*fp32", "output", "[M]", "per_token")
_STATIC = (
    Argument("static_scale", "*fp32", "input", "[1]", "static"),
    Argument("static_zero", "*fp32", "input", "[1]", "static"),
)
_X = Argument("x", "*{input}", "input", "[M, C]")
_M = Argument("M", "i32", "size", "rows of x")
_PLAIN = (_X, *_STATIC, _M, _CODES, _TOKEN_SCALES)

_A = (Argument("a", "*u8", "input", "[M, K] operand bytes"), Argument("a_scale", "*fp32", "input", "[M]"))
_W = Argument("w", "*u8", "input", "[N, K / 2] codes, element 2i in the low nibble")
_W_EXPANDED = Argument("w", "*u8", "input", "[N, K] bytes from expand")
_W_SCALES = Argument("w_scales", "*fp32", "input", "[N, scale groups]")
_MULTIPLIER_CODES = Argument("multiplier_codes", "*u8", "input", "[N, ceil(groups / 2)] nibbles", "has_multipliers")
_AFTER = (
    Argument("bias", "*fp32", "input", "[N]"),
    Argument("a_zero", "*fp32", "input", "[M]", "zero_point"),
    Argument("w_sums", "*fp32", "input", "[N]", "zero_point"),
    Argument("gate", "*{output}", "input", "[M / tokens, N]", "has_gate"),
    Argument("residual", "*{output}", "input", "[M, N]", "has_gate"),
    Argument("M", "i32", "size", "rows of a"),
    Argument("tokens", "i32", "size", "rows of a that share a row of gate", "has_gate"),
    Argument("y", "*{output}", "output", "[M, N]"),
)
_ROWS = Argument("rows", "i32", "size", "N, rows of w")

KERNELS: tuple[Kernel, ...] = (
    Kernel(
        "quantize",
        "x [M, C] -> codes u8 [M, C], scale f32 [M]: operand bytes of x / scale, scale = absmax / max_value or static.",
        "plugins.gpu.quantize:quantize",
        QuantizeSpec,
        _PLAIN,
        reference.quantize,
        tiles.row_tile,
        tiles.quantize_constants,
        tiles.row_grid,
    ),
    Kernel(
        "gelu_quantize",
        "As quantize, of GELU(x) in its tanh form.",
        "plugins.gpu.quantize:gelu_quantize",
        QuantizeSpec,
        _PLAIN,
        reference.gelu_quantize,
        tiles.row_tile,
        tiles.quantize_constants,
        tiles.row_grid,
    ),
    Kernel(
        "norm_modulate_quantize",
        "As quantize, of LayerNorm(x) * (1 + scale) + shift; shift and scale [M / tokens, C], of `tokens` rows each.",
        "plugins.gpu.quantize:norm_modulate_quantize",
        QuantizeSpec,
        (
            _X,
            Argument("shift", "*{input}", "input", "[M / tokens, C]"),
            Argument("scale", "*{input}", "input", "[M / tokens, C]"),
            _M,
            Argument("tokens", "i32", "size", "rows of x that share a row of shift and scale"),
            _CODES,
            _TOKEN_SCALES,
        ),
        reference.norm_modulate_quantize,
        tiles.row_tile,
        tiles.norm_constants,
        tiles.row_grid,
    ),
    Kernel(
        "packed_gemm",
        "y [M, N] = epilogue((a @ w^T * w_scales) * a_scale + a_zero * w_sums + bias), weights decoded in the kernel.",
        "plugins.gpu.gemm:packed_gemm",
        GemmSpec,
        (*_A, _W, _W_SCALES, _MULTIPLIER_CODES, *_AFTER),
        reference.packed_gemm,
        tiles.packed_tile,
        tiles.packed_constants,
        tiles.gemm_grid,
    ),
    Kernel(
        "expanded_gemm",
        "As packed_gemm with weights expanded once, at load, to E4M3 or INT8 bytes with their multipliers.",
        "plugins.gpu.gemm:expanded_gemm",
        GemmSpec,
        (*_A, _W_EXPANDED, _W_SCALES, *_AFTER),
        reference.expanded_gemm,
        tiles.expanded_tile,
        tiles.gemm_constants,
        tiles.gemm_grid,
    ),
    Kernel(
        "reduce_splits",
        "parts f32 [splits, M, N], unscaled sums of a GEMM's splits (with real groups scaled) -> y as packed_gemm.",
        "plugins.gpu.gemm:reduce_splits",
        GemmSpec,
        (Argument("parts", "*fp32", "input", "[splits, M, N]"), _A[1], _W_SCALES, *_AFTER),
        reference.reduce_splits,
        tiles.reduce_tile,
        tiles.reduce_constants,
        tiles.reduce_grid,
    ),
    Kernel(
        "pack",
        "codes u8 [N, K] below 16 -> u8 [N, K / 2], element 2i in the low nibble.",
        "plugins.gpu.repack:pack",
        PackSpec,
        (
            Argument("codes", "*u8", "input", "[N, K]"),
            Argument("rows", "i32", "size", "N"),
            Argument("packed", "*u8", "output", "[N, K / 2]"),
        ),
        reference.pack,
        tiles.band_tile,
        tiles.pack_constants,
        tiles.band_grid,
    ),
    Kernel(
        "expand",
        "w u8 [N, K / 2], multiplier_codes -> u8 [N, K], E4M3 or INT8 bytes of value * multiplier * a power of two.",
        "plugins.gpu.repack:expand",
        GemmSpec,
        (_W, _MULTIPLIER_CODES, _ROWS, Argument("expanded", "*u8", "output", "[N, K]")),
        reference.expand,
        tiles.band_tile,
        tiles.expand_constants,
        tiles.band_grid,
    ),
)


def kernel(name: str) -> Kernel:
    """The row called `name`; KeyError for an unknown one."""
    return {row.name: row for row in KERNELS}[name]
