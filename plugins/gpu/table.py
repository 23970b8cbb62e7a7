"""The table of GPU kernels: one row each, in the order in which a linear layer meets them.

A row has THE list of its kernel's arguments. What is compiled, launched, offered as a torch op, given to the reference
and passed by TensorRT follows from it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol

from export.errors import ContractError
from plugins.gpu import reference, tiles
from plugins.gpu.spec import Before, Epilogue, GemmSpec, PackSpec, QuantizeSpec

if TYPE_CHECKING:
    from triton.runtime.jit import JITFunction

Role = Literal["input", "size", "output"]
Spec = GemmSpec | PackSpec | QuantizeSpec
Grid = tuple[int, int, int]
# Triton's element type -> name of NumPy's and torch's.
ELEMENTS = {"*u8": "uint8", "*fp16": "float16", "*bf16": "bfloat16", "*fp32": "float32"}
PER_SAMPLE = "M / tokens"


class Tile(Protocol):
    """How a kernel splits its work; what else a tile holds is between the kernel's heuristics and its constants."""

    @property
    def num_warps(self) -> int: ...
    @property
    def num_stages(self) -> int: ...
    def __hash__(self) -> int: ...


def launch_options(tile: Tile) -> tiles.Constants:
    """Triton's options of a tile. a * b + c may become one fused operation: kernels that must not are written so."""
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Argument:
    """One run-time argument of a kernel, in the order of its signature: inputs, then sizes, then outputs.

    type: Triton's name; "*{input}" is a pointer to what the spec's field `input` names. shape: names of the spec's
    `dims`, of sizes, and "M / tokens" for what has one row for each sample. when, unless: a property of the spec that
    must hold, or must not; else the kernel is compiled without the argument (the constant None takes its place).
    suffix: what a plugin that has it is called besides. Pointers are aligned to 16 bytes.
    """

    name: str
    type: str
    role: Role
    shape: tuple[str, ...] = ()
    when: str | None = None
    unless: str | None = None
    suffix: str = ""

    @property
    def is_pointer(self) -> bool:
        return self.type.startswith("*")

    @property
    def is_always_there(self) -> bool:
        return self.when is None and self.unless is None

    @property
    def is_per_sample(self) -> bool:
        """One row for each sample, which `tokens` rows of the first input share."""
        return self.shape[:1] == (PER_SAMPLE,)

    def is_there(self, spec: Spec) -> bool:
        holds = self.when is None or bool(getattr(spec, self.when))
        return holds and not (self.unless is not None and getattr(spec, self.unless))

    def type_for(self, spec: Spec) -> str:
        """The type with the spec's float types filled in: "*{input}" -> "*fp16"."""
        field = self.type.removeprefix("*{").removesuffix("}")
        return self.type if field == self.type else f"*{getattr(spec, field)}"

    def element_for(self, spec: Spec) -> str:
        """A pointer's element type by the name that NumPy and torch have for it."""
        return ELEMENTS[self.type_for(spec)]

    def shape_for(self, spec: Spec) -> tuple[int | str, ...]:
        """The shape, with the names of sizes that only tensors tell, see `run_time_sizes`."""
        return tuple(int(name) if name.isdigit() else spec.dims.get(name, name) for name in self.shape)


