"""MatMul of dequantized codes with a dequantized weight, plus bias -> fpq.PackedGemm or fpq.PackedGroupGemm."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.dialect.ops import DOMAIN
from export.formats.format import get_format, unpack
from pipeline.passes.emit import initializer
from pipeline.passes.graph import (
    DEQUANTIZERS,
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
from pipeline.passes.rewrite import RewritePass


class PackGemm(RewritePass):
    """MatMul(DequantizeActivation(codes, scale), DequantizeWeight(...)) [+ bias] -> PackedGemm.

    Codes then reach the GEMM directly. A bias joins if it is a constant vector [N] added to a product that nothing
    else reads; otherwise the GEMM gets a bias of zeros and the Add stays.

    A static scale becomes the GEMM's, and its zero a part of the bias: zero times the sum of each channel's weights,
    which is an exact integer sum of the weight's image times its scale. DequantizeGroups gives a PackedGroupGemm.
    """

    def rewrite(self, model: ir.Model) -> None:
        for node in list(model.graph):
            if is_op(node, "MatMul") and produced_by(node.inputs[1], "DequantizeWeight", DOMAIN):
                self._try(model.graph, node)
        if self.fired:
            used = {node.op_type for node in model.graph if node.domain == DOMAIN}
            add_functions(model, [name for name in ("PackedGemm", "PackedGroupGemm") if name in used])
            drop_unused(model)

    def _try(self, graph: ir.Graph, matmul: ir.Node) -> None:
        activation = matmul.inputs[0].producer() if matmul.inputs[0] is not None else None
        weight = produced_by(matmul.inputs[1], "DequantizeWeight", DOMAIN)
        if weight is None:
            return
        layer = layer_of(matmul) or layer_of(weight) or name_of(matmul)
        if activation is None or activation.domain != DOMAIN or activation.op_type not in DEQUANTIZERS:
            self.refuse(layer, f"{name_of(matmul)} reads a float activation; only its weight is quantized")
            return
        if any(value is None or not value.is_initializer() for value in weight.inputs):
            self.refuse(layer, f"the weight of {name_of(matmul)} is computed at run time")
            return
        add, bias = self._bias(matmul)
        bias = bias or _zeros(graph, layer, weight)
        choices = {key: attribute(weight, key) for key in ("in_features", "group_size")}
        choices |= {"layer": layer, "multipliers": tuple(attribute(weight, "multipliers"))}
        formats = {"activation_format": attribute(activation, "format"), "weight_format": attribute(weight, "format")}
        fused = _packed(graph, matmul, activation, weight, bias, choices | formats)
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


def _packed(
    graph: ir.Graph, matmul: ir.Node, activation: ir.Node, weight: ir.Node, bias: ir.Value, choices: dict[str, Any]
) -> ir.Node:
    """The packed node for the kind of scale that the activation has."""
    codes, scale = activation.inputs[:2]
    name = f"{choices['layer']}/gemm"
    if activation.op_type == "DequantizeGroups":
        groups = {"activation_group": attribute(activation, "group_size"), "scale_groups": _scale_groups(weight)}
        inputs = [codes, scale, *weight.inputs, bias]
        return fpq_node("PackedGroupGemm", inputs, name, matmul, **choices, **groups)
    if activation.op_type == "DequantizeStatic":
        bias = _with_zero(graph, choices["layer"], activation, weight, bias)
    return fpq_node("PackedGemm", [codes, scale, *weight.inputs, bias], name, matmul, **choices)


def _scale_groups(weight: ir.Node) -> int:
    scales = constant(weight.inputs[1])
    assert scales is not None
    return int(scales.shape[1])


def _with_zero(graph: ir.Graph, layer: str, activation: ir.Node, weight: ir.Node, bias: ir.Value) -> ir.Value:
    """bias + zero * (sum of each channel's weights), rounded to float32 once; the bias itself where zero is 0."""
    zero, found = constant(activation.inputs[2]), constant(bias)
    assert zero is not None and found is not None
    if not zero.any():
        return bias
    shifted = found + zero.astype(np.float64) * _channel_sums(weight)
    return initializer(graph, ir.tensor(shifted.astype(np.float32), name=f"{layer}.bias_with_zero"))


def _channel_sums(weight: ir.Node) -> NDArray[np.float64]:
    """[N]: sum over K of the weight: integer sums of the image per scale group, exact, times their scales."""
    codes, scales, multiplier_codes = (constant(value) for value in weight.inputs)
    assert codes is not None and scales is not None and multiplier_codes is not None
    fmt, k, groups = (
        get_format(attribute(weight, "format")),
        attribute(weight, "in_features"),
        attribute(weight, "groups"),
    )
    image = fmt.image[unpack(codes, fmt.bits, k)].reshape(len(codes), groups, -1).sum(axis=2)
    image = image * np.asarray(attribute(weight, "multipliers"))[unpack(multiplier_codes, 4, groups)]
    sums = image.reshape(len(codes), scales.shape[1], -1).sum(axis=2)
    return (sums * scales.astype(np.float64)).sum(axis=1) * 2.0**-fmt.fraction_bits


def _zeros(graph: ir.Graph, layer: str, weight: ir.Node) -> ir.Value:
    """A bias of zeros [N] for a linear that has none."""
    codes = constant(weight.inputs[0])
    assert codes is not None
    return initializer(graph, ir.tensor(np.zeros(len(codes), np.float32), name=f"{layer}.no_bias"))
