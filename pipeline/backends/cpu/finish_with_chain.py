"""What follows an integer GEMM, token by token -> one TokenChain."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from pipeline.backends.cpu.token_chain import In, Out, channels, is_chain, misfit, number, put_chain, value_out
from pipeline.passes.emit import MICROSOFT
from pipeline.passes.graph import attribute, drop_unused, is_op, only_reader, other_input, produced_by
from pipeline.passes.rewrite import RewritePass

FUSED, SUM = "MatMulIntegerToFloat", "MatMulInteger"


@dataclass(frozen=True)
class _Product:
    """A GEMM's scaled sum, how a chain is to read it, and the weight's image of (one of) its GEMMs."""

    value: ir.Value
    inputs: dict[In, ir.Value]
    outputs: dict[Out, ir.Value]
    weight: ir.Value | None
    limb_weight: int = 0


class NativeFinish(RewritePass):
    """gelu(product * token scale + bias) * gate + residual -> TokenChain, as far as the graph has these in this order.

    A product of two limbs is taken in from their int32 sums on. The token scale must come from a TokenChain. Product
    and linear stay outputs, for the parity gates.
    """

    def rewrite(self, model: ir.Model) -> None:
        for product in _products(model.graph):
            value = product.value
            scaled = only_reader(value)
            if scaled is None or not is_op(scaled, "Mul") or not _is_scale(other_input(scaled, value)):
                self.refuse(str(value.name), "its result is not scaled by a token scale alone")
                continue
            self._finish(model.graph, product, scaled)
            self.fired += 1
        model.graph.sort()
        drop_unused(model)

    def _finish(self, graph: ir.Graph, product: _Product, scaled: ir.Node) -> None:
        inputs = product.inputs | {In.TOKEN_SCALE: other_input(scaled, product.value)}
        last = scaled
        reader = only_reader(last.outputs[0])
        bias = other_input(reader, last.outputs[0]) if reader is not None and is_op(reader, "Add") else None
        if reader is not None and bias is not None and _is_bias(bias, product.weight):
            inputs[In.BIAS], last = bias, reader
        linear = last.outputs[0]
        last, gelu = _gelu(last)
        last = _absorb(last, inputs)
        outputs = {Out.LINEAR: linear} | product.outputs
        if last.outputs[0] is not linear:
            outputs[Out.Y] = last.outputs[0]
        put_chain(graph, last, inputs, outputs, gelu=gelu, limb_weight=product.limb_weight)


def _products(graph: ir.Graph) -> list[_Product]:
    """The fused integer GEMMs, the sums of those that have one for each group, and the products of two limbs."""
    found: dict[ir.Value, _Product] = {}
    for node in graph:
        if is_op(node, FUSED, MICROSOFT):
            reader = only_reader(node.outputs[0])
            last = reader if reader is not None and is_op(reader, "Sum") else node
            value = last.outputs[0]
            found.setdefault(value, _Product(value, {In.X: value}, {}, node.inputs[1]))
        elif (two := _in_two_limbs(node)) is not None:
            found[two.value] = two
    return list(found.values())


def _in_two_limbs(node: ir.Node) -> _Product | None:
    """`node` if it is Mul(Cast(high sum * limb weight + low sum), channel scale)."""
    cast = produced_by(node.inputs[0], "Cast") if is_op(node, "Mul") else None
    total = produced_by(cast.inputs[0], "Add") if cast else None
    weighted = produced_by(total.inputs[0], "Mul") if total else None
    high = produced_by(weighted.inputs[0], SUM) if weighted else None
    low = produced_by(total.inputs[1], SUM) if total else None
    scale = node.inputs[1] if high and low else None
    if weighted is None or high is None or low is None or scale is None or high.inputs[1] is not low.inputs[1]:
        return None
    weight, limb_weight = high.inputs[1], number(weighted.inputs[1])
    if limb_weight is None or _size_of(scale) != channels(weight):
        return None
    inputs = {In.HIGH_SUM: high.outputs[0], In.LOW_SUM: low.outputs[0], In.CHANNEL_SCALE: scale}
    return _Product(node.outputs[0], inputs, {Out.PRODUCT: node.outputs[0]}, weight, int(limb_weight))


def _size_of(value: ir.Value) -> int | None:
    """Size of a stored vector, which is not read here; None for anything else."""
    shape = value.const_value.shape if value.const_value is not None else None
    return int(shape[0]) if shape is not None and shape.rank() == 1 else None  # type: ignore[arg-type]


def _is_scale(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and is_chain(node) and value_out(node, Out.SCALE) is value


def _is_bias(value: ir.Value, weight: ir.Value | None) -> bool:
    """A stored vector, one number for each channel of the product."""
    size = _size_of(value)
    return size is not None and size == channels(weight)


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
