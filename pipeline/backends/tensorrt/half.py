"""FP16 casts of the `rtx` lowering whose rounding every runtime shows.

A runtime without FP16 kernels removes a cast to FP16 that a cast back follows, and would prove numbers that the engine
does not compute. So float32 arithmetic rounds to FP16's 11 bits in front of each cast, and behind each cast back.
Numbers below FP16's normal range (6e-5) keep 11 bits in such a run and fewer in the engine.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from export.dialect.graph import GraphBuilder, result_of

FP16, FP32 = ir.DataType.FLOAT16, ir.DataType.FLOAT
# Veltkamp's splitting: with c = x * (2^13 + 1), c - (c - x) is x rounded to 24 - 13 = 11 bits, to nearest.
SPLITTER = 2.0**13 + 1


def emit_rounded(build: GraphBuilder, value: ir.Value, name: str) -> ir.Value:
    """float32 value rounded to FP16's precision."""
    large = build.op("Mul", value, build.constant(SPLITTER), name=f"{name}_large")
    rest = build.op("Sub", large, value, name=f"{name}_rest")
    return build.op("Sub", large, rest, name=f"{name}_rounded")


def emit_half(build: GraphBuilder, value: ir.Value, name: str) -> ir.Value:
    """float32 value as FP16."""
    return build.op("Cast", emit_rounded(build, value, name), name=name, to=FP16.value)


def widen(graph: ir.Graph, node: ir.Node, then: Callable[[GraphBuilder, ir.Value], ir.Value] | None = None) -> None:
    """Let all readers of the FP16 output of `node` read it as rounded float32, passed through `then`."""
    result, readers = result_of(node), list(result_of(node).uses())
    build = GraphBuilder(graph, _next(graph, node), f"{node.name}/half")
    result.type = ir.TensorType(FP16)
    wide = emit_rounded(build, build.op("Cast", result, name="wide", to=FP32.value), "wide")
    wide = then(build, wide) if then else wide
    for use in readers:
        use.node.replace_input_with(use.idx, wide)


def _next(graph: ir.Graph, node: ir.Node) -> ir.Node:
    """The node that follows `node`, which is not the last one: something reads it."""
    nodes = iter(graph)
    while next(nodes) is not node:
        continue
    return next(nodes)
