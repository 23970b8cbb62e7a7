"""Where the time of one denoiser call of the `cpu` engine goes, and the least it could take on this machine."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from statistics import median
from typing import TypedDict

from pipeline import machine
from pipeline.backends.base import Arrays
from pipeline.backends.cpu.engine import open_sessions
from pipeline.backends.sessions import SessionEngine
from pipeline.backends.sizes import evaluated
from plugins.cpu import limits
from plugins.cpu.attention_operands import OCTET, head_bytes

GEMM, ATTENTION, BETWEEN, REST = "GEMMs of bytes", "attention", "between GEMMs", "the rest"
BYTE_ATTENTION = "attention of bytes"
# Op of the lowered graph -> what its time is counted as. HalfGemm, of the linears that stay float, is of the rest.
PARTS = {
    **dict.fromkeys(("PackedGemm", "MatMulInteger", "MatMulIntegerToFloat"), GEMM),
    **dict.fromkeys(("Attention", "Softmax", "MatMul", "FusedMatMul"), ATTENTION),
    # Stock engines have the function body: float products, and the rest.
    **dict.fromkeys(("QuantizedAttention", "AttentionOperands"), BYTE_ATTENTION),
    **dict.fromkeys(("TokenChain", "QuantizeLinear", "DequantizeLinear", "LayerNormalization", "Gelu"), BETWEEN),
}
BYTES = ("uint8", "int8")  # as the profiler calls the elements of codes and weights
CALLS = 5
SUFFIX = "_kernel_time"


class PartRow(TypedDict):
    """One part of a call. products: multiplications and additions of one call, 0 where they are not counted;
    weight_bytes: what its GEMMs read of weights, each once."""

    part: str
    ms: float
    products: float
    weight_bytes: int


class Profile(TypedDict):
    """Document of `bench --profile`. floor_ms: products and the weights' bytes over the machine's rates, with nothing
    else to do; None where a rate is not known. rates: products and bytes per second."""

    threads: int
    call_ms: float
    floor_ms: float | None
    variant: str
    byte_products_per_s: float
    float_products_per_s: float
    memory_bytes_per_s: float
    parts: list[PartRow]
    machine: machine.Facts


@dataclass(frozen=True)
class Event:
    """One run of one node. products: of a GEMM or an attention, 0 for others; weight_bytes: of a GEMM."""

    op_type: str
    ms: float
    products: float
    weight_bytes: int


def profile(folder: Path, inputs: Arrays, threads: int) -> Profile:
    """Run the engine in `folder` (cpu/ of a bundle) on `inputs` with onnxruntime's profiler; medians of CALLS calls.

    The condition is kept, as in all steps of a picture but the first. Raises EnvironmentLacksError where there is no
    kernel library, by which the machine's rates are measured.
    """
    rates = limits.measure(threads)
    with tempfile.TemporaryDirectory(prefix="ditc-") as scratch:
        sessions = open_sessions(folder, threads, profile=Path(scratch) / "profile")
        engine = SessionEngine(sessions)
        quantizing_ms = []
        for _ in range(CALLS + 1):  # the first warms up
            before = limits.quantizing_s()
            engine.run(inputs)
            quantizing_ms.append(1e3 * (limits.quantizing_s() - before) / threads)
        engine.close()
        calls = _calls(Path(sessions.step.end_profiling()))[1:]
    parts = [_part(part, calls) for part in (GEMM, BYTE_ATTENTION, ATTENTION, BETWEEN, REST)]
    _move_quantizers(parts, median(quantizing_ms[1:]))
    floor = floor_s(calls[0], rates)
    return {
        "threads": threads,
        "call_ms": sum(row["ms"] for row in parts),
        "floor_ms": None if floor is None else 1e3 * floor,
        "variant": rates.variant,
        "byte_products_per_s": rates.byte_products_per_s,
        "float_products_per_s": rates.float_products_per_s,
        "memory_bytes_per_s": rates.memory_bytes_per_s,
        "parts": parts,
        "machine": machine.facts(),
    }


def floor_s(call: Sequence[Event], rates: limits.Limits) -> float | None:
    """Seconds below which a call cannot come, None where a rate is not known: products at the machine's rates, one GEMM
    or attention after the other; a GEMM takes at least as long as its weight is read from memory.

    Weights that are together no more than what the memory's rate was measured with may stay in a cache from call to
    call: they are not counted.
    """
    if not all((rates.byte_products_per_s, rates.float_products_per_s, rates.memory_bytes_per_s)):
        return None
    streamed = sum(event.weight_bytes for event in call) > limits.STREAM_BYTES
    total = 0.0
    for event in call:
        rate = rates.float_products_per_s if PARTS.get(event.op_type) == ATTENTION else rates.byte_products_per_s
        total += max(event.products / rate, streamed * event.weight_bytes / rates.memory_bytes_per_s)
    return total


def _calls(path: Path) -> list[list[Event]]:
    """Events of each call in a file of onnxruntime's profiler: nodes run in one order, so a call ends where the first
    node comes again."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    nodes = [row for row in rows if row.get("cat") == "Node" and row["name"].endswith(SUFFIX)]
    calls: list[list[Event]] = []
    for row in nodes:
        if row["name"] == nodes[0]["name"]:
            calls.append([])
        calls[-1].append(_event(row["args"], row["dur"] / 1e3))
    return calls


