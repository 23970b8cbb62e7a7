"""Half-precision attention for the `rtx` target: softmax(q k' + mask) v on FP16 operands.

Only then does the builder fuse an attention into one kernel. q, k, v and the result are rounded once. (The kernel also
rounds the softmax to FP16, which a CPU run does not show; sums and the softmax itself are float32.)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pipeline.backends.tensorrt.half import FP16, emit_half, widen
from pipeline.passes.emit import Emitter

# Masks add numbers like -10000 or -inf; below this FP16 would make -inf of it, and a row of -inf becomes NaN.
LOWEST_MASK = -30000.0


def halve_attention(model: ir.Model) -> int:
    """Convert every attention of `model` in place and return how many there are."""
    halves: dict[ir.Value, ir.Value] = {}
    return sum(_halve(model.graph, node, halves) for node in list(model.graph) if node.op_type == "Softmax")


def _halve(graph: ir.Graph, softmax: ir.Node, halves: dict[ir.Value, ir.Value]) -> bool:
    found = _around(softmax)
    if found is None:
        return False
    product, masked, mixed = found
    emit = Emitter(graph, product, f"{product.name}/half")
    for index, value in enumerate(product.inputs):
        product.replace_input_with(index, emit_half(emit, value, f"operand{index}"))
    if masked is not None:
        index = 1 if masked.inputs[0] is product.outputs[0] else 0
        mask = masked.inputs[index]
        assert mask is not None
        if mask not in halves:
            halves[mask] = _half_mask(Emitter(graph, masked, f"{masked.name}/half"), mask)
        masked.replace_input_with(index, halves[mask])
    mixed.replace_input_with(1, emit_half(Emitter(graph, mixed, f"{mixed.name}/half"), mixed.inputs[1], "value"))
    widen(graph, mixed)
    for node in (product, masked, softmax):
        if node is not None:
            node.outputs[0].type = ir.TensorType(FP16)
    return True


def _around(softmax: ir.Node) -> tuple[ir.Node, ir.Node | None, ir.Node] | None:
    """(MatMul of scores, Add of the mask or None, MatMul with values) around a Softmax; None if it is not attention."""
    scores, uses = softmax.inputs[0], list(softmax.outputs[0].uses())
    producer = scores.producer() if scores is not None else None
    masked = producer if producer is not None and producer.op_type == "Add" else None
    product = producer if masked is None else _product_of(masked)
    if product is None or product.op_type != "MatMul" or len(uses) != 1 or uses[0].node.op_type != "MatMul":
        return None
    if uses[0].node.outputs[0].is_graph_output():
        return None
    alone = all(len(list(node.outputs[0].uses())) == 1 for node in (product, masked) if node is not None)
    return (product, masked, uses[0].node) if alone and uses[0].idx == 0 else None


def _product_of(masked: ir.Node) -> ir.Node | None:
    producers = [value.producer() for value in masked.inputs if value is not None]
    return next((node for node in producers if node is not None and node.op_type == "MatMul"), None)


def _half_mask(emit: Emitter, mask: ir.Value | None) -> ir.Value:
    bounded = emit.op("Max", mask, emit.constant(LOWEST_MASK, np.float32), name="bounded")
    return emit.op("Cast", bounded, name="mask", to=FP16.value)
