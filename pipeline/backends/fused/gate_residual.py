"""residual + gate * linear -> the linear's own epilogue."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export.dialect.graph import (
    add_initializer,
    constant,
    drop_unused,
    has_role,
    inputs_of,
    is_op,
    other_input,
    read_by,
    result_of,
)
from pipeline.backends.fused.ops import DOMAIN, fused_inputs, fused_node, fused_outputs
from pipeline.passes.rewrite import RewritePass


class FuseGateResidual(RewritePass):
    """Add(residual, Mul(gate, Gemm)) -> GemmGateResidual, and Add(residual, Gemm) with a gate of ones.

    The linear's result may have no other reader; what lies between keeps nothing that others read. A multiplication
    or division by one in between is dropped.
    """

    def rewrite(self, model: ir.Model) -> None:
        _drop_ones(model)
        for node in list(model.graph):
            if is_op(node, "Gemm", DOMAIN):
                self._try(model.graph, node)
        if self.fired:
            model.graph.sort()
            drop_unused(model)

    def _try(self, graph: ir.Graph, gemm: ir.Node) -> None:
        linear = fused_outputs(gemm).y
        gated = read_by(linear, "Mul")
        gate, product = (other_input(gated, linear), result_of(gated)) if gated else (None, linear)
        add = read_by(product, "Add")
        if add is None or has_role(add, "add_low_rank"):
            return
        residual = other_input(add, product)
        if reason := _unfit(linear, gate, residual):
            self.refuse(gemm.name, reason)
            return
        gate = gate if gate is not None else _ones(graph, linear)
        attributes = {key: item.value for key, item in gemm.attributes.items()}
        inputs = fused_inputs(gemm).by_name() | {"gate": gate, "residual": residual}
        fused = fused_node("GemmGateResidual", inputs, str(gemm.name), gemm, **attributes)
        graph.insert_before(add, fused)
        ports = fused_outputs(fused)
        for old, new in ((fused_outputs(gemm).sums, ports.sums), (linear, ports.linear), (result_of(add), ports.y)):
            new.name, new.shape = old.name, old.shape
        ir.convenience.replace_all_uses_with(result_of(add), ports.y, replace_graph_outputs=True)
        for node in (add, gated, gemm):
            if node is not None:
                graph.remove(node, safe=True)
        self.fired += 1


def _unfit(linear: ir.Value, gate: ir.Value | None, residual: ir.Value) -> str | None:
    """Why an epilogue cannot do it, None if it can."""
    if linear.shape is None or linear.shape.rank() != 3:
        return f"{linear.name} has shape {linear.shape}, not [batch, tokens, channels]"
    if not isinstance(linear.shape[2], int):
        return f"{linear.name} has an unknown number of channels"
    if residual.shape is None or residual.shape != linear.shape:
        return f"{residual.name} has shape {residual.shape}, not that of {linear.name}"
    if gate is not None and (gate.shape is None or gate.shape.rank() != 3 or gate.shape[1] != 1):
        return f"gate {gate.name} has shape {gate.shape}, not [batch, 1, channels]"
    return None


def _ones(graph: ir.Graph, linear: ir.Value) -> ir.Value:
    """A gate that changes nothing, [1, 1, N]."""
    size = linear.shape[2] if linear.shape is not None else None
    assert isinstance(size, int)
    name = f"no_gate/{size}"
    if name in graph.initializers:
        return graph.initializers[name]
    return add_initializer(graph, ir.tensor(np.ones([1, 1, size], np.float32), name=name))


def _drop_ones(model: ir.Model) -> None:
    """x / 1 and x * 1 with a scalar one -> x."""
    for node in list(model.graph):
        if not (is_op(node, "Div") or is_op(node, "Mul")) or result_of(node).is_graph_output():
            continue
        factor = constant(inputs_of(node).B)
        if factor is not None and factor.ndim == 0 and factor == 1:
            ir.convenience.replace_all_uses_with(result_of(node), inputs_of(node).A)
            model.graph.remove(node, safe=True)