class Arguments(TypedDict):
    """What the profiler says of a node: shapes as lists of {element type: sizes}."""

    op_name: str
    input_type_shape: list[dict[str, list[int]]]
    output_type_shape: list[dict[str, list[int]]]


def _event(node: Arguments, ms: float) -> Event:
    inputs, outputs = (_tensors(node[key]) for key in ("input_type_shape", "output_type_shape"))
    shapes = [sizes for _, sizes in inputs]
    products = _products(node["op_name"], shapes, outputs[0][1] if outputs else [])
    return Event(node["op_name"], ms, products, _weight_bytes(node["op_name"], inputs))


def _tensors(rows: Sequence[dict[str, list[int]]]) -> list[tuple[str, list[int]]]:
    return [tensor for row in rows for tensor in row.items()]


def _limbs(op_type: str, inputs: list[list[int]]) -> int:
    return 2 if op_type == "PackedGemm" and inputs[1] == inputs[0] else 1


def _products(op_type: str, inputs: list[list[int]], output: list[int]) -> float:
    """Products of a matrix product [..., K] x [K, N], of two limbs twice; of an attention for scores and values."""
    if op_type == "Attention":
        return 2.0 * math.prod(inputs[0]) * inputs[1][2]
    if op_type == "QuantizedAttention":
        return 2.0 * math.prod(inputs[0]) * _keys(inputs[1][2], inputs[0][3])
    if PARTS.get(op_type) not in (GEMM, ATTENTION) or op_type == "Softmax":
        return 0.0
    return float(_limbs(op_type, inputs) * math.prod(output) * inputs[0][-1])


@cache
def _keys(head: int, size: int) -> int:
    """How many keys of `size` channels have operands of so many bytes for a head: whole octets, of 257 keys 264."""
    return next(keys for keys in count(OCTET, OCTET) if _head_bytes(keys, size) >= head)


def _head_bytes(keys: int, size: int) -> int:
    needed = evaluated(head_bytes("keys", size), {"keys": keys})
    assert needed is not None
    return needed


def _weight_bytes(op_type: str, inputs: list[tuple[str, list[int]]]) -> int:
    """Of a GEMM's weight, which comes after the codes: bytes, packed or not, with their multipliers.

    onnxruntime says nothing of a weight that it has packed anew for itself."""
    if PARTS.get(op_type) != GEMM:
        return 0
    behind = inputs[_limbs(op_type, [sizes for _, sizes in inputs]) :]
    return sum(math.prod(sizes) for kind, sizes in behind if kind in BYTES and len(sizes) > 1)


def _part(part: str, calls: Sequence[Sequence[Event]]) -> PartRow:
    chosen = [[event for event in call if PARTS.get(event.op_type, REST) == part] for call in calls]
    return {
        "part": part,
        "ms": median(sum(event.ms for event in call) for call in chosen),
        "products": sum(event.products for event in chosen[0]),
        "weight_bytes": sum(event.weight_bytes for event in chosen[0]),
    }


def _move_quantizers(parts: Sequence[PartRow], ms: float) -> None:
    """Count what PackedGemm quantizes of its own rows as what it is: between GEMMs."""
    for row in parts:
        row["ms"] += {GEMM: -ms, BETWEEN: ms}.get(row["part"], 0.0)


# --- for people -----------------------------------------------------------------------------------------------------


def summary(document: Profile) -> tuple[list[str], list[list[str]]]:
    """The document as a table: its header and a row for each part."""
    of_bytes = dict.fromkeys((GEMM, BYTE_ATTENTION), document["byte_products_per_s"])
    rates = {**of_bytes, ATTENTION: document["float_products_per_s"]}
    header = ["part", "ms", "share", "10^9 products/s", "of the machine's"]
    return header, [_cells(row, document["call_ms"], rates.get(row["part"], 0.0)) for row in document["parts"]]


def _cells(row: PartRow, total_ms: float, rate: float) -> list[str]:
    done = row["products"] / row["ms"] * 1e3 if row["ms"] and row["products"] else 0.0
    share = f"{done / rate:.0%}" if done and rate else "-"
    return [row["part"], f"{row['ms']:.1f}", f"{row['ms'] / total_ms:.0%}", f"{done / 1e9:.0f}" if done else "-", share]


def conditions(document: Profile) -> str:
    """What bounds a call, in a few words."""
    floor = document["floor_ms"]
    bound = (
        "this processor's rates are not known"
        if floor is None
        else f"{document['byte_products_per_s'] / 1e9:.0f} 10^9 products/s of bytes ({document['variant']}), "
        f"{document['float_products_per_s'] / 1e9:.0f} of float32 and {document['memory_bytes_per_s'] / 1e9:.1f} GB/s "
        f"from memory make the GEMMs and the attention at least {floor:.1f} ms: the call takes "
        f"{document['call_ms'] / floor:.2f} times that"
    )
    return (
        f"{document['call_ms']:.1f} ms a call, {document['threads']} threads on {document['machine']['cpu']}; {bound}."
    )
