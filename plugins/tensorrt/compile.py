"""Compiles what a plugin carries: the kernel of one layer for every GPU, one tile for each range of rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from export.errors import ContractError
from plugins.gpu import compile, machine_code
from plugins.gpu.compile import Compiled, Request
from plugins.tensorrt.payload import Payload, Variant, kernel_row

logger = logging.getLogger(__name__)
Form = Literal["cubin", "ptx"]
WARP = 32


def problems(sms: Sequence[int]) -> list[str]:
    """Why the kernels cannot be compiled here for these GPUs, with the remedy."""
    known = machine_code.TARGETS
    unknown = [sm for sm in sms if sm not in known]
    found = [f"the kernels are not compiled for SM {sm}, only for {', '.join(map(str, known))}" for sm in unknown]
    return [*found, *compile.problems()]


def compile_payload(kernel: str, spec: Any, rows: Sequence[int], sms: Sequence[int], form: Form = "cubin") -> Payload:
    """The kernel for every GPU of `sms` and every tile that its heuristics choose for `rows`.

    form: machine code, which runs on that very GPU, or PTX. Raises EnvironmentLacksError without a usable triton,
    ContractError where a spec fits no kernel or the machine code cannot run.
    """
    row = kernel_row(kernel)
    chosen = [(sm, most, tile) for sm in sms for most, tile in _tiles(row, spec, rows, sm)]
    codes = compile.compile_kernels([Request(row, spec, sm, tile) for sm, _, tile in chosen])
    variants = (_variant(sm, most, tile, code, form) for (sm, most, tile), code in zip(chosen, codes, strict=True))
    return Payload(kernel, spec, tuple(variants))


def _tiles(row: Any, spec: Any, rows: Sequence[int], sm: int) -> list[tuple[int, Any]]:
    """(most rows, tile) with neighbours of the same tile as one."""
    found: list[tuple[int, Any]] = []
    for most in sorted(set(rows)):
        tile = row.tile(spec, most, sm)
        if found and found[-1][1] == tile:
            found.pop()
        found.append((most, tile))
    return found


def _variant(sm: int, rows: int, tile: Any, code: Compiled, form: Form) -> Variant:
    lacking = machine_code.SHARED_KIB[sm] * 1024 - code.shared_bytes
    if lacking < 0:
        raise ContractError(f"{code.name} needs {-lacking} bytes of shared memory more than SM {sm} has; tile {tile}")
    for problem in code.problems():
        logger.warning("%s", problem)
    types = tuple(kind for _, kind in code.arguments) + ("*i8",) * code.unused_parameters
    text = code.cubin if form == "cubin" else code.ptx.encode()
    return Variant(sm, rows, asdict(tile), code.name, types, code.num_warps * WARP, code.shared_bytes, text)
