"""Reads a TensorRT-RTX engine file without a GPU: its header, and the compiler's plan that it carries as text.

Neither is documented; both were found in files of release 1.7. A file that does not look as expected is refused.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from export.errors import ContractError

MAGIC = b"vtrt"
HEADER_SIZE = 64
SIZE_AT, VERSION_AT, CAPABILITIES_AT = 16, 24, 32
# Bit of each compute capability in the header's mask.
SM_BITS = {75: 1, 80: 2, 86: 4, 89: 8, 120: 16, 121: 32}
PLAN_START, STEPS_START, STEPS_END = b"header {\n", "\nmain {", "\nshape_main {"

TENSOR = re.compile(r"^\s+(?:sub_)?tensor=\{(.*)\}\s*$", re.MULTILINE)
TENSOR_FIELDS = re.compile(r'dims=\{[^}]*\}.* name="([^"]+)".* type=(\w+)')
PAYLOAD = re.compile(r"const_payload_size=(\d+)")
STEP = re.compile(r'^  (\w+)=\{ name="?([^ "]+)"?(.*)$', re.MULTILINE)
STEP_INPUTS = re.compile(r"\binput(?:_args)?=\{([^}]*)\}")
QUOTED = re.compile(r'"([^"]*)"')
ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
BOUNDS = re.compile(r"shape input value at index (\d+) is out of bounds \[(\d+), (\d+)\]")
# Kind of a plugin's step.
PLUGIN_STEP = "custom_layer"
# Steps that run no kernel.
BOOKKEEPING = frozenset({"shape_call", "signal", "wait"})


@dataclass(frozen=True)
class Tensor:
    """A tensor of the plan: element type as the compiler writes it, bytes if it is a constant."""

    type: str
    constant_bytes: int


@dataclass(frozen=True)
class Step:
    """One kernel launch: what kind, its name, types of its inputs in order, the ONNX nodes it computes, and the names
    of its inputs among the plan's tensors."""

    kind: str
    name: str
    input_types: tuple[str, ...]
    layers: tuple[str, ...]
    inputs: tuple[str, ...] = ()

    @property
    def is_gemm(self) -> bool:
        return self.kind == "fully_connected" or "Fc" in self.name

    @property
    def operand_types(self) -> tuple[str, ...]:
        """Types of a GEMM's two operands. A fused GEMM lists its inputs in any order, float32 scales among them."""
        if self.kind == "fully_connected":
            return self.input_types[:2]
        narrow = tuple(kind for kind in self.input_types if kind not in ("float", "int64"))
        return narrow[:2] or ("float", "float")


@dataclass(frozen=True)
class EngineFile:
    """What a file says of itself. `sms`: compute capabilities it holds code for; `version` as in 1.7.1.116."""

    path: Path
    size_bytes: int
    version: str
    sms: tuple[int, ...]
    tensors: Mapping[str, Tensor]
    steps: tuple[Step, ...]
    bounds: tuple[tuple[int, int], ...]

    @cached_property
    def constant_bytes(self) -> dict[str, int]:
        """Bytes of constants by element type."""
        total: Counter[str] = Counter()
        for tensor in self.tensors.values():
            total[tensor.type] += tensor.constant_bytes
        return {kind: count for kind, count in sorted(total.items()) if count}

    @cached_property
    def gemm_types(self) -> dict[str, int]:
        """How many GEMMs there are by the types of their operands, for example {"fp8_e4m3 x fp8_e4m3": 280}."""
        return dict(Counter(" x ".join(step.operand_types) for step in self.steps if step.is_gemm))

    def step_of(self, layer: str) -> Step | None:
        """The step that computes the ONNX node `layer`, preferring a GEMM."""
        steps = [step for step in self.steps if layer in step.layers]
        return next((step for step in steps if step.is_gemm), steps[0] if steps else None)


