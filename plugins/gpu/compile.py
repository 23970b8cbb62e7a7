"""Kernels compiled ahead of time for a GPU that need not be there, kept in a cache on disk, and read again.

The key of the cache is everything that the machine code follows from: the source of the kernel and of every function it
calls, argument types, constants, target, options and triton's version. Under Triton's interpreter (TRITON_INTERPRET=1),
whose kernels are no compiler's input, another Python process compiles. What machine code needs (registers, memory) is
read with NVIDIA's cuobjdump, which Triton's package ships with ptxas.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import inspect
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.cache_folder import cache_folder
from export.documents import whole_file
from export.errors import ContractError, EnvironmentLacksError
from plugins.gpu.table import Kernel, Spec, Tile, launch_options
from plugins.gpu.tiles import WARP

if TYPE_CHECKING:
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

log = logging.getLogger(__name__)
CACHE_VERSION = 2
MINIMUM_TRITON = (3, 6)
COMPILE_TIMEOUT_S = 1800
TOOL_TIMEOUT_S = 120
MAX_REGISTERS = 255
# Largest shared memory of a thread block in KiB: CUDA C++ programming guide, technical specifications per compute
# capability ("maximum amount of shared memory per thread block").
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
TARGETS = tuple(SHARED_KIB)
_RESOURCES = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True)
class Request:
    """What to compile: a row of the table, what is known of it, the target, the tile.

    sm: compute capability, one of TARGETS; 90, 100 and 120 compile for their sets "a". Raises
    ContractError for another.
    """

    kernel: Kernel
    spec: Spec
    sm: int
    tile: Tile

    def __post_init__(self) -> None:
        if self.sm not in TARGETS:
            raise ContractError(f"sm {self.sm} is no target of the GPU kernels; use one of {TARGETS}")


@dataclass(frozen=True)
class Compiled:
    """A kernel as machine code and as PTX.

    name of the entry; target as ptxas names it ("sm_90a"); arguments: (name, Triton type) in the order of the PTX's
    parameters, of which Triton adds `unused_parameters` pointers at the end that no kernel of the table reads (pass
    null); shared_bytes to ask for at launch; local_bytes of a thread: 0 unless registers spill.
    """

    name: str
    target: str
    num_warps: int
    arguments: tuple[tuple[str, str], ...]
    unused_parameters: int
    registers: int
    local_bytes: int
    shared_bytes: int
    ptx: str
    cubin: bytes = field(repr=False)

    def problems(self) -> list[str]:
        """What would keep the kernel from running, or from running well, on its target."""
        sm = int(re.sub(r"\D", "", self.target))
        limit = SHARED_KIB[sm] * 1024
        rules = (
            (self.local_bytes > 0, f"{self.local_bytes} bytes of local memory a thread: registers spill"),
            (self.registers > MAX_REGISTERS, f"{self.registers} registers"),
            (self.shared_bytes > limit, f"{self.shared_bytes} bytes of shared memory; {self.target} has {limit}"),
        )
        return [f"{self.name} on {self.target}: {text}" for broken, text in rules if broken]


def compile_kernels(requests: Sequence[Request]) -> list[Compiled]:
    """Many kernels, those that the cache lacks compiled one after the other.

    Raises EnvironmentLacksError without a usable triton, ContractError where a spec fits no kernel.
    """
    if lacking := problems():
        raise EnvironmentLacksError("; ".join(lacking))
    cached = [_cached(request) for request in requests]
    missing = [request for request, one in zip(requests, cached, strict=True) if one is None]
    if any(_is_interpreted(request) for request in missing):
        _compile_in_another_process(missing)
        return [_cached(request) or _compile(request) for request in requests]
    return [one or _compile(request) for request, one in zip(requests, cached, strict=True)]


def problems() -> list[str]:
    """Why nothing can be compiled here, with the remedy; empty where it can."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ["triton is not installed; run: pip install 'ditc[cuda]'"]
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_TRITON:
        least = ".".join(map(str, MINIMUM_TRITON))
        return [f"triton {version} is too old; run: pip install 'triton>={least}'"]
    tools = [tool(name) for name in ("ptxas", "cuobjdump")]
    return [
        f"{path} of triton {version} is missing; reinstall triton" for path in tools if not os.access(path, os.X_OK)
    ]


# --- the cache -----------------------------------------------------------------------------------------------------
# A result that can be made again: written atomically, read by several processes, never trusted. An entry is one file:
# the SHA-256 of the rest in hexadecimal, a line feed, JSON. An entry that is cut off, changed or of another version is
# removed as if it were not there.


def kernels_folder() -> Path:
    """Where compiled kernels lie."""
    return cache_folder("kernels")


