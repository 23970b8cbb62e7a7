"""The attention in a graph, softmax(q k' + mask) v, and one op for it, of the target's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from export.dialect.graph import (
    GraphBuilder,
    attribute,
    constant,
    drop_unused,
    inputs_of,
    is_op,
    only_reader,
    other_input,
    produced_by,
    read_by,
    replace,
    result_of,
)
from pipeline.passes.rewrite import RewritePass


@dataclass(frozen=True)
class AttentionNodes:
    """scores: MatMul of q and k'. masked: Add of the mask, None without one. mixed: MatMul with v."""

    scores: ir.Node
    masked: ir.Node | None
    softmax: ir.Node
    mixed: ir.Node

    @property
    def mask(self) -> ir.Value | None:
        return None if self.masked is None else other_input(self.masked, result_of(self.scores))


def attention_around(softmax: ir.Node) -> AttentionNodes | str:
    """The attention that a Softmax belongs to, or why it is none. Nothing else may read what lies inside."""
    logits = inputs_of(softmax).input
    rank = logits.shape.rank() if logits.shape else 4
    if attribute(softmax, "axis", -1) not in (-1, rank - 1):
        return f"its axis {attribute(softmax, 'axis')} is not the last one"
    mixed = read_by(result_of(softmax), "MatMul")
    if mixed is None or inputs_of(mixed).A is not result_of(softmax):
        return "no MatMul with values reads it alone"
    masked, scores = produced_by(logits, "Add"), produced_by(logits, "MatMul")
    if masked is not None:
        if only_reader(result_of(masked)) is not softmax:
            return "its masked scores have another reader"
        scores = next((node for value in masked.inputs if (node := produced_by(value, "MatMul"))), None)
    if scores is None:
        return "its scores are no MatMul"
    if only_reader(result_of(scores)) is None:
        return "its scores have another reader"
    return AttentionNodes(scores, masked, softmax, mixed)


# (inputs q, k, v and, where there is one, mask, by these names; name; the node that it stands for; scale) -> a node.
MakeAttention = Callable[[Mapping[str, ir.Value], str, ir.Node, float], ir.Node]
# (q, k', v, mask) -> why the target's op does not take them, None if it does.
Misfit = Callable[[ir.Value, ir.Value, ir.Value, ir.Value | None], str | None]


class FuseAttention(RewritePass):
    """An attention -> the node that `make` makes of it; constant factors of q and k' become its scale."""

    def __init__(self, make: MakeAttention, misfit: Misfit | None = None) -> None:
        super().__init__()
        self.make, self.misfit = make, misfit

    def rewrite(self, model: ir.Model) -> None:
        for node in list(model.graph):
            if is_op(node, "Softmax"):
                self._try(model.graph, node)
        if self.fired:
            drop_unused(model)

    def _try(self, graph: ir.Graph, softmax: ir.Node) -> None:
        nodes = attention_around(softmax)
        if isinstance(nodes, str):
            self.refuse(softmax.name, nodes)
            return
        (q, factor), (keys, other) = _unscaled(inputs_of(nodes.scores).A), _unscaled(inputs_of(nodes.scores).B)
        v, prefix = inputs_of(nodes.mixed).B, f"{softmax.name}/attention"
        if any(value.shape is None or value.shape.rank() != 4 for value in (q, keys, v)):
            self.refuse(softmax.name, "its operands are not [batch, heads, tokens, channels]")
            return
        if self.misfit and (why := self.misfit(q, keys, v, nodes.mask)):
            self.refuse(softmax.name, why)
            return
        inputs = {"q": q, "k": _turned(GraphBuilder(graph, nodes.mixed, prefix), keys), "v": v}
        if nodes.mask is not None:
            inputs["mask"] = nodes.mask
        replace(graph, nodes.mixed, self.make(inputs, prefix, nodes.mixed, factor * other))
        self.fired += 1


def _unscaled(value: ir.Value) -> tuple[ir.Value, float]:
    """(x, number) of x * number, (value, 1) for anything else."""
    product = produced_by(value, "Mul")
    for factor in product.inputs if product else ():
        array = constant(factor)
        if product and factor is not None and array is not None and array.size == 1 and array.ndim <= 4:
            return other_input(product, factor), float(array.reshape(-1)[0])
    return value, 1.0


def _turned(build: GraphBuilder, keys: ir.Value) -> ir.Value:
    """Keys [B, H, T, D] for `keys` [B, H, D, T]; two transpositions become one."""
    before, perm = produced_by(keys, "Transpose"), [0, 1, 3, 2]
    if before is not None:
        first = list(attribute(before, "perm", (3, 2, 1, 0)))
        perm, keys = [first[axis] for axis in perm], inputs_of(before).data
    if perm == [0, 1, 2, 3]:
        return keys
    turned = build.op("Transpose", keys, name="k", perm=perm)
    turned.shape = None if keys.shape is None else ir.Shape([keys.shape[axis] for axis in perm])
    return turned
