"""What TensorRT must know of one kernel: name, PTX, launch sizes and scalars as expressions of shapes.

One kernel for each plugin, no workspace: a GEMM is therefore never split over K. Arguments are the inputs, then 32-bit
integers, then the outputs, which is the order of every kernel of the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from export.errors import ContractError
from plugins.gpu.kernel import Argument
from plugins.tensorrt.expressions import Expression, as_expression, rows_of
from plugins.tensorrt.payload import PLUGINS, Payload, Variant
from plugins.tensorrt.ptx import at_lowest_version, entry_name, keep_parameters
from plugins.tensorrt.rtx_launcher import SHARED

# Inputs that only some layers have -> what their plugin is called besides: its name fixes how many inputs it has.
SUFFIXES = {"multiplier_codes": "Multipliers", "gate": "GateResidual"}


@dataclass(frozen=True)
class AotKernel:
    """name: of the kernel in `ptx`. grid: programs. threads: of each. scalars: integers between inputs and outputs."""

    name: str
    ptx: str
    grid: tuple[Expression, Expression, Expression]
    threads: int
    shared_bytes: int
    scalars: tuple[Expression, ...]


def aot_kernel(payload: Payload, variant: Variant, ranks: Sequence[int]) -> AotKernel:
    """The kernel of one tile. ranks: number of dimensions of each input. The variant's code is PTX as Triton writes it.

    Raises ContractError for a kernel that TensorRT cannot launch.
    """
    arguments = payload.row.arguments_of(payload.spec)
    _check_order(payload.kernel, arguments)
    tile = payload.tile(variant)
    if getattr(tile, "splits", 1) != 1:
        raise ContractError(
            f"{payload.kernel}: a sum in {tile.splits} parts needs a second kernel; choose a tile without"
        )
    rows = rows_of(0, ranks[0])
    sizes = {"M": rows, "tokens": _tokens(arguments, rows, ranks)}
    scalars = tuple(sizes[argument.name] for argument in arguments if argument.role == "size")
    x, y, z = (as_expression(size) for size in payload.row.grid(payload.spec, tile, rows))  # type: ignore[arg-type]
    ptx = at_lowest_version(keep_parameters(variant.code.decode(), len(arguments)))
    return AotKernel(entry_name(ptx), ptx, (x, y, z), variant.threads, variant.shared_bytes, scalars)


def _check_order(kernel: str, arguments: Sequence[Argument]) -> None:
    order = ["input", "size", "output"]
    roles = [order.index(argument.role) for argument in arguments]
    if roles != sorted(roles):
        raise ContractError(
            f"{kernel}: TensorRT passes inputs, integers and outputs in this order, its arguments differ"
        )


def _tokens(arguments: Sequence[Argument], rows: Expression, ranks: Sequence[int]) -> Expression:
    """Rows that share a row of the per-sample inputs."""
    names = [argument.name for argument in arguments if argument.role == "input"]
    shared = next((index for index, name in enumerate(names) if name in SHARED), None)
    return rows if shared is None else rows // rows_of(shared, ranks[shared])


def plugin_name(payload: Payload) -> str:
    """Name of the quick-deployable plugin: of the kernel, and of the inputs that not every layer has."""
    names = {argument.name for argument in payload.row.arguments_of(payload.spec)}
    return PLUGINS[payload.kernel] + "".join(suffix for name, suffix in SUFFIXES.items() if name in names)
