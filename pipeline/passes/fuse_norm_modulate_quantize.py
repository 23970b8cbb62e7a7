"""LayerNorm without affine + adaLN modulate + quantize -> fpq.NormModulateQuantize."""

from __future__ import annotations

import onnx_ir as ir

from export.dialect.ops import DOMAIN
from pipeline.passes.graph import (
    QUANTIZERS,
    add_functions,
    attribute,
    constant,
    drop_unused,
    fpq_node,
    is_constant,
    is_op,
    name_of,
    only_reader,
    other_input,
    produced_by,
    replace,
    unbalanced,
)
from pipeline.passes.rewrite import RewritePass


class FuseNormModulateQuantize(RewritePass):
    """QuantizeActivation(LayerNormalization(x) * (1 + scale) + shift) -> NormModulateQuantize(x, shift, scale).

    The norm must have no affine parameters and its inner values no other reader. `1 + scale` may have others. Only
    scales per token are fused: a constant one needs no pass over the token, and groups have no fused op.
    """

    def rewrite(self, model: ir.Model) -> None:
        for node in list(model.graph):
            if is_op(node, "QuantizeActivation", DOMAIN):
                self._try(model.graph, node)
            elif node.domain == DOMAIN and node.op_type in QUANTIZERS and _reads_norm(node.inputs[0]):
                self.refuse(node.name, f"{node.op_type} of a norm; only one scale per token is fused with it")
        if self.fired:
            add_functions(model, ["NormModulateQuantize"])
            drop_unused(model)

    def _try(self, graph: ir.Graph, quantizer: ir.Node) -> None:
        modulated = quantizer.inputs[0]
        balanced = modulated is not None and unbalanced(modulated) is not modulated
        add = None if balanced else produced_by(modulated, "Add")
        found = self._multiply_and_norm(add) if add else None
        if modulated is None or add is None or found is None:
            if near := _near_miss(modulated, add):
                self.refuse(quantizer.name, near)
            return
        multiply, norm = found
        shift, plus_one = other_input(add, multiply.outputs[0]), other_input(multiply, norm.outputs[0])
        reason, scale = self._check(quantizer, add, multiply, norm, plus_one, shift)
        if reason or scale is None:
            self.refuse(quantizer.name, reason)
            return
        inputs = [norm.inputs[0], shift, scale]
        epsilon, fmt = float(attribute(norm, "epsilon", 1e-5)), str(attribute(quantizer, "format"))
        name = quantizer.name or name_of(norm)
        fused = fpq_node("NormModulateQuantize", inputs, name, quantizer, format=fmt, epsilon=epsilon)
        replace(graph, quantizer, fused)
        self.fired += 1

    def _multiply_and_norm(self, add: ir.Node) -> tuple[ir.Node, ir.Node] | None:
        for candidate in add.inputs:
            multiply = produced_by(candidate, "Mul")
            for value in multiply.inputs if multiply else ():
                norm = produced_by(value, "LayerNormalization")
                if multiply and norm:
                    return multiply, norm
        return None

    def _check(
        self, quantizer: ir.Node, add: ir.Node, multiply: ir.Node, norm: ir.Node, plus_one: ir.Value, shift: ir.Value
    ) -> tuple[str, ir.Value | None]:
        """('', scale) if the pattern holds, else (reason, None)."""
        for node, reader in ((norm, multiply), (multiply, add), (add, quantizer)):
            if only_reader(node.outputs[0]) is not reader:
                return f"{node.outputs[0].name} has another reader than {name_of(reader)}", None
        if reason := _affine(norm):
            return reason, None
        rank = norm.inputs[0].shape.rank() if norm.inputs[0] and norm.inputs[0].shape else 3
        if attribute(norm, "axis", -1) not in (-1, rank - 1):
            return f"{name_of(norm)} normalizes over axis {attribute(norm, 'axis')}, not the last one", None
        scale = _without_one(plus_one)
        if scale is None:
            return f"{plus_one.name} is not 1 + scale", None
        for name, value in (("scale", scale), ("shift", shift)):
            if reason := _not_per_sample(name, value):
                return reason, None
        return "", scale


def _near_miss(x: ir.Value | None, add: ir.Node | None) -> str:
    """Why a quantizer that reads a norm has no modulate to fuse; '' if it reads something else altogether."""
    if x is not None and unbalanced(x) is not x and _reads_norm(x):
        return "its norm is balanced channel by channel before it is quantized"
    if produced_by(x, "LayerNormalization"):
        return "its norm is neither scaled nor shifted per sample"
    if add and any(produced_by(value, "LayerNormalization") for value in add.inputs):
        return "its norm is shifted but not multiplied by 1 + scale"
    return ""


def _reads_norm(x: ir.Value | None, steps: int = 4) -> bool:
    """Is `x` a LayerNormalization with at most `steps` multiplications and additions behind it?"""
    node = x.producer() if x is not None else None
    if node is None or is_op(node, "LayerNormalization"):
        return node is not None
    elementwise = steps > 0 and (is_op(node, "Mul") or is_op(node, "Add"))
    return elementwise and any(_reads_norm(value, steps - 1) for value in node.inputs)


def _affine(norm: ir.Node) -> str:
    """Why the norm's own scale and bias stand in the way, '' if they do not."""
    if not is_constant(norm.inputs[1], 1.0):
        return f"{name_of(norm)} has an affine scale"
    bias = norm.inputs[2] if len(norm.inputs) > 2 else None
    if bias is not None and not is_constant(bias, 0.0):
        return f"{name_of(norm)} has an affine bias"
    if len(norm.outputs) > 1 and any(list(extra.uses()) for extra in norm.outputs[1:]):
        return f"mean or deviation of {name_of(norm)} is read elsewhere"
    return ""


def _without_one(plus_one: ir.Value) -> ir.Value | None:
    """`scale` of `1 + scale`, else None."""
    add = produced_by(plus_one, "Add")
    for index in (0, 1) if add else ():
        value = add.inputs[index] if add else None
        if add and is_constant(value, 1.0) and constant(value).size == 1:  # type: ignore[union-attr]
            return add.inputs[1 - index]
    return None


def _not_per_sample(name: str, value: ir.Value) -> str:
    """Why `value` is not [B, 1, C], '' if it is."""
    if value.shape is None or value.shape.rank() != 3 or value.shape[1] != 1:
        return f"{name} {value.name} has shape {value.shape}, not [batch, 1, channels]"
    return ""
