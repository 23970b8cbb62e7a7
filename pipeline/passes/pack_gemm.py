"""MatMul of dequantized codes with a dequantized weight, plus bias -> fpq.PackedGemm or fpq.PackedGroupGemm."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.dialect.graph import (
    DEQUANTIZERS,
    add_functions,
    add_initializer,
    attribute,
    drop_unused,
    fpq_node,
    inputs_of,
    is_op,
    layer_of,
    name_of,
    other_input,
    produced_by,
    read_by,
    replace,
    result_of,
    stored_array,
)
from export.dialect.ops import DOMAIN
from pipeline.passes.quantized_gemm import PACKED_GEMMS, read_gemm
from pipeline.passes.rewrite import RewritePass


class PackGemm(RewritePass):
    """MatMul(DequantizeActivation(codes, scale), DequantizeWeight(...)) [+ bias] -> PackedGemm.

    Codes then reach the GEMM directly. A bias joins if it is a constant vector [N] added to a product that nothing
    else reads; otherwise the GEMM gets a bias of zeros and the Add stays.

    A static scale becomes the GEMM's, and its zero a part of the bias: zero times the sum of each channel's weights,
    which is an exact integer sum times its scale. DequantizeGroups gives a PackedGroupGemm.
    """

    def rewrite(self, model: ir.Model) -> None:
        for node in list(model.graph):
            if is_op(node, "MatMul") and produced_by(inputs_of(node).B, "DequantizeWeight", DOMAIN):
                self._try(model.graph, node)
        if self.fired:
            used = {node.op_type for node in model.graph if node.domain == DOMAIN}
            add_functions(model, [name for name in PACKED_GEMMS if name in used])
            drop_unused(model)

    def _try(self, graph: ir.Graph, matmul: ir.Node) -> None:
        activation, weight = inputs_of(matmul).A.producer(), inputs_of(matmul).B.producer()
        assert weight is not None
        layer = layer_of(matmul) or layer_of(weight) or name_of(matmul)
        if activation is None or activation.domain != DOMAIN or activation.op_type not in DEQUANTIZERS:
            self.refuse(layer, f"{name_of(matmul)} reads a float activation; only its weight is quantized")
            return
        if any(value is None or not value.is_initializer() for value in weight.inputs):
            self.refuse(layer, f"the weight of {name_of(matmul)} is computed at run time")
            return
        add, bias = self._bias(matmul)
        bias = bias or _zeros(graph, layer, weight)
        packed = _packed(matmul, activation, weight, bias, layer)
        if activation.op_type == "DequantizeStatic":
            _fold_zero(graph, packed, stored_array(inputs_of(activation).zero))
        replace(graph, add or matmul, packed)
        self.fired += 1

    def _bias(self, matmul: ir.Node) -> tuple[ir.Node | None, ir.Value | None]:
        """(Add node, bias [N]) that can join, or (None, None)."""
        add = read_by(result_of(matmul), "Add")
        if add is None:
            return None, None
        bias = other_input(add, result_of(matmul))
        if not bias.is_initializer() or bias.shape is None or bias.shape.rank() != 1:
            self.refuse(name_of(add), f"{bias.name} is not a constant vector, so it stays a separate Add")
            return None, None
        return add, bias


def _packed(matmul: ir.Node, activation: ir.Node, weight: ir.Node, bias: ir.Value, layer: str) -> ir.Node:
    """The packed node for the kind of scale that the activation has."""
    choices = {key: attribute(weight, key) for key in ("in_features", "group_size")}
    choices |= {"layer": layer, "multipliers": tuple(attribute(weight, "multipliers"))}
    choices |= {"activation_format": attribute(activation, "format"), "weight_format": attribute(weight, "format")}
    op_type = "PackedGemm"
    if activation.op_type == "DequantizeGroups":
        op_type, scales = "PackedGroupGemm", stored_array(inputs_of(weight).scales)
        choices |= {"activation_group": attribute(activation, "group_size"), "scale_groups": int(scales.shape[1])}
    codes, stored = inputs_of(activation), inputs_of(weight)
    inputs = {"a_codes": codes.codes, "a_scale": codes.scale, "w_codes": stored.codes, "w_scales": stored.scales}
    inputs |= {"multiplier_codes": stored.multiplier_codes, "bias": bias}
    return fpq_node(op_type, inputs, f"{layer}/gemm", matmul, **choices)


def _fold_zero(graph: ir.Graph, packed: ir.Node, zero: NDArray[np.float32]) -> None:
    """bias + zero * (sum of each channel's weights), rounded to float32 once; the bias itself where zero is 0."""
    if not zero.any():
        return
    gemm, bias = read_gemm(packed), stored_array(inputs_of(packed).bias)
    shifted = (bias + zero.astype(np.float64) * gemm.channel_sums()).astype(np.float32)
    inputs_of(packed).set("bias", add_initializer(graph, ir.tensor(shifted, name=f"{gemm.layer}.bias_with_zero")))


def _zeros(graph: ir.Graph, layer: str, weight: ir.Node) -> ir.Value:
    """A bias of zeros [N] for a linear that has none."""
    channels = len(stored_array(inputs_of(weight).codes))
    return add_initializer(graph, ir.tensor(np.zeros(channels, np.float32), name=f"{layer}.no_bias"))
