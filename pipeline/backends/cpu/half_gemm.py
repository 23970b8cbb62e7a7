"""Linears whose weight the model stores in float16 -> the op HalfGemm of domain `fpq.native` (plugins/cpu/half_gemm.h:
what it computes). The weight stays float16 in memory, where a session would keep it in float32, packed, beside it."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.dialect.graph import (
    add_initializer,
    attribute,
    drop_unused,
    inputs_of,
    is_op,
    lazy_tensor,
    name_of,
    new_node,
    only_reader,
    produced_by,
    replace,
    result_of,
)
from pipeline.backends.cpu.token_chain import VERSION
from pipeline.passes.rewrite import RewritePass
from plugins.cpu.library import DOMAIN

OP, PANEL = "HalfGemm", 16  # channels of a panel: HALF_PANEL in plugins/cpu/half_gemm.h
HALF = ir.DataType.FLOAT16


class HalfGemms(RewritePass):
    """MatMul(x, Cast(w)) and Gemm(x, Cast(w), bias) -> HalfGemm(x, panels of w, bias), for a stored float16 w."""

    def rewrite(self, model: ir.Model) -> None:
        for node in list(model.graph):
            if is_op(node, "MatMul") or is_op(node, "Gemm"):
                self._try(model.graph, node)
        if self.fired:
            model.opset_imports[DOMAIN] = VERSION
            drop_unused(model)

    def _try(self, graph: ir.Graph, node: ir.Node) -> None:
        ports = inputs_of(node)
        x, w, bias = (ports.A, ports.B, None) if node.op_type == "MatMul" else (ports.A, ports.B, ports.get("C"))
        cast = produced_by(w, "Cast")
        stored = inputs_of(cast).input.const_value if cast is not None else None
        if cast is None or stored is None or stored.dtype != HALF or len(stored.shape) != 2:
            return
        if why := _misfit(node, result_of(cast), bias):
            self.refuse(name_of(node), why)
            return
        by_output = attribute(node, "transB", 0) == 1
        sizes = stored.shape.numpy()
        n, k = sizes if by_output else sizes[::-1]
        shape = (-(-n // PANEL), k, PANEL)
        panels = lazy_tensor(f"{stored.name}/panels", HALF, shape, partial(half_panels, stored, by_output))
        inputs = [x, add_initializer(graph, panels), bias]
        replace(graph, node, new_node(DOMAIN, OP, inputs, name_of(node), {"channels": n}, 1, node.metadata_props))
        self.fired += 1


def _misfit(node: ir.Node, weight: ir.Value, bias: ir.Value | None) -> str | None:
    """Why a linear is none that the op computes, None if it is."""
    if only_reader(weight) is None:
        return f"{weight.name} has another reader"
    if node.op_type == "MatMul":
        return None
    if attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1 or attribute(node, "beta", 1.0) != 1:
        return "it is more than x w + bias"
    if bias is not None and (bias.shape is None or bias.shape.rank() != 1):
        return f"its bias {bias.name} is not a number for each channel"
    return None


def half_panels(tensor: ir.TensorProtocol, by_output: bool) -> NDArray[np.float16]:
    """[panels, K, 16] of a weight [N, K] (by_output) or [K, N], filled up with 0."""
    rows = tensor.numpy() if by_output else tensor.numpy().T
    rows = np.pad(rows, ((0, -len(rows) % PANEL), (0, 0)))
    return np.ascontiguousarray(rows.reshape(-1, PANEL, rows.shape[1]).transpose(0, 2, 1))
