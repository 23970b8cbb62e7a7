"""Run the kernels on torch tensors: on their GPU, or on the CPU under Triton's interpreter (TRITON_INTERPRET=1).

Tensors are the arguments of the kernel's row in the table. Those that every kernel of the row has may come in their
order, the others by name. Outputs are allocated, or given by name and written in place, so that a CUDA graph finds them
again. All functions raise ContractError for a tensor that is missing, that the kernel has no use for, or of another
shape, type or memory layout, and EnvironmentLacksError for CPU tensors without an interpreter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from export.errors import ContractError, EnvironmentLacksError
from plugins.gpu import tiles
from plugins.gpu.spec import GemmSpec, PackSpec, QuantizeSpec
from plugins.gpu.table import QUANTIZER_OF, Kernel, Spec, Tile, kernel, launch_options, resolved, run_time_sizes
from plugins.gpu.tiles import INTERPRETED

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def packed_gemm(
    spec: GemmSpec,
    *tensors: Tensor,
    tokens: int = 0,
    tile: tiles.Tile | None = None,
    sm: int | None = None,
    expand_first: bool | None = None,
    **named: Tensor | None,
) -> Tensor:
    """y [M, N] as GemmSpec says, weights packed u8 [N, K / 2].

    tile, sm: what to run instead of the heuristics' choice for the tensors' GPU. expand_first: whether the weight is
    expanded for this call (N x K bytes until it ends) or decoded in registers; without: registers for a given tile,
    else what `tiles.expands_first` says.
    """
    operands = by_name(kernel("packed_gemm"), tensors, named)
    a = _required(operands, "a")
    m = _rows(a)
    if expand_first is None:
        expand_first = tile is None and m > 0 and tiles.expands_first(spec, m, sm_of(a) if sm is None else sm)
    if not expand_first:
        return _gemm("packed_gemm", spec, operands, tokens, tile, sm)
    operands["w"] = expand(spec, _required(operands, "w"), multiplier_codes=operands.pop("multiplier_codes", None))
    return _gemm("expanded_gemm", spec, operands, tokens, tile, sm)


def expanded_gemm(
    spec: GemmSpec,
    *tensors: Tensor,
    tokens: int = 0,
    tile: tiles.Tile | None = None,
    sm: int | None = None,
    **named: Tensor | None,
) -> Tensor:
    """As packed_gemm with w u8 [N, K] from `expand`, multipliers folded in."""
    return _gemm("expanded_gemm", spec, by_name(kernel("expanded_gemm"), tensors, named), tokens, tile, sm)


def _gemm(
    name: str,
    spec: GemmSpec,
    operands: Mapping[str, Tensor | None],
    tokens: int,
    tile: tiles.Tile | None,
    sm: int | None,
) -> Tensor:
    import torch

    row, a = kernel(name), _required(operands, "a")
    m = _rows(a)
    sizes = _sizes(row, spec, m, tokens)
    tensors = checked(row, spec, operands, sizes)
    arguments, y = {**tensors, **sizes}, tensors["y"]
    if m == 0:
        return y
    sm = sm_of(a) if sm is None else sm
    tile = tile or tiles.gemm_tile(name, spec, m, sm, may_split=True)
    if tile.splits == 1:
        run(row, spec, tile, m, sm, arguments)
        return y
    parts = torch.empty((tile.splits, *y.shape), dtype=torch.float32, device=a.device)
    run(row, spec, tile, m, sm, {**arguments, "y": parts})
    run(kernel("reduce_splits"), spec, tiles.ReduceTile(tile.splits), m, sm, {**arguments, "parts": parts})
    return y


def quantize(
    spec: QuantizeSpec, *tensors: Tensor, tokens: int = 0, tile: tiles.RowTile | None = None, **named: Tensor | None
) -> tuple[Tensor, ...]:
    """x [M, C] -> operand bytes u8 [M, C] and, unless static, scale f32 [M], by the kernel that `spec.before` asks for.

    tile: the heuristics' choice unless given.
    """
    row = kernel(QUANTIZER_OF[spec.before])
    return launched(row, spec, by_name(row, tensors, named), tokens, tile)


def pack(*tensors: Tensor, **named: Tensor | None) -> Tensor:
    """codes u8 [N, K] below 16, K even -> packed u8 [N, K / 2], element 2i in the low nibble."""
    row = kernel("pack")
    operands = by_name(row, tensors, named)
    return launched(row, PackSpec(_required(operands, "codes").shape[-1]), operands)[0]


def expand(spec: GemmSpec, *tensors: Tensor, **named: Tensor | None) -> Tensor:
    """w u8 [N, K / 2] -> expanded u8 [N, K]: INT8 or E4M3 bytes of value * multiplier * 2^spec.byte_exponent."""
    row = kernel("expand")
    return launched(row, spec, by_name(row, tensors, named))[0]


def launched(
    row: Kernel, spec: Spec, operands: Mapping[str, Tensor | None], tokens: int = 0, tile: Tile | None = None
) -> tuple[Tensor, ...]:
    """The outputs of one launch of `row`. Not for a GEMM, whose sum may be split."""
    signature = _signature(row, spec)
    first = _required(operands, next(iter(signature.tensors)))
    rows = _rows(first)
    sizes = _sizes(row, spec, rows, tokens)
    tensors = checked(row, spec, operands, sizes)
    if rows:
        sm = sm_of(first)
        run(row, spec, tile or row.tile(spec, rows, sm), rows, sm, {**tensors, **sizes})
    return tuple(tensors[name] for name in signature.outputs)


def run(row: Kernel, spec: Spec, tile: Tile, rows: int, sm: int, arguments: Mapping[str, Tensor | int]) -> None:
    """Launch the kernel of `row` on `arguments` by name; those that the spec does without are left out."""
    names, constants = _plan(row, spec, tile, sm)
    row.function()[row.grid(spec, tile, rows)](**{name: arguments[name] for name in names}, **constants)


@lru_cache(4096)
def _plan(row: Kernel, spec: Spec, tile: Tile, sm: int) -> tuple[tuple[str, ...], tiles.Constants]:
    """(names of the run-time arguments, compile-time arguments and options): what no call changes."""
    names = tuple(argument.name for argument in row.arguments_of(spec))
    return names, {**row.all_constants(spec, tile, sm), **launch_options(tile)}


# --- tensors ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Signature:
    """What the kernel of a row takes for a spec: shape and element type of its tensors, inputs first; its outputs; and
    whether rows share other rows."""

    tensors: dict[str, tuple[tuple[int | str, ...], torch.dtype]]
    outputs: tuple[str, ...]
    takes_tokens: bool


@lru_cache(4096)
def _signature(row: Kernel, spec: Spec) -> _Signature:
    import torch

    pointers = [argument for argument in row.arguments_of(spec) if argument.is_pointer]
    tensors = {one.name: (one.shape_for(spec), getattr(torch, one.element_for(spec))) for one in pointers}
    outputs = tuple(argument.name for argument in row.outputs(spec))
    return _Signature(tensors, outputs, any(argument.name == "tokens" for argument in row.sizes(spec)))


@lru_cache
def _names(row: Kernel) -> tuple[list[str], set[str]]:
    """(inputs that every kernel of the row has, all tensors)."""
    always = [argument.name for argument in row.arguments if argument.role == "input" and argument.is_always_there]
    return always, {argument.name for argument in row.arguments if argument.is_pointer}


def by_name(row: Kernel, tensors: tuple[Tensor, ...], named: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Arguments of `row` by name: `tensors` are, in order, the inputs that every kernel of the row has."""
    always, known = _names(row)
    unknown = sorted(named.keys() - known)
    if unknown or len(tensors) > len(always) or not named.keys().isdisjoint(always[: len(tensors)]):
        problem = f"{', '.join(unknown)} by name" if unknown else f"{len(tensors)} tensors and {sorted(named)} by name"
        raise ContractError(f"{row.name} takes {', '.join(always)} in this order, others of {sorted(known)}: {problem}")
    return {**dict(zip(always, tensors, strict=False)), **named}


