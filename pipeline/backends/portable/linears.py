"""The quantized linears of a portable graph by their tensors: the graph is read as it is wired, nothing is changed.

A linear is looked for from its MatMul outwards, by what feeds it and what reads it, not by the names that the exporter
gave. One that is wired in another way is not found, and then missing from the target's coverage.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from export.dialect.ops import DOMAIN, OPS
from export.formats.format import get_format
from export.quantize_graph import QUANTIZERS
from pipeline.backends.base import Choice, ProbeRow
from pipeline.passes.graph import attribute, is_op, layer_of, low_rank_of, only_reader, other_input, unbalanced

PATH = "f32"
# Inverse -> the quantizer whose codes it takes.
QUANTIZER_OF = {inverse: quantizer for quantizer, inverse in QUANTIZERS.values()}


@dataclass(frozen=True)
class PortableLinear:
    """Nodes of one quantized linear. `output`: with its bias, before a low-rank branch is added."""

    layer: str
    quantizer: ir.Node
    inverse: ir.Node
    weight: ir.Node
    matmul: ir.Node
    output: ir.Value

    @property
    def probe(self) -> ProbeRow:
        """Where the proof finds its tensors."""
        branch, total = low_rank_of(self.output) or (None, self.output)
        static = self.quantizer.op_type == "QuantizeStatic"
        activation = str(attribute(self.quantizer, "format"))
        return ProbeRow(
            layer=self.layer,
            path=PATH,
            x=_name(unbalanced(port(self.quantizer, "x"))),
            codes=(_name(port(self.quantizer, "codes")),),
            limb_weights=(1.0,),
            codes_unit=1.0,
            codes_offset=0.0,
            codes_format=activation,
            act_scale="" if static else _name(port(self.quantizer, "scale")),
            operands=(_name(port(self.inverse, "x")), _name(port(self.weight, "w"))),
            gemm=_name(self.matmul.outputs[0]),
            gemm_unit=1.0,
            gemm_scale="",
            exact=False,
            output=_name(total),
            low_rank="" if branch is None else _name(branch),
        )

    @property
    def choice(self) -> Choice:
        """The one form that any runtime has."""
        activation, weight = (get_format(str(attribute(node, "format"))) for node in (self.quantizer, self.weight))
        why = f"{activation.name} and {weight.name} are decoded by function bodies in standard ops, then multiplied"
        return Choice(self.layer, PATH, why)


def port(node: ir.Node, name: str) -> ir.Value:
    """The input or output that the schema of an `fpq` op calls `name`; of the outputs where both have it."""
    op = OPS[node.op_type]
    for names, values in ((op.outputs, node.outputs), (op.inputs, node.inputs)):
        if name in names:
            value = values[list(names).index(name)]
            assert value is not None, f"{node.name}: every input of an fpq op is passed"
            return value
    raise KeyError(f"{node.op_type} has no input or output {name}")


def portable_linears(model: ir.Model) -> list[PortableLinear]:
    """Every quantized linear of a portable model, in the order of the graph."""
    found = (_linear(node) for node in model.graph if is_op(node, "MatMul"))
    return [linear for linear in found if linear is not None]


def _linear(matmul: ir.Node) -> PortableLinear | None:
    """The linear around a MatMul of two dequantized operands, or None."""
    inverse, weight = (None if value is None else value.producer() for value in matmul.inputs)
    if not _is_stored(weight) or inverse is None or inverse.domain != DOMAIN:
        return None
    quantizer = port(inverse, "codes").producer() if inverse.op_type in QUANTIZER_OF else None
    if not is_op(quantizer, QUANTIZER_OF.get(inverse.op_type, ""), DOMAIN):
        return None
    assert quantizer is not None and weight is not None
    return PortableLinear(layer_of(matmul), quantizer, inverse, weight, matmul, _with_bias(matmul))


def _is_stored(weight: ir.Node | None) -> bool:
    """Is it the decoder of a weight that the file holds?"""
    if weight is None or not is_op(weight, "DequantizeWeight", DOMAIN):
        return False
    return all(value is not None and value.is_initializer() for value in weight.inputs)


def _with_bias(matmul: ir.Node) -> ir.Value:
    """The MatMul's result, or its sum with a stored bias."""
    product = matmul.outputs[0]
    add = only_reader(product)
    if is_op(add, "Add") and add is not None and other_input(add, product).is_initializer():
        return add.outputs[0]
    return product


def _name(value: ir.Value) -> str:
    return str(value.name)
