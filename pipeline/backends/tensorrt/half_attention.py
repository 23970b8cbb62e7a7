"""Half-precision attention for the `rtx` target: softmax(q k' + mask) v on FP16 operands.

Only then does the builder fuse an attention into one kernel. q, k, v and the result are rounded once. (The kernel also
rounds the softmax to FP16, which a CPU run does not show; sums and the softmax itself are float32.)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export.dialect.graph import GraphBuilder, inputs_of, is_op, result_of
from pipeline.backends.fused.attention import AttentionNodes, attention_around
from pipeline.backends.tensorrt.half import FP16, emit_half, widen

# Masks add numbers like -10000 or -inf; below this FP16 would make -inf of it, and a row of -inf becomes NaN.
LOWEST_MASK = -30000.0


def halve_attention(model: ir.Model) -> int:
    """Convert every attention of `model` in place and return how many there are."""
    halves: dict[ir.Value, ir.Value] = {}
    around = [attention_around(node) for node in model.graph if is_op(node, "Softmax")]
    attentions = [nodes for nodes in around if isinstance(nodes, AttentionNodes)]
    inner = [nodes for nodes in attentions if not result_of(nodes.mixed).is_graph_output()]
    for nodes in inner:
        _halve(model.graph, nodes, halves)
    return len(inner)


def _halve(graph: ir.Graph, nodes: AttentionNodes, halves: dict[ir.Value, ir.Value]) -> None:
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