def _required(operands: Mapping[str, Tensor | None], name: str) -> Tensor:
    tensor = operands.get(name)
    if tensor is None:
        raise ContractError(f"{name} is missing; the kernel needs it")
    return tensor


def _rows(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.dim() else 0


def _sizes(row: Kernel, spec: Spec, rows: int, tokens: int) -> dict[str, int]:
    """Run-time sizes by name, with `tokens` where the kernel takes it."""
    if not _signature(row, spec).takes_tokens:
        return run_time_sizes(rows)
    if tokens < 1 or rows % tokens:
        shared = " and ".join(argument.name for argument in row.inputs(spec) if argument.is_per_sample)
        raise ContractError(f"tokens {tokens}: the rows that share a row of {shared} must divide the {rows} rows")
    return run_time_sizes(rows, tokens)


def checked(
    row: Kernel, spec: Spec, operands: Mapping[str, Tensor | None], sizes: Mapping[str, int]
) -> dict[str, Tensor]:
    """Inputs and outputs by name, as the kernel takes them; outputs that are not given are allocated."""
    import torch

    signature = _signature(row, spec)
    tensors: dict[str, Tensor] = {}
    for name, (symbols, dtype) in signature.tensors.items():
        shape, tensor = resolved(symbols, sizes), operands.get(name)
        if tensor is not None:
            _check_tensor(row, name, tensor, shape, dtype)
        elif name in signature.outputs:
            tensor = torch.empty(shape, dtype=dtype, device=next(iter(tensors.values())).device)
        else:
            raise ContractError(f"{name} is missing; {row.name} needs it as {_element(dtype)} {list(shape)}")
        tensors[name] = tensor
    unused = [name for name, tensor in operands.items() if tensor is not None and name not in tensors]
    if unused:
        raise ContractError(f"{', '.join(unused)} given, which {row.name} does not take for {spec}")
    return tensors


def _element(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_tensor(row: Kernel, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        layout = "" if tensor.is_contiguous() else ", not contiguous"
        raise ContractError(
            f"{name} is {_element(tensor.dtype)} {list(tensor.shape)}{layout}; {row.name} takes {_element(dtype)} "
            f"{list(shape)}, contiguous"
        )


def sm_of(tensor: Tensor) -> int:
    """Compute capability (10 * major + minor) of the tensor's GPU; INTERPRETED on the CPU.

    Raises EnvironmentLacksError where the CPU has no interpreter.
    """
    import torch
    import triton

    if tensor.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(tensor.device)
        return 10 * major + minor
    if triton.knobs.runtime.interpret:
        return INTERPRETED
    raise EnvironmentLacksError(
        f"tensors on {tensor.device}: the kernels run on a GPU, or on the CPU with TRITON_INTERPRET=1 set before start"
    )
