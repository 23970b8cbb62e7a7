"""MatMul of dequantized codes with a dequantized weight, plus bias -> fpq.PackedGemm."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export.ops import DOMAIN
from pipeline.passes.emit import initializer
from pipeline.passes.graph import (
    add_functions,
    attribute,
    constant,
    drop_unused,
    fpq_node,
    is_op,
    layer_of,
    name_of,
    only_reader,
    other_input,
    produced_by,
    replace,
)
from pipeline.passes.refusal import RewritePass


class PackGemm(RewritePass):
    """MatMul(DequantizeActivation(codes, scale), DequantizeWeight(...)) [+ bias] -> PackedGemm.

    Codes then reach the GEMM directly. A bias joins if it is a constant vector [N] added to a product that nothing
    else reads; otherwise the GEMM gets a bias of zeros and the Add stays.
    """

    def rewrite(self, model: ir.Model) -> None:
        for node in list(model.graph):
            if is_op(node, "MatMul") and produced_by(node.inputs[1], "DequantizeWeight", DOMAIN):
                self._try(model.graph, node)
        if self.fired:
            add_functions(model, ["PackedGemm"])
            drop_unused(model)

    def _try(self, graph: ir.Graph, matmul: ir.Node) -> None:
        activation = produced_by(matmul.inputs[0], "DequantizeActivation", DOMAIN)
        weight = produced_by(matmul.inputs[1], "DequantizeWeight", DOMAIN)
        if weight is None:
            return
        layer = layer_of(matmul) or layer_of(weight) or name_of(matmul)
        if activation is None:
            self.refuse(layer, f"{name_of(matmul)} reads a float activation; only its weight is quantized")
            return
        if any(value is None or not value.is_initializer() for value in weight.inputs):
            self.refuse(layer, f"the weight of {name_of(matmul)} is computed at run time")
            return
        add, bias = self._bias(matmul)
        bias = bias or _zeros(graph, layer, weight)
        inputs = [*activation.inputs, *weight.inputs, bias]
        choices = {key: attribute(weight, key) for key in ("in_features", "group_size")}
        fused = fpq_node(
            "PackedGemm",
            inputs,
            f"{layer}/gemm",
            matmul,
            layer=layer,
            activation_format=attribute(activation, "format"),
            weight_format=attribute(weight, "format"),
            multipliers=tuple(attribute(weight, "multipliers")),
            **choices,
        )
        replace(graph, add or matmul, fused)
        self.fired += 1

    def _bias(self, matmul: ir.Node) -> tuple[ir.Node | None, ir.Value | None]:
        """(Add node, bias [N]) that can join, or (None, None)."""
        add = only_reader(matmul.outputs[0])
        if not is_op(add, "Add") or add is None:
            return None, None
        bias = other_input(add, matmul.outputs[0])
        if not bias.is_initializer() or bias.shape is None or bias.shape.rank() != 1:
            self.refuse(name_of(add), f"{bias.name} is not a constant vector, so it stays a separate Add")
            return None, None
        return add, bias


def _zeros(graph: ir.Graph, layer: str, weight: ir.Node) -> ir.Value:
    """A bias of zeros [N] for a linear that has none."""
    codes = constant(weight.inputs[0])
    assert codes is not None
    return initializer(graph, ir.tensor(np.zeros(len(codes), np.float32), name=f"{layer}.no_bias"))