def entry_key(parts: object) -> str:
    """Name of the entry for JSON-like `parts`: 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def read_entry(key: str) -> Any | None:
    """The value of an entry, None if there is none. A damaged entry is removed with a warning."""
    path = kernels_folder() / key
    try:
        digest, _, body = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    if digest.decode(errors="replace") != hashlib.sha256(body).hexdigest():
        log.warning("%s is damaged; it is removed and made again", path)
        path.unlink(missing_ok=True)
        return None
    return json.loads(body)


def write_entry(key: str, value: object) -> None:
    """Write an entry. Not synced: the digest tells what a crash cut off."""
    body = json.dumps(value).encode()
    with whole_file(kernels_folder() / key, shared=True) as part:
        part.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def _key(request: Request) -> str:
    constants = request.kernel.all_constants(request.spec, request.tile, request.sm)
    return entry_key(
        {
            "version": CACHE_VERSION,
            "triton": importlib.metadata.version("triton"),
            "source": source_of(request.kernel.function()),
            "arguments": argument_types(request),
            "constants": {name: repr(value) for name, value in constants.items()},
            "sm": request.sm,
            "options": launch_options(request.tile),
        }
    )


def source_of(function: JITFunction) -> list[str]:
    """Source of a @triton.jit function and, sorted by name, of everything of ours it uses: functions and constants."""
    seen: dict[str, str] = {}
    waiting = [(function.fn.__name__, function)]
    while waiting:
        name, value = waiting.pop()
        if name in seen:
            continue
        if not hasattr(value, "fn"):
            seen[name] = repr(value)
            continue
        seen[name] = inspect.getsource(value.fn)
        used = (other for other in value.fn.__code__.co_names if other in value.fn.__globals__)
        values = ((other, value.fn.__globals__[other]) for other in used)
        waiting += [(other, one) for other, one in values if not inspect.ismodule(one)]
    return [seen.pop(function.fn.__name__), *(f"{name}: {text}" for name, text in sorted(seen.items()))]


def _cached(request: Request) -> Compiled | None:
    entry = read_entry(_key(request))
    if entry is None:
        return None
    arguments = tuple((name, kind) for name, kind in entry.pop("arguments"))
    return Compiled(**entry | {"arguments": arguments, "cubin": base64.b64decode(entry["cubin"])})


def argument_types(request: Request) -> list[tuple[str, str]]:
    return [(one.name, one.type_for(request.spec)) for one in request.kernel.arguments_of(request.spec)]


# --- the compiler --------------------------------------------------------------------------------------------------


def _is_interpreted(request: Request) -> bool:
    from triton.runtime.jit import JITFunction

    return not isinstance(request.kernel.function(), JITFunction)


def _compile(request: Request) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, types = request.kernel.function(), dict(argument_types(request))
    constants = request.kernel.all_constants(request.spec, request.tile, request.sm)
    source = ASTSource(
        fn=function,
        signature={name: types.get(name, "constexpr") for name in function.arg_names},
        constexprs=constants,
        attrs=_alignment(request, function.arg_names),
    )
    with triton.knobs.compilation.scope():
        # Line numbers, and the PTX that they refer to, would be three quarters of the machine code's bytes.
        triton.knobs.compilation.disable_line_info = True
        built = triton.compile(source, target=GPUTarget("cuda", request.sm, WARP), options=launch_options(request.tile))
    compiled = _described(built, request)
    stored = {one.name: getattr(compiled, one.name) for one in fields(compiled)}
    write_entry(_key(request), stored | {"cubin": base64.b64encode(compiled.cubin).decode()})
    return compiled


def _alignment(request: Request, names: list[str]) -> dict[tuple[int], list[list[object]]]:
    """Every pointer is a multiple of 16 bytes, as torch and TensorRT allocate."""
    pointers = [one.name for one in request.kernel.arguments_of(request.spec) if one.is_pointer]
    return {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}


def _described(built: CompiledKernel, request: Request) -> Compiled:
    ptx, cubin, name = built.asm["ptx"], built.asm["cubin"], built.metadata.name
    registers, local_bytes = resources(cubin, name)
    arguments = tuple(argument_types(request))
    return Compiled(
        name=name,
        target=_first_match(r"\.target (\w+)", ptx),
        num_warps=built.metadata.num_warps,
        arguments=arguments,
        unused_parameters=_first_match(r"\.entry \w+\((.*?)\)", ptx).count(".param") - len(arguments),
        registers=registers,
        local_bytes=local_bytes,
        shared_bytes=built.metadata.shared,
        ptx=ptx,
        cubin=cubin,
    )


def _first_match(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.DOTALL)
    assert match, f"triton's PTX has no {pattern}"
    return match[1]


def _compile_in_another_process(requests: Sequence[Request]) -> None:
    """Fill the cache from a process without the interpreter; the cache is how the results come back."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", __name__]
    work = pickle.dumps(list(requests))
    done = subprocess.run(
        command, input=work, env=environment, capture_output=True, check=False, timeout=COMPILE_TIMEOUT_S
    )
    if done.returncode:
        raise RuntimeError(f"compiling kernels in another process failed:\n{done.stderr.decode()}")


# --- the machine code --------------------------------------------------------------------------------------------


def tool(name: str) -> Path:
    """Path of cuobjdump, nvdisasm or ptxas in triton's package. Raises EnvironmentLacksError without triton."""
    try:
        import triton
    except ImportError as error:
        raise EnvironmentLacksError("triton is not installed; run: pip install 'ditc[cuda]'") from error
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def resources(cubin: bytes, name: str) -> tuple[int, int]:
    """(registers, bytes of local memory: stack and spills) of a thread of the entry `name`."""
    rows = {entry: numbers for entry, *numbers in _RESOURCES.findall(cuobjdump(cubin, "--dump-resource-usage"))}
    registers, stack, local = map(int, rows[name])
    return registers, stack + local


def cuobjdump(cubin: bytes, option: str) -> str:
    """What NVIDIA's tool prints of machine code: "-sass" its instructions, "--dump-resource-usage" what it needs."""
    path = tool("cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(path), option, file.name]
        try:
            done = subprocess.run(
                command, capture_output=True, encoding="utf-8", errors="replace", check=False, timeout=TOOL_TIMEOUT_S
            )
        except OSError as error:
            raise EnvironmentLacksError(f"{path} does not run ({error}); reinstall triton") from error
    if done.returncode:
        raise RuntimeError(f"cuobjdump {option} failed: {done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    compile_kernels(pickle.load(sys.stdin.buffer))
