"""What is not quantized, in FP16: attention and large linears of a graph for TensorRT.

A runtime without FP16 kernels removes a cast to FP16 that a cast back follows, and would prove numbers that the engine
does not compute. So float32 arithmetic rounds to FP16's 11 bits in front of each cast, and behind each cast back.
Numbers below FP16's normal range (6e-5) keep 11 bits in such a run and fewer in the engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from export.dialect.graph import GraphBuilder, attribute, inputs_of, is_op, produced_by, result_of
from pipeline.backends.base import LARGE_ELEMENTS, LOWEST_MASK
from pipeline.passes.fuse_attention import AttentionNodes, attention_around

logger = logging.getLogger(__name__)
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
    result, readers = result_of(node), result_of(node).uses()
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


def halve(model: ir.Model) -> None:
    """Convert attentions and large unquantized linears of `model` in place."""
    attentions, linears = halve_attention(model), halve_large_linears(model)
    logger.info("in FP16: %d attentions, unquantized linears %s", attentions, ", ".join(linears) or "none")


# --- attention: softmax(q k' + mask) v on FP16 operands --------------------------------------------------------------
# Only then does the builder fuse an attention into one kernel. q, k, v and the result are rounded once. (The kernel
# also rounds the softmax to FP16, which a CPU run does not show; sums and the softmax itself are float32.)


def halve_attention(model: ir.Model) -> int:
    """Convert every attention of `model` in place and return how many there are."""
    halves: dict[ir.Value, ir.Value] = {}
    around = [attention_around(node) for node in model.graph if is_op(node, "Softmax")]
    attentions = [nodes for nodes in around if isinstance(nodes, AttentionNodes)]
    inner = [nodes for nodes in attentions if not result_of(nodes.mixed).is_graph_output()]
    for nodes in inner:
        _halve_one(model.graph, nodes, halves)
    return len(inner)


def _halve_one(graph: ir.Graph, nodes: AttentionNodes, halves: dict[ir.Value, ir.Value]) -> None:
    """halves: masks that were converted already."""
    scores, masked, mixed = nodes.scores, nodes.masked, nodes.mixed
    build = GraphBuilder(graph, scores, f"{scores.name}/half")
    for index, port in enumerate(("A", "B")):
        inputs_of(scores).set(port, emit_half(build, getattr(inputs_of(scores), port), f"operand{index}"))
    if masked is not None and nodes.mask is not None:
        mask, port = nodes.mask, "B" if inputs_of(masked).A is result_of(scores) else "A"
        if mask not in halves:
            halves[mask] = _half_mask(GraphBuilder(graph, masked, f"{masked.name}/half"), mask)
        inputs_of(masked).set(port, halves[mask])
    build = GraphBuilder(graph, mixed, f"{mixed.name}/half")
    inputs_of(mixed).set("B", emit_half(build, inputs_of(mixed).B, "value"))
    widen(graph, mixed)
    for node in (scores, masked, nodes.softmax):
        if node is not None:
            result_of(node).type = ir.TensorType(FP16)


def _half_mask(build: GraphBuilder, mask: ir.Value) -> ir.Value:
    bounded = build.op("Max", mask, build.constant(LOWEST_MASK, np.float32), name="bounded")
    return build.op("Cast", bounded, name="mask", to=FP16.value)


# --- large linears, so that the engine keeps their weights in 16 bits ------------------------------------------------
# The portable model stores them as FP16 with a cast, and the builder would expand that into float32 constants: twice
# the memory, and for models with an adaLN projection in each block most of the engine. Input and product are rounded
# once, the bias is added in float32.


def halve_large_linears(model: ir.Model) -> list[str]:
    """Convert in place; names of the converted nodes. A weight that is stored as float32 did not fit FP16 and stays."""
    linears = [node for node in model.graph if (is_op(node, "Gemm") or is_op(node, "MatMul")) and _is_plain(node)]
    large = [(node, half) for node in linears if (half := _half_weight(model.graph, node)) is not None]
    for node, half in large:
        _halve_linear(model.graph, node, half)
    return [str(node.name) for node, _ in large]


def _is_plain(node: ir.Node) -> bool:
    """True unless a Gemm scales its product or its bias."""
    factors = [node.attributes[name].as_float() for name in ("alpha", "beta") if name in node.attributes]
    return all(factor == 1 for factor in factors) and not result_of(node).is_graph_output()


def _half_weight(graph: ir.Graph, node: ir.Node) -> ir.Value | None:
    """The large FP16 initializer behind the node's weight, transposed again where the graph transposes it; or None."""
    weight = inputs_of(node).B
    transpose = produced_by(weight, "Transpose")
    cast = produced_by(inputs_of(transpose).data if transpose else weight, "Cast")
    stored = inputs_of(cast).input if cast else None
    if stored is None or stored.const_value is None or stored.dtype != FP16:
        return None
    if stored.const_value.size < LARGE_ELEMENTS:
        return None
    if transpose is None:
        return stored
    build = GraphBuilder(graph, node, f"{node.name}/half")
    return build.op("Transpose", stored, name="transposed", perm=list(attribute(transpose, "perm")))


def _halve_linear(graph: ir.Graph, node: ir.Node, weight: ir.Value) -> None:
    build = GraphBuilder(graph, node, f"{node.name}/half")
    ports = inputs_of(node)
    bias = ports.get("C") if node.op_type == "Gemm" else None
    ports.set("A", emit_half(build, ports.A, "operand"))
    ports.set("B", weight)
    if bias is None:
        widen(graph, node)
        return
    node.resize_inputs(2)
    widen(graph, node, lambda after, wide: after.op("Add", wide, bias, name="bias"))
