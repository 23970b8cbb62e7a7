"""LayerNorm without affine + adaLN modulate + quantize -> fpq.NormModulateQuantize."""

from __future__ import annotations

from itertools import pairwise

import onnx_ir as ir

from export.dialect.graph import (
    QUANTIZERS,
    add_functions,
    attribute,
    drop_unused,
    fpq_node,
    inputs_of,
    is_constant,
    is_op,
    name_of,
    only_reader,
    other_input,
    outputs_of,
    produced_by,
    replace,
    result_of,
    stored_array,
    unbalanced,
)
from export.dialect.ops import DOMAIN
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
            elif node.domain == DOMAIN and node.op_type in QUANTIZERS and _reads_norm(inputs_of(node).x):
                self.refuse(node.name, f"{node.op_type} of a norm; only one scale per token is fused with it")
        if self.fired:
            add_functions(model, ["NormModulateQuantize"])
            drop_unused(model)

    def _try(self, graph: ir.Graph, quantizer: ir.Node) -> None:
        modulated = inputs_of(quantizer).x
        add = produced_by(modulated, "Add") if unbalanced(modulated) is modulated else None
        multiply, norm = _multiply_and_norm(add)
        if add is None or multiply is None or norm is None:
            if near := _near_miss(modulated, add):
                self.refuse(quantizer.name, near)
            return
        shift, plus_one = other_input(add, result_of(multiply)), other_input(multiply, result_of(norm))
        scale = _without_one(plus_one)
        reason = _other_reader(norm, multiply, add, quantizer) or _unfit_norm(norm)
        if reason is None and scale is not None:
            reason = _not_per_sample("scale", scale) or _not_per_sample("shift", shift)
        if reason or scale is None:
            self.refuse(quantizer.name, reason or f"{plus_one.name} is not 1 + scale")
            return
        inputs = {"x": inputs_of(norm).X, "shift": shift, "scale": scale}
        epsilon, fmt = float(attribute(norm, "epsilon", 1e-5)), str(attribute(quantizer, "format"))
        name = quantizer.name or name_of(norm)
        replace(
            graph, quantizer, fpq_node("NormModulateQuantize", inputs, name, quantizer, format=fmt, epsilon=epsilon)
        )
        self.fired += 1


def _multiply_and_norm(add: ir.Node | None) -> tuple[ir.Node | None, ir.Node | None]:
    """The Mul that `add` reads and the norm that this one reads."""
    for term in add.inputs if add else ():
        multiply = produced_by(term, "Mul")
        for factor in multiply.inputs if multiply else ():
            if norm := produced_by(factor, "LayerNormalization"):
                return multiply, norm
    return None, None


def _near_miss(x: ir.Value, add: ir.Node | None) -> str | None:
    """Why a quantizer that reads a norm has no modulate to fuse; None if it reads something else altogether."""
    if unbalanced(x) is not x and _reads_norm(x):
        return "its norm is balanced channel by channel before it is quantized"
    if produced_by(x, "LayerNormalization"):
        return "its norm is neither scaled nor shifted per sample"
    if add and any(produced_by(value, "LayerNormalization") for value in add.inputs):
        return "its norm is shifted but not multiplied by 1 + scale"
    return None


def _reads_norm(x: ir.Value | None, steps: int = 4) -> bool:
    """Is `x` a LayerNormalization with at most `steps` multiplications and additions behind it?"""
    node = x.producer() if x is not None else None
    if node is None or is_op(node, "LayerNormalization"):
        return node is not None
    elementwise = steps > 0 and (is_op(node, "Mul") or is_op(node, "Add"))
    return elementwise and any(_reads_norm(value, steps - 1) for value in node.inputs)


def _other_reader(*chain: ir.Node) -> str | None:
    """Which of these nodes is read by another one than the next, None for none."""
    for node, reader in pairwise(chain):
        if only_reader(result_of(node)) is not reader:
            return f"{result_of(node).name} has another reader than {name_of(reader)}"
    return None


def _unfit_norm(norm: ir.Node) -> str | None:
    """Why the fused op is not this norm, None if it is."""
    ports, results = inputs_of(norm), outputs_of(norm)
    if not is_constant(ports.Scale, 1.0):
        return f"{name_of(norm)} has an affine scale"
    if ports.get("B") is not None and not is_constant(ports.B, 0.0):
        return f"{name_of(norm)} has an affine bias"
    if any(value is not None and value.uses() for value in map(results.get, ("Mean", "InvStdDev"))):
        return f"mean or deviation of {name_of(norm)} is read elsewhere"
    rank = ports.X.shape.rank() if ports.X.shape else 3
    if attribute(norm, "axis", -1) not in (-1, rank - 1):
        return f"{name_of(norm)} normalizes over axis {attribute(norm, 'axis')}, not the last one"
    return None


def _without_one(plus_one: ir.Value) -> ir.Value | None:
    """`scale` of `1 + scale`, else None."""
    add = produced_by(plus_one, "Add")
    for value in add.inputs if add else ():
        if add and value is not None and is_constant(value, 1.0) and stored_array(value).size == 1:
            return other_input(add, value)
    return None


def _not_per_sample(name: str, value: ir.Value) -> str | None:
    """Why `value` is not [B, 1, C], None if it is."""
    if value.shape is None or value.shape.rank() != 3 or value.shape[1] != 1:
        return f"{name} {value.name} has shape {value.shape}, not [batch, 1, channels]"
    return None
