"""What TensorRT must know of one kernel: name, PTX, launch sizes and scalars as expressions of shapes.

One kernel for each plugin, no workspace: a GEMM is therefore never split over K. Arguments are the inputs, then 32-bit
integers, then the outputs, which is the order of every kernel of the table.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from export.errors import ContractError
from plugins.gpu.table import Argument
from plugins.tensorrt.expressions import Expression, as_expression, rows_of
from plugins.tensorrt.payload import PLUGINS, Payload, Variant

ENTRY = re.compile(r"\.visible\s+\.entry\s+(?P<name>[\w$]+)\s*\((?P<parameters>[^)]*)\)")
PARAMETER = re.compile(r"\.param\b.*?(?P<name>[\w$]+)\s*$", re.DOTALL)
VERSION = re.compile(r"^\s*\.version\s+(?P<version>\d+\.\d+)", re.MULTILINE)
# PTX ISA of CUDA 12.8, the first that knows SM120, and what drivers since then take. Triton states the newest that its
# own assembler knows and uses nothing of it: the tests assemble every kind of kernel under this version.
LOWEST_VERSION = "8.7"


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
    if (splits := getattr(tile, "splits", 1)) != 1:
        raise ContractError(f"{payload.kernel}: a sum in {splits} parts needs a second kernel; choose a tile without")
    rows = rows_of(0, ranks[0])
    sizes = {"M": rows, "tokens": _tokens(arguments, rows, ranks)}
    scalars = tuple(sizes[argument.name] for argument in arguments if argument.role == "size")
    x, y, z = (as_expression(size) for size in payload.row.grid(payload.spec, tile, rows))
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
    inputs = [argument for argument in arguments if argument.role == "input"]
    shared = next((index for index, argument in enumerate(inputs) if argument.is_per_sample), None)
    return rows if shared is None else rows // rows_of(shared, ranks[shared])


def plugin_name(payload: Payload) -> str:
    """Name of the quick-deployable plugin: of the kernel, and of the inputs that not every layer has, whose number the
    name fixes."""
    return PLUGINS[payload.kernel] + "".join(argument.suffix for argument in payload.row.inputs(payload.spec))


# --- PTX text as TensorRT wants it: the kernel's own parameters and no others -----------------------------------------


def entry_name(ptx: str) -> str:
    """Name of the one kernel in `ptx`. Raises ContractError for another number of them."""
    return _entry(ptx).group("name")


def keep_parameters(ptx: str, count: int) -> str:
    """`ptx` whose kernel has its first `count` parameters only.

    Triton appends pointers to scratch memory, which kernels of plain pointers never load, and TensorRT passes no
    arguments for them. Raises ContractError if there are fewer parameters, or if the kernel reads one that would go.
    """
    entry = _entry(ptx)
    parameters = _parameters(entry)
    if len(parameters) < count:
        raise ContractError(f"{entry.group('name')} has {len(parameters)} parameters, its arguments are {count}")
    start, end = entry.span("parameters")
    body = ptx[end:]
    read = [name for name in map(_name, parameters[count:]) if re.search(rf"\b{re.escape(name)}\b", body)]
    if read:
        raise ContractError(f"{entry.group('name')} reads {', '.join(read)}, which TensorRT does not pass")
    return ptx[:start] + ",".join(parameters[:count]) + "\n" + body


def at_lowest_version(ptx: str) -> str:
    """`ptx` stating LOWEST_VERSION instead of a newer one, so that older drivers take it."""
    stated = VERSION.search(ptx)
    if stated is None:
        raise ContractError("a PTX text states no version")
    if _number(stated["version"]) <= _number(LOWEST_VERSION):
        return ptx
    start, end = stated.span("version")
    return ptx[:start] + LOWEST_VERSION + ptx[end:]


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _entry(ptx: str) -> re.Match[str]:
    entries = list(ENTRY.finditer(ptx))
    if len(entries) != 1:
        raise ContractError(f"{len(entries)} kernels in a PTX text; a plugin has one")
    return entries[0]


def _parameters(entry: re.Match[str]) -> list[str]:
    text = entry.group("parameters")
    return text.rstrip().split(",") if text.strip() else []


def _name(parameter: str) -> str:
    match = PARAMETER.search(parameter)
    if match is None:
        raise ContractError(f"{parameter.strip()!r} is no PTX parameter")
    return match.group("name")
