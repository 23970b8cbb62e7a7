"""MatMul, Softmax, MatMul -> one attention, which torch runs as scaled_dot_product_attention."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from pipeline.backends.fused.ops import fused_node
from pipeline.passes.graph import constant, drop_unused, is_op, only_reader, other_input, produced_by
from pipeline.passes.rewrite import RewritePass


@dataclass(frozen=True)
class _Found:
    scores: ir.Node
    mask: ir.Value | None
    mix: ir.Node


class FuseAttention(RewritePass):
    """softmax(q k' + mask) v -> Attention or MaskedAttention; constant factors of q and k' become its scale.

    The scores, masked or not, may have no other reader.
    """

    def rewrite(self, model: ir.Model) -> None:
        for node in list(model.graph):
            if is_op(node, "Softmax"):
                self._try(model.graph, node)
        if self.fired:
            drop_unused(model)

    def _try(self, graph: ir.Graph, softmax: ir.Node) -> None:
        found = _around(softmax)
        if isinstance(found, str):
            self.refuse(softmax.name, found)
            return
        (q, factor), (keys, other) = (_unscaled(value) for value in found.scores.inputs[:2])
        v, prefix = found.mix.inputs[1], f"{softmax.name}/attention"
        if any(value is None or value.shape is None or value.shape.rank() != 4 for value in (q, keys, v)):
            self.refuse(softmax.name, "its operands are not [batch, heads, tokens, channels]")
            return
        k = _turned(graph, found.mix, keys, f"{prefix}/k")
        inputs = [q, k, v] if found.mask is None else [q, k, v, found.mask]
        name = "Attention" if found.mask is None else "MaskedAttention"
        fused = fused_node(name, inputs, prefix, found.mix, scale=factor * other)
        old = found.mix.outputs
        ir.convenience.replace_nodes_and_values(graph, found.mix, [found.mix], [fused], old, fused.outputs)
        self.fired += 1


def _around(softmax: ir.Node) -> _Found | str:
    """The attention that a Softmax belongs to, or why it is none."""
    rank = softmax.inputs[0].shape.rank() if softmax.inputs[0] and softmax.inputs[0].shape else 4
    axis = softmax.attributes.get("axis")
    if axis is not None and axis.as_int() not in (-1, rank - 1):
        return f"its axis {axis.as_int()} is not the last one"
    mix = only_reader(softmax.outputs[0])
    if not is_op(mix, "MatMul") or mix is None or mix.inputs[0] is not softmax.outputs[0]:
        return "no MatMul with values reads it alone"
    mask, scores = None, produced_by(softmax.inputs[0], "MatMul")
    if (masked := produced_by(softmax.inputs[0], "Add")) is not None:
        if only_reader(masked.outputs[0]) is not softmax:
            return "its masked scores have another reader"
        scores = next((node for value in masked.inputs if (node := produced_by(value, "MatMul"))), None)
        mask = other_input(masked, scores.outputs[0]) if scores else None
    if scores is None:
        return "its scores are no MatMul"
    return _Found(scores, mask, mix) if only_reader(scores.outputs[0]) else "its scores have another reader"


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """(x, number) of x * number, (value, 1) for anything else."""
    product = produced_by(value, "Mul")
    for index in (0, 1) if product else ():
        array = constant(product.inputs[index]) if product else None
        if product and array is not None and array.size == 1:
            return product.inputs[1 - index], float(array.reshape(-1)[0])
    return value, 1.0


def _turned(graph: ir.Graph, anchor: ir.Node, keys: ir.Value | None, name: str) -> ir.Value:
    """Keys [B, H, T, D] for `keys` [B, H, D, T]; two transpositions become one."""
    assert keys is not None
    before, perm = produced_by(keys, "Transpose"), [0, 1, 3, 2]
    if before is not None:
        first = list(before.attributes["perm"].as_ints())
        perm, keys = [first[axis] for axis in perm], before.inputs[0]
    if perm == [0, 1, 2, 3]:
        assert keys is not None
        return keys
    node = ir.Node("", "Transpose", [keys], ir.convenience.convert_attributes({"perm": perm}), name=name)
    node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(ir.DataType.FLOAT)
    sizes = keys.shape if keys is not None else None
    node.outputs[0].shape = None if sizes is None else ir.Shape([sizes[axis] for axis in perm])
    graph.insert_before(anchor, node)
    return node.outputs[0]
