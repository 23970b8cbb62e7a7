"""The transpositions around attention -> rows that a TokenChain reads or writes in one part for each head."""

from __future__ import annotations

import onnx_ir as ir

from pipeline.backends.cpu.token_chain import (
    In,
    Out,
    channels,
    inputs_of,
    is_chain,
    outputs_of,
    put_chain,
    stages,
    value_in,
)
from pipeline.passes.graph import attribute, drop_unused, only_reader, produced_by
from pipeline.passes.rewrite import RewritePass

HEADS_FIRST, HEADS_LAST, SWAPPED = (0, 2, 1, 3), (0, 2, 3, 1), (0, 1, 3, 2)


class NativeHeads(RewritePass):
    """Transpose(Reshape(linear)) -> heads_out of the chain that makes `linear`; Reshape(Transpose(x)) -> heads_in of
    the chain that reads it. [batch, tokens, heads * size] is then [batch, heads, tokens, size] in memory.

    Keys are transposed once more, which onnxruntime takes into its matrix product.
    """

    def rewrite(self, model: ir.Model) -> None:
        for node in [node for node in model.graph if is_chain(node)]:
            made, read = set(outputs_of(node)), set(inputs_of(node))
            if made - {Out.PRODUCT} == {Out.LINEAR}:
                self._split(model.graph, node)
            elif Out.CODES in made and read == {In.X}:
                self._gather(model.graph, node)
        model.graph.sort()
        drop_unused(model)

    def _split(self, graph: ir.Graph, chain: ir.Node) -> None:
        linear = chain.outputs[Out.LINEAR]
        view = only_reader(linear)
        if view is None or view.op_type != "Reshape" or not (heads := _heads(linear, view.outputs[0])):
            return
        turn = only_reader(view.outputs[0])
        perm = tuple(attribute(turn, "perm", ())) if turn is not None and turn.op_type == "Transpose" else ()
        if turn is None or perm not in (HEADS_FIRST, HEADS_LAST):
            return
        if perm == HEADS_LAST:
            turn = _in_two(graph, turn)
        outputs = outputs_of(chain) | {Out.Y: turn.outputs[0]}
        put_chain(graph, turn, inputs_of(chain), outputs, **stages(chain) | {"heads_out": heads})
        graph.remove(chain, safe=True)
        self.fired += 1

    def _gather(self, graph: ir.Graph, chain: ir.Node) -> None:
        x = value_in(chain, In.X)
        view = produced_by(x, "Reshape")
        turn = produced_by(view.inputs[0], "Transpose") if view else None
        if x is None or turn is None or tuple(attribute(turn, "perm", ())) != HEADS_FIRST:
            return
        source, heads = turn.inputs[0], _heads(x, turn.outputs[0])
        if source is None or not heads or any(only_reader(node.outputs[0]) is None for node in (turn, view) if node):
            return
        outputs = outputs_of(chain) | {Out.QUANTIZED: x}
        put_chain(graph, chain, {In.X: source}, outputs, **stages(chain) | {"heads_in": heads})
        graph.remove(chain, safe=True)
        self.fired += 1


def _heads(rows: ir.Value, parts: ir.Value) -> int:
    """Number of heads if `parts` [batch, tokens, heads, size] are the channels of `rows` [batch, tokens, n], else 0."""
    whole, split = rows.shape, parts.shape
    if whole is None or split is None or whole.rank() != 3 or split.rank() != 4:
        return 0
    heads, size = split[2], split[3]
    if not isinstance(heads, int) or not isinstance(size, int) or heads * size != channels(rows):
        return 0
    return heads if list(whole)[:2] == list(split)[:2] else 0


def _in_two(graph: ir.Graph, turn: ir.Node) -> ir.Node:
    """Transpose to [batch, heads, size, tokens] as two: to [batch, heads, tokens, size], which is returned, and on."""
    first = ir.Node("", "Transpose", turn.inputs, [ir.AttrInt64s("perm", HEADS_FIRST)], name=f"{turn.name}/heads")
    value, old = first.outputs[0], turn.outputs[0]
    value.name, value.type = f"{old.name}/heads", old.type
    if old.shape is not None:
        value.shape = ir.Shape([old.shape[axis] for axis in SWAPPED])
    graph.insert_before(turn, first)
    turn.replace_input_with(0, value)
    turn.attributes["perm"] = ir.AttrInt64s("perm", SWAPPED)
    return first
