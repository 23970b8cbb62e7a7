"""The quantized linears of a portable graph by their tensors: the graph is read as it is wired, nothing is changed.

A linear is looked for from its MatMul outwards, by what feeds it and what reads it, not by the names that the exporter
gave. One that is wired in another way is not found, and then missing from the target's coverage.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from export.dialect.graph import (
    INVERSE_OF,
    attribute,
    inputs_of,
    is_op,
    layer_of,
    name_of,
    other_input,
    outputs_of,
    read_by,
    result_of,
)
from export.dialect.ops import DOMAIN
from export.formats.format import get_format
from pipeline.passes.probes import Choice, ProbeRow
from pipeline.passes.quantized_gemm import probe_of

PATH = "f32"
# Inverse -> the quantizer whose codes it takes.
QUANTIZER_OF = {inverse: quantizer for quantizer, inverse in INVERSE_OF.items()}


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
        return probe_of(
            self.layer,
            PATH,
            x=inputs_of(self.quantizer).x,
            codes=[outputs_of(self.quantizer).codes],
            codes_format=str(attribute(self.quantizer, "format")),
            act_scale=None if self.quantizer.op_type == "QuantizeStatic" else outputs_of(self.quantizer).scale,
            operands=(outputs_of(self.inverse).x, outputs_of(self.weight).w),
            gemm=result_of(self.matmul),
            result=self.output,
            exact=False,
        )

    @property
    def choice(self) -> Choice:
        """The one form that any runtime has."""
        activation, weight = (get_format(str(attribute(node, "format"))) for node in (self.quantizer, self.weight))
        why = f"{activation.name} and {weight.name} are decoded by function bodies in standard ops, then multiplied"
        return Choice(self.layer, PATH, why)


def read_linears(path: Path) -> list[PortableLinear]:
    """Those of a portable model's file."""
    return portable_linears(ir.load(path))


def portable_linears(model: ir.Model) -> list[PortableLinear]:
    """Every quantized linear of a portable model, in the order of the graph."""
    linears = (_linear(node) for node in model.graph if is_op(node, "MatMul"))
    return [linear for linear in linears if linear is not None]


def _linear(matmul: ir.Node) -> PortableLinear | None:
    """The linear around a MatMul of two dequantized operands, or None."""
    inverse, weight = inputs_of(matmul).A.producer(), inputs_of(matmul).B.producer()
    if not _is_stored(weight) or inverse is None or inverse.domain != DOMAIN:
        return None
    quantizer = inputs_of(inverse).codes.producer() if inverse.op_type in QUANTIZER_OF else None
    if not is_op(quantizer, QUANTIZER_OF.get(inverse.op_type, ""), DOMAIN):
        return None
    assert quantizer is not None and weight is not None
    return PortableLinear(layer_of(matmul) or name_of(matmul), quantizer, inverse, weight, matmul, _with_bias(matmul))


def _is_stored(weight: ir.Node | None) -> bool:
    """Is it the decoder of a weight that the file holds?"""
    if weight is None or not is_op(weight, "DequantizeWeight", DOMAIN):
        return False
    return all(value is not None and value.is_initializer() for value in weight.inputs)


def _with_bias(matmul: ir.Node) -> ir.Value:
    """The MatMul's result, or its sum with a stored bias."""
    product = result_of(matmul)
    add = read_by(product, "Add")
    return result_of(add) if add and other_input(add, product).is_initializer() else product