def read_engine_file(path: Path) -> EngineFile:
    """Header and plan of `path`. Raises ContractError for a truncated or foreign file."""
    version, sms = read_header(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        plans = list(_plans(data))
    if not plans:
        raise ContractError(f"{path}: the engine carries no readable plan; it was built without detailed profiling")
    tensors = {name: tensor for plan in plans for name, tensor in _tensors(plan)}
    steps = tuple(step for plan in plans for step in _steps(plan, tensors))
    return EngineFile(path, path.stat().st_size, version, sms, tensors, steps, _bounds(plans))


def read_header(path: Path) -> tuple[str, tuple[int, ...]]:
    """Release that built the file and compute capabilities it is for. Raises ContractError as `read_engine_file`."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(HEADER_SIZE)
    if size < HEADER_SIZE:
        raise ContractError(f"{path}: {size} bytes are no TensorRT-RTX engine; build it again")
    if header[:4] != MAGIC:
        raise ContractError(f"{path}: starts with {header[:4]!r}, not {MAGIC!r}: not a TensorRT-RTX engine")
    (claimed,) = struct.unpack_from("<Q", header, SIZE_AT)
    if claimed != size:
        raise ContractError(f"{path}: {size} bytes, its header says {claimed}; the file is damaged, copy it again")
    version = ".".join(str(part) for part in header[VERSION_AT : VERSION_AT + 4])
    (mask,) = struct.unpack_from("<Q", header, CAPABILITIES_AT)
    return version, tuple(sm for sm, bit in SM_BITS.items() if mask & bit)


def _plans(data: mmap.mmap) -> Iterator[str]:
    """Text of every plan in the file, from its header to the end of its shape program."""
    start = data.find(PLAN_START)
    while start >= 0:
        shapes = data.find(STEPS_END.encode(), start)
        end = data.find(b"\n}", shapes) if shapes >= 0 else -1
        if end < 0:
            return
        yield data[start:end].decode("latin1")
        start = data.find(PLAN_START, end)


def _tensors(plan: str) -> Iterator[tuple[str, Tensor]]:
    for line in TENSOR.findall(plan):
        fields = TENSOR_FIELDS.search(line)
        if fields:
            payload = PAYLOAD.search(line)
            name, kind = fields.groups()
            yield name, Tensor(kind, int(payload.group(1)) if payload else 0)


def _steps(plan: str, tensors: Mapping[str, Tensor]) -> Iterator[Step]:
    body = plan[plan.find(STEPS_START) : plan.find(STEPS_END)]
    for kind, step, rest in STEP.findall(body):
        if kind not in BOOKKEEPING:
            arguments = STEP_INPUTS.search(rest)
            names = QUOTED.findall(arguments.group(1)) if arguments else []
            inputs = tuple(name for name in names if name in tensors)
            types = tuple(tensors[name].type for name in inputs)
            yield Step(kind, step, types, tuple(ONNX_LAYER.findall(rest)), inputs)


def _bounds(plans: list[str]) -> tuple[tuple[int, int], ...]:
    """Limits of the dynamic dimensions, in the order in which the engine checks them."""
    limits = [(int(low), int(high)) for plan in plans for _, low, high in BOUNDS.findall(plan)]
    return tuple(dict.fromkeys(limits))


def check_plugins(engine: EngineFile, expected: Mapping[str, int]) -> None:
    """Raise ContractError if a node of `expected` is not a plugin, or none of its inputs is a constant of int8 with so
    many bytes (0: it has no weight)."""
    for node, weight_bytes in expected.items():
        step = engine.step_of(node)
        if step is None or step.kind != PLUGIN_STEP:
            actual = f"runs it as {step.kind} {step.name}" if step else "has no kernel for it"
            raise ContractError(f"{node}: the engine {engine.path.name} {actual}; expected a plugin")
        constants = [engine.tensors[name] for name in step.inputs if engine.tensors[name].constant_bytes]
        if weight_bytes and not any(c.type == "int8" and c.constant_bytes == weight_bytes for c in constants):
            held = ", ".join(f"{c.type} of {c.constant_bytes} bytes" for c in constants) or "none"
            raise ContractError(f"{node}: packed weights are int8 of {weight_bytes} bytes, its constants are {held}")


def check_gemms(engine: EngineFile, expected: Mapping[str, str]) -> None:
    """Raise ContractError if a MatMul node of `expected` (name -> operand type) is not a GEMM of two such operands."""
    for node, kind in expected.items():
        step = engine.step_of(node)
        if step is None:
            raise ContractError(f"{node}: the engine {engine.path.name} has no kernel for it; it was optimized away")
        if not step.is_gemm or step.input_types.count(kind) < 2:
            actual = f"{step.kind} {step.name} of {' x '.join(step.operand_types)}"
            raise ContractError(f"{node}: the engine runs it as {actual}, not as a {kind} x {kind} GEMM")
