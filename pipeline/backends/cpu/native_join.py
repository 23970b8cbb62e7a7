"""Chains that meet -> one: a norm and the quantizer that reads it, a finished linear and the norm or quantizer next."""

from __future__ import annotations

import onnx_ir as ir

from pipeline.backends.cpu.token_chain import (
    In,
    Out,
    inputs_of,
    is_chain,
    misfit,
    number,
    outputs_of,
    put_chain,
    stages,
    value_in,
    value_out,
)
from pipeline.passes.graph import attribute, drop_unused, only_reader, other_input, produced_by
from pipeline.passes.rewrite import RewritePass


class NativeJoin(RewritePass):
    """TokenChain(LayerNormalization(x)) -> TokenChain(x); TokenChain(y of a TokenChain) -> one TokenChain.

    What others read, or a parity gate looks at, stays an output.
    """

    def rewrite(self, model: ir.Model) -> None:
        for step in (self._take_norm, self._join):
            for node in [node for node in model.graph if _quantizes(node)]:
                step(model.graph, node)
        model.graph.sort()
        drop_unused(model)

    def _take_norm(self, graph: ir.Graph, quantizer: ir.Node) -> None:
        x = value_in(quantizer, In.X)
        norm = produced_by(x, "LayerNormalization")
        if norm is None or x is None:
            return
        if reason := _unfit(norm, quantizer):
            self.refuse(norm.name, reason)
            return
        source, scale, shift = norm.inputs
        assert source is not None and scale is not None and shift is not None
        inputs = {In.X: source, In.NORM_SCALE: scale, In.NORM_SHIFT: shift}
        epsilon = float(attribute(norm, "epsilon", 1e-5))
        outputs = outputs_of(quantizer) | {Out.QUANTIZED: x}
        put_chain(graph, quantizer, inputs, outputs, epsilon=epsilon, **stages(quantizer))
        graph.remove(quantizer, safe=True)
        self.fired += 1

    def _join(self, graph: ir.Graph, quantizer: ir.Node) -> None:
        x = value_in(quantizer, In.X)
        first = x.producer() if x is not None else None
        if first is None or x is None or not is_chain(first) or value_out(first, Out.CODES) is not None:
            return
        rest = {place: value for place, value in inputs_of(quantizer).items() if place is not In.X}
        if _depend_on(list(rest.values()), first):
            self.refuse(quantizer.name, f"its norm depends on {first.name}")
            return
        given = stages(first) | stages(quantizer)
        outputs = outputs_of(quantizer) | outputs_of(first)
        put_chain(graph, quantizer, inputs_of(first) | rest, outputs, **given)
        for node in (quantizer, first):
            graph.remove(node, safe=True)
        self.fired += 1


def _quantizes(node: ir.Node) -> bool:
    return is_chain(node) and value_out(node, Out.CODES) is not None


def _unfit(norm: ir.Node, quantizer: ir.Node) -> str:
    """Why a chain cannot take `norm` in, '' if it can."""
    x, rank = norm.inputs[0], norm.inputs[0].shape.rank() if norm.inputs[0] and norm.inputs[0].shape else 3
    if only_reader(norm.outputs[0]) is not quantizer:
        return f"{norm.outputs[0].name} has another reader than {quantizer.name}"
    if attribute(norm, "axis", -1) not in (-1, rank - 1):
        return f"it normalizes over axis {attribute(norm, 'axis')}, not the last one"
    if len(norm.inputs) < 3 or norm.inputs[2] is None:
        return "it has no shift"
    return next((reason for value in norm.inputs[1:3] if (reason := _not_a_row(value, x))), "")


def _not_a_row(value: ir.Value | None, x: ir.Value | None) -> str:
    """Why `value` is not [channels] or [batch, 1, channels], '' if it is."""
    if (add := produced_by(value, "Add")) and value is not None and value.shape is None:
        one = next((one for one in add.inputs if number(one) is not None), None)
        value = other_input(add, one) if one is not None else value  # 1 + scale
    return misfit(value, x) if value is not None else "it has no scale or shift"


def _depend_on(values: list[ir.Value], node: ir.Node) -> bool:
    """Is any of `values` computed from an output of `node`?"""
    seen: set[ir.Node] = set()
    todo = [value.producer() for value in values]
    while todo:
        found = todo.pop()
        if found is node:
            return True
        if found is not None and found not in seen:
            seen.add(found)
            todo += [value.producer() for value in found.inputs if value is not None]
    return False
