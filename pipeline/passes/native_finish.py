"""What follows an integer GEMM, token by token -> one TokenChain."""

from __future__ import annotations

import onnx_ir as ir

from pipeline.passes.emit import MICROSOFT
from pipeline.passes.graph import attribute, drop_unused, is_op, only_reader, other_input
from pipeline.passes.native_ops import In, Out, channels, is_chain, misfit, put_chain, value_out
from pipeline.passes.refusal import RewritePass

FUSED = "MatMulIntegerToFloat"


class NativeFinish(RewritePass):
    """gelu(product * token scale + bias) * gate + residual -> TokenChain, as far as the graph has these in this order.

    The token scale must come from a TokenChain. The linear's own result stays an output, for the parity gates.
    """

    def rewrite(self, model: ir.Model) -> None:
        for node in _products(model.graph):
            scaled = only_reader(node.outputs[0])
            if scaled is None or not is_op(scaled, "Mul") or not _is_scale(other_input(scaled, node.outputs[0])):
                self.refuse(node.name, "its result is not scaled by a token scale alone")
                continue
            self._finish(model.graph, node.outputs[0], scaled)
            self.fired += 1
        model.graph.sort()
        drop_unused(model)

    def _finish(self, graph: ir.Graph, product: ir.Value, scaled: ir.Node) -> None:
        inputs = {In.X: product, In.TOKEN_SCALE: other_input(scaled, product)}
        last = scaled
        reader = only_reader(last.outputs[0])
        bias = other_input(reader, last.outputs[0]) if reader is not None and is_op(reader, "Add") else None
        if reader is not None and bias is not None and _is_bias(bias, product):
            inputs[In.BIAS], last = bias, reader
        linear = last.outputs[0]
        last, gelu = _gelu(last)
        last = _absorb(last, inputs)
        outputs = {Out.LINEAR: linear}
        if last.outputs[0] is not linear:
            outputs[Out.Y] = last.outputs[0]
        put_chain(graph, last, inputs, outputs, gelu=gelu)


def _products(graph: ir.Graph) -> list[ir.Node]:
    """The fused integer GEMMs, and the sums of those that have one for each group."""
    gemms = [node for node in graph if is_op(node, FUSED, MICROSOFT)]
    found: dict[ir.Node, None] = {}
    for node in gemms:
        reader = only_reader(node.outputs[0])
        found[reader if reader is not None and is_op(reader, "Sum") else node] = None
    return list(found)


def _is_scale(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and is_chain(node) and value_out(node, Out.SCALE) is value


def _is_bias(value: ir.Value, product: ir.Value) -> bool:
    """A stored vector, one number for each channel of the product; it is not read here."""
    node = product.producer()
    gemm = node.inputs[0].producer() if node.op_type == "Sum" else node  # type: ignore[union-attr]
    weight = gemm.inputs[1]  # type: ignore[union-attr]
    shape = value.const_value.shape if value.const_value is not None else None
    return shape is not None and shape.rank() == 1 and shape[0] == channels(weight)


def _gelu(last: ir.Node) -> tuple[ir.Node, int]:
    reader = only_reader(last.outputs[0])
    if reader is not None and is_op(reader, "Gelu") and attribute(reader, "approximate", "none") == "tanh":
        return reader, 1
    return last, 0


def _absorb(last: ir.Node, inputs: dict[In, ir.Value]) -> ir.Node:
    """Take a gate and a residual into `inputs`; the last node that is then computed."""
    for op_type, place, fits in (("Mul", In.GATE, _is_gate), ("Add", In.RESIDUAL, _is_residual)):
        value = last.outputs[0]
        reader = only_reader(value)
        if reader is not None and is_op(reader, op_type) and fits(other_input(reader, value), value):
            inputs[place], last = other_input(reader, value), reader
    return last


def _is_gate(gate: ir.Value, value: ir.Value) -> bool:
    """Computed by the model. A stored vector is the balance in front of a quantizer, whose input a gate looks at."""
    return gate.const_value is None and not misfit(gate, value)


def _is_residual(residual: ir.Value, value: ir.Value) -> bool:
    """Known to have the shape of `value`, so that nothing is broadcast."""
    shape, expected = residual.shape, value.shape
    if shape is None or expected is None or not all(isinstance(size, int) or size.value for size in shape):
        return False
    return bool(shape.rank() > 1) and shape == expected
