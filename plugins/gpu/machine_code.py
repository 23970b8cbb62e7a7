"""What the machine code of a kernel says: instructions, registers, local and shared memory. Needs no GPU.

Triton's package ships NVIDIA's cuobjdump and ptxas, which are run here.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from export.errors import EnvironmentLacksError

TIMEOUT_S = 120
MAX_REGISTERS = 255
# Largest shared memory of a thread block in KiB: CUDA C++ programming guide, technical specifications per compute
# capability ("maximum amount of shared memory per thread block").
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
TARGETS = tuple(SHARED_KIB)
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_RESOURCES = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Resources:
    """registers of a thread; local_bytes of a thread (stack and spills); shared_bytes fixed at compilation."""

    registers: int
    local_bytes: int
    shared_bytes: int


def tool(name: str) -> Path:
    """Path of cuobjdump, nvdisasm or ptxas in triton's package. Raises EnvironmentLacksError without triton."""
    try:
        import triton
    except ImportError as error:
        raise EnvironmentLacksError("triton is not installed; run: pip install 'ditc[cuda]'") from error
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def opcodes(cubin: bytes) -> Counter[str]:
    """How often each instruction stands in the machine code, modifiers included: {"LDG.E.128": 4, ...}."""
    return Counter(_INSTRUCTION.findall(_cuobjdump(cubin, "-sass")))


def resources(cubin: bytes, name: str) -> Resources:
    """Registers and memory of the entry `name`."""
    rows = {row[0]: [int(number) for number in row[1:]] for row in _RESOURCES.findall(_usage(cubin))}
    registers, stack, shared, local = rows[name]
    return Resources(registers, stack + local, shared)


def _usage(cubin: bytes) -> str:
    return _cuobjdump(cubin, "--dump-resource-usage")


def _cuobjdump(cubin: bytes, option: str) -> str:
    path = tool("cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(path), option, file.name]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                encoding="utf-8",
                errors="replace",
                check=False,
                timeout=TIMEOUT_S,
            )
        except OSError as error:
            raise EnvironmentLacksError(f"{path} does not run ({error}); reinstall triton") from error
    if done.returncode:
        raise RuntimeError(f"cuobjdump {option} failed: {done.stderr.strip()}")
    return done.stdout