def run_time_sizes(rows: int, tokens: int = 0) -> dict[str, int]:
    """Sizes by name for `rows` rows of the first input, `tokens` of which belong to a sample. Symbols of torch stay."""
    samples = {PER_SAMPLE: rows // tokens, "tokens": tokens} if tokens else {}
    return {"M": rows, "rows": rows, **samples}


def resolved(shape: tuple[int | str, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A shape with its run-time sizes filled in."""
    return tuple([sizes[size] if isinstance(size, str) else size for size in shape])


@dataclass(frozen=True)
class Kernel:
    """One row of the table.

    name: also the function's name and the entry's name in the machine code. module: of plugins.gpu, where the
    @triton.jit function stands. spec: the class of what is known when it is compiled. reference(spec, **arrays by
    argument name) -> tuple of NumPy arrays, the outputs. tile(spec, rows, sm) -> the heuristics' choice for `rows` rows
    of the first input on compute capability `sm` (80, 90, ...; 0 under the interpreter). constants(spec, tile, sm) ->
    the kernel's constexpr arguments. grid(spec, tile, rows) -> programs. plugin: its name in TensorRT, where it has a
    plugin.
    """

    name: str
    module: str
    spec: type[Spec]
    arguments: tuple[Argument, ...]
    reference: Callable[..., tuple[reference.Array, ...]]
    tile: Callable[..., Tile]
    constants: Callable[..., tiles.Constants]
    grid: Callable[..., Grid]
    plugin: str | None = None

    def __hash__(self) -> int:
        return hash(self.name)  # of all arguments it would cost every launch some microseconds

    def __reduce__(self) -> tuple[Callable[[str], Kernel], tuple[str]]:
        return kernel, (self.name,)  # in another process it is that process's row

    def function(self) -> JITFunction:
        """The @triton.jit function; imports triton."""
        return getattr(importlib.import_module(f"plugins.gpu.{self.module}"), self.name)

    def arguments_of(self, spec: Spec) -> tuple[Argument, ...]:
        """The arguments that a kernel for `spec` really takes, in order."""
        return tuple(argument for argument in self.arguments if argument.is_there(spec))

    def inputs(self, spec: Spec) -> tuple[Argument, ...]:
        return tuple(argument for argument in self.arguments_of(spec) if argument.role == "input")

    def sizes(self, spec: Spec) -> tuple[Argument, ...]:
        return tuple(argument for argument in self.arguments_of(spec) if argument.role == "size")

    def outputs(self, spec: Spec) -> tuple[Argument, ...]:
        return tuple(argument for argument in self.arguments_of(spec) if argument.role == "output")

    def all_constants(self, spec: Spec, tile: Tile, sm: int) -> tiles.Constants:
        """Constexpr arguments and None for the run-time arguments that this spec does without."""
        absent: tiles.Constants = {argument.name: None for argument in self.arguments if not argument.is_there(spec)}
        return {**absent, **self.constants(spec, tile, sm)}


# --- the rows --------------------------------------------------------------------------------------------------------

_X = Argument("x", "*{input}", "input", ("M", "C"))
_STATIC = (
    Argument("static_scale", "*fp32", "input", ("1",), when="static"),
    Argument("static_zero", "*fp32", "input", ("1",), when="static"),
)
_M = Argument("M", "i32", "size")
_TOKENS = Argument("tokens", "i32", "size")
_QUANTIZED = (
    Argument("codes", "*u8", "output", ("M", "C")),
    Argument("scales", "*fp32", "output", ("M",), unless="static"),
)

_A = Argument("a", "*u8", "input", ("M", "K"))
_A_SCALE = Argument("a_scale", "*fp32", "input", ("M",))
_W = Argument("w", "*u8", "input", ("N", "K / 2"))
_EXPANDED = Argument("w", "*u8", "input", ("N", "K"))
_MULTIPLIER_CODES = Argument(
    "multiplier_codes", "*u8", "input", ("N", "multiplier bytes"), when="has_multipliers", suffix="Multipliers"
)
_W_SCALES = Argument("w_scales", "*fp32", "input", ("N", "scale groups"))
# Epilogue -> what a GEMM reads for it beside what every GEMM reads.
EPILOGUE_OPERANDS: dict[Epilogue, tuple[Argument, ...]] = {
    "none": (),
    "gate_residual": (
        Argument("gate", "*{output}", "input", (PER_SAMPLE, "N"), when="has_gate", suffix="GateResidual"),
        Argument("residual", "*{output}", "input", ("M", "N"), when="has_gate"),
    ),
}
_AFTER_SUM = (
    Argument("bias", "*fp32", "input", ("N",)),
    Argument("a_zero", "*fp32", "input", ("M",), when="zero_point", suffix="ZeroPoint"),
    Argument("w_sums", "*fp32", "input", ("N",), when="zero_point"),
    *(operand for operands in EPILOGUE_OPERANDS.values() for operand in operands),
    _M,
    Argument("tokens", "i32", "size", when="has_gate"),
    Argument("y", "*{output}", "output", ("M", "N")),
)

_QUANTIZE = Kernel(
    name="quantize",
    module="quantize",
    spec=QuantizeSpec,
    arguments=(_X, *_STATIC, _M, *_QUANTIZED),
    reference=reference.quantize,
    tile=tiles.row_tile,
    constants=tiles.quantize_constants,
    grid=tiles.row_grid,
    plugin="Quantize",
)
_PACKED_GEMM = Kernel(
    name="packed_gemm",
    module="gemm",
    spec=GemmSpec,
    arguments=(_A, _A_SCALE, _W, _W_SCALES, _MULTIPLIER_CODES, *_AFTER_SUM),
    reference=reference.packed_gemm,
    tile=partial(tiles.gemm_tile, tiles.PACKED),
    constants=tiles.packed_constants,
    grid=tiles.gemm_grid,
    plugin="PackedGemm",
)

KERNELS: tuple[Kernel, ...] = (
    # x [M, C] -> codes, scales: operand bytes of x / scale, scale = absmax / max_value or static.
    _QUANTIZE,
    # As quantize, of GELU(x) in its tanh form.
    replace(_QUANTIZE, name="gelu_quantize", reference=reference.gelu_quantize, plugin="GeluQuantize"),
    # As quantize, of LayerNorm(x) * (1 + scale) + shift.
    replace(
        _QUANTIZE,
        name="norm_modulate_quantize",
        arguments=(
            _X,
            Argument("shift", "*{input}", "input", (PER_SAMPLE, "C")),
            Argument("scale", "*{input}", "input", (PER_SAMPLE, "C")),
            *(_M, _TOKENS),
            *_QUANTIZED,
        ),
        reference=reference.norm_modulate_quantize,
        constants=tiles.norm_constants,
        plugin="NormModulateQuantize",
    ),
    # y = epilogue((a @ w^T * w_scales) * a_scale + a_zero * w_sums + bias), weights decoded in the kernel.
    _PACKED_GEMM,
    # As packed_gemm, with weights that `expand` has turned into E4M3 or INT8 bytes, their multipliers folded in.
    replace(
        _PACKED_GEMM,
        name="expanded_gemm",
        arguments=(_A, _A_SCALE, _EXPANDED, _W_SCALES, *_AFTER_SUM),
        reference=reference.expanded_gemm,
        tile=partial(tiles.gemm_tile, tiles.EXPANDED),
        constants=tiles.gemm_constants,
        plugin=None,
    ),
    # Unscaled sums of a GEMM's splits (with real groups scaled) -> y as packed_gemm.
    replace(
        _PACKED_GEMM,
        name="reduce_splits",
        arguments=(Argument("parts", "*fp32", "input", ("splits", "M", "N")), _A_SCALE, _W_SCALES, *_AFTER_SUM),
        reference=reference.reduce_splits,
        tile=tiles.reduce_tile,
        constants=tiles.reduce_constants,
        grid=tiles.reduce_grid,
        plugin=None,
    ),
    # codes below 16 -> two in a byte, element 2i in the low nibble.
    Kernel(
        name="pack",
        module="repack",
        spec=PackSpec,
        arguments=(
            Argument("codes", "*u8", "input", ("rows", "K")),
            Argument("rows", "i32", "size"),
            Argument("packed", "*u8", "output", ("rows", "K / 2")),
        ),
        reference=reference.pack,
        tile=tiles.band_tile,
        constants=tiles.pack_constants,
        grid=tiles.band_grid,
    ),
    # Packed codes -> E4M3 or INT8 bytes of value * multiplier * a power of two.
    Kernel(
        name="expand",
        module="repack",
        spec=GemmSpec,
        arguments=(
            *(_W, _MULTIPLIER_CODES),
            Argument("rows", "i32", "size"),
            Argument("expanded", "*u8", "output", ("N", "K")),
        ),
        reference=reference.expand,
        tile=tiles.band_tile,
        constants=tiles.expand_constants,
        grid=tiles.band_grid,
    ),
)


# What a quantizer does first -> its kernel.
QUANTIZER_OF: dict[Before, str] = {
    "none": "quantize",
    "gelu": "gelu_quantize",
    "norm_modulate": "norm_modulate_quantize",
}


def gemm_inputs(epilogue: Epilogue) -> tuple[str, ...]:
    """Names of what a GEMM of packed weights reads: with multipliers and this epilogue, without a zero point."""
    spec = GemmSpec("E2M3", "E2M1", 64, 64, 32, (1, 2), epilogue=epilogue)
    return tuple(argument.name for argument in kernel("packed_gemm").inputs(spec))


def kernel(name: str) -> Kernel:
    """The row called `name`. Raises ContractError for a name that this version does not have."""
    for row in KERNELS:
        if row.name == name:
            return row
    raise ContractError(f"kernel {name!r} is not in the table of kernels; build the engine again with this version")
