"""Kernels to compile, and what their instructions are, for the tests that say what they must be."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

from plugins.gpu.compile import Compiled, Request, cuobjdump
from plugins.gpu.table import Kernel, Spec, Tile

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


def chosen(row: Kernel, spec: Spec, sm: int, tile: Tile | None = None, rows: int = 4096) -> Request:
    """What to compile, without a tile in the heuristics' choice for so many rows."""
    return Request(row, spec, sm, row.tile(spec, rows, sm) if tile is None else tile)


@cache
def opcodes(compiled: Compiled) -> Counter[str]:
    """How often each instruction stands in the machine code, modifiers included: {"LDG.E.128": 4, ...}."""
    return Counter(_INSTRUCTION.findall(cuobjdump(compiled.cubin, "-sass")))


def count(compiled: Compiled, *beginnings: str) -> int:
    """Instructions whose names begin with one of `beginnings`."""
    return sum(number for opcode, number in opcodes(compiled).items() if opcode.startswith(beginnings))
