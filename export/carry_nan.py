"""NaN past static activation scales: a sample with NaN in its inputs gives NaN, as PyTorch gives it.

A code has no bit pattern for NaN (formats of 8 bits use them all, and integer products know none). A scale of its own
lets a token carry NaN on; a static one cannot, and to look for NaN in every quantizer would read each activation once
more. NaN can only come in through the inputs, which are small, so it is looked for there: x * 0 is 0, or NaN for NaN,
and what each sample adds up to is added to its output. A number plus 0 is that number.

Where a model selects (`Where`, as HunyuanDiT does with tokens that a mask hides), PyTorch forgets NaN in what is not
selected: for inputs that go on through selections alone, NaN is looked for behind them. What becomes a truth value or
an index (HunyuanDiT's masks) goes on nowhere.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export.dialect.graph import GraphBuilder
from export.dialect.ops import DOMAIN

PREFIX = "nan"
FLOAT = ir.DataType.FLOAT


def carry_nan(graph: ir.Graph, names: list[str]) -> None:
    """Make the graph's one output NaN for every sample with NaN in the inputs called `names`, in place.

    The first axis of the output counts samples, and so does that of a tensor where it has the same name; any other
    tensor belongs to all samples.
    """
    output = graph.outputs[0]
    last = output.producer()
    assert last is not None and output.shape is not None
    inputs = [value for value in graph.inputs if value.name in names and value.dtype == FLOAT]
    places = list(dict.fromkeys(place for value in inputs for place in _places(value, output)))
    if not places:
        return
    end = ir.Node("", "Identity", [output])  # what is built stands in front of it
    graph.insert_after(last, end)
    build = GraphBuilder(graph, end, PREFIX)
    flags = [_flag(build, place, _counts_samples(place, output)) for place in places]
    total = flags[0]
    for flag in flags[1:]:
        total = build.op("Add", total, flag, name=f"{flag.name}_too".removeprefix(f"{PREFIX}/"))
    rank = output.shape.rank()
    rows = build.op("Reshape", total, build.stored("row", np.array([-1] + [1] * (rank - 1))), name="rows")
    sample = build.op("Add", output, rows, name="sample")
    sample.shape, graph.outputs[0] = output.shape, sample
    graph.remove(end, safe=True)
    sample.name, output.name = output.name, f"{PREFIX}/without"


def _places(value: ir.Value, output: ir.Value) -> list[ir.Value]:
    """Where to look for NaN of an input: in itself, or, if every way leads through selections, in what they select."""
    selected, ahead, seen = list[ir.Value](), [value], {value}
    while ahead:
        current = ahead.pop()
        if current.is_graph_output() or any(use.node.domain == DOMAIN for use in current.uses()):
            return [value]
        for use in current.uses():
            for tensor in use.node.outputs:
                if tensor in seen or tensor.dtype not in (None, FLOAT):
                    continue
                seen.add(tensor)
                (selected if use.node.op_type == "Where" else ahead).append(tensor)
    return selected if all(_counts_samples(tensor, output) for tensor in selected) else [value]


def _counts_samples(value: ir.Value, output: ir.Value) -> bool:
    """Whether the first axis is that of the samples."""
    return bool(value.shape) and value.shape[0] == output.shape[0]  # type: ignore[index]


def _flag(build: GraphBuilder, place: ir.Value, of_samples: bool) -> ir.Value:
    """0, or NaN where `place` has one: of each sample [batch], or of all together []."""
    name = f"of/{place.name}"  # whatever a model calls its tensors, it meets no other name here
    zeros = build.op("Mul", place, build.stored(f"{name}.zero", np.zeros(1, np.float32)), name=f"{name}_times_0")
    rank = 1 if place.shape is None else place.shape.rank()
    axes = range(1, rank) if of_samples else range(rank)
    if not axes:
        return zeros
    return build.op("ReduceMean", zeros, build.stored(f"{name}.axes", np.array(axes)), name=name, keepdims=0)
