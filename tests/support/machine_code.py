"""What the instructions of compiled kernels are, for the tests that say what they must be."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

from plugins.gpu.compile import Compiled, cuobjdump

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


@cache
def opcodes(compiled: Compiled) -> Counter[str]:
    """How often each instruction stands in the machine code, modifiers included: {"LDG.E.128": 4, ...}."""
    return Counter(_INSTRUCTION.findall(cuobjdump(compiled.cubin, "-sass")))


def count(compiled: Compiled, *beginnings: str) -> int:
    """Instructions whose names begin with one of `beginnings`."""
    return sum(number for opcode, number in opcodes(compiled).items() if opcode.startswith(beginnings))
