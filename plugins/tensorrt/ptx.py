"""PTX text as TensorRT wants it: the kernel's own parameters and no others."""

from __future__ import annotations

import re

from export.errors import ContractError

ENTRY = re.compile(r"\.visible\s+\.entry\s+(?P<name>[\w$]+)\s*\((?P<parameters>[^)]*)\)")
PARAMETER = re.compile(r"\.param\b.*?(?P<name>[\w$]+)\s*$", re.DOTALL)
VERSION = re.compile(r"^\s*\.version\s+(?P<version>\d+\.\d+)", re.MULTILINE)
# PTX ISA of CUDA 12.8, the first that knows SM120, and what drivers since then take. Triton states the newest that its
# own assembler knows and uses nothing of it: the tests assemble every kind of kernel under this version.
LOWEST_VERSION = "8.7"


def entry_name(ptx: str) -> str:
    """Name of the one kernel in `ptx`. Raises ContractError for another number of them."""
    return _entry(ptx).group("name")


def parameter_names(ptx: str) -> list[str]:
    """Names of the kernel's parameters, in order."""
    return [_name(text) for text in _parameters(_entry(ptx))]


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
    found = VERSION.search(ptx)
    if found is None:
        raise ContractError("a PTX text states no version")
    if _number(found["version"]) <= _number(LOWEST_VERSION):
        return ptx
    start, end = found.span("version")
    return ptx[:start] + LOWEST_VERSION + ptx[end:]


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _entry(ptx: str) -> re.Match[str]:
    found = list(ENTRY.finditer(ptx))
    if len(found) != 1:
        raise ContractError(f"{len(found)} kernels in a PTX text; a plugin has one")
    return found[0]


def _parameters(entry: re.Match[str]) -> list[str]:
    text = entry.group("parameters")
    return text.rstrip().split(",") if text.strip() else []


def _name(parameter: str) -> str:
    found = PARAMETER.search(parameter)
    if found is None:
        raise ContractError(f"{parameter.strip()!r} is no PTX parameter")
    return found.group("name")
