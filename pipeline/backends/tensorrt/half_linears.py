"""Large unquantized linears of the `rtx` target as FP16 GEMMs, so that the engine keeps their weights in 16 bits.

The portable model stores them as FP16 with a cast, and the builder would expand that into float32 constants: twice the
memory, and for models with an adaLN projection in each block most of the engine. Input and product are rounded once,
the bias is added in float32.
"""

from __future__ import annotations

import onnx_ir as ir

from export.dialect.graph import GraphBuilder, attribute, inputs_of, is_op, produced_by, result_of
from pipeline.backends.tensorrt.half import FP16, emit_half, widen

# Smaller weights stay float32: they are a negligible share of an engine.
LARGE_ELEMENTS = 2**20


def halve_large_linears(model: ir.Model) -> list[str]:
    """Convert in place; names of the converted nodes. A weight that is stored as float32 did not fit FP16 and stays."""
    linears = [node for node in model.graph if (is_op(node, "Gemm") or is_op(node, "MatMul")) and _is_plain(node)]
    found = [(node, half) for node in linears if (half := _half_weight(model.graph, node)) is not None]
    for node, half in found:
        _halve(model.graph, node, half)
    return [str(node.name) for node, _ in found]


def _is_plain(node: ir.Node) -> bool:
    """True unless a Gemm scales its product or its bias."""
    factors = [node.attributes[name].as_float() for name in ("alpha", "beta") if name in node.attributes]
    return all(factor == 1 for factor in factors) and not result_of(node).is_graph_output()


def _half_weight(graph: ir.Graph, node: ir.Node) -> ir.Value | None:
    """The large FP16 initializer behind the node's weight, transposed again where the graph transposes it; or None."""
    weight = inputs_of(node).B
    transpose = produced_by(weight, "Transpose")
    cast = produced_by(inputs_of(transpose).data if transpose else weight, "Cast")
    stored = inputs_of(cast).input if cast else None
    if stored is None or stored.const_value is None or stored.dtype != FP16:
        return None
    if stored.const_value.size < LARGE_ELEMENTS:
        return None
    if transpose is None:
        return stored
    build = GraphBuilder(graph, node, f"{node.name}/half")
    return build.op("Transpose", stored, name="transposed", perm=list(attribute(transpose, "perm")))


def _halve(graph: ir.Graph, node: ir.Node, weight: ir.Value) -> None:
    build = GraphBuilder(graph, node, f"{node.name}/half")
    ports = inputs_of(node)
    bias = ports.get("C") if node.op_type == "Gemm" else None
    ports.set("A", emit_half(build, ports.A, "operand"))
    ports.set("B", weight)
    if bias is None:
        widen(graph, node)
        return
    node.resize_inputs(2)
    widen(graph, node, lambda after, wide: after.op("Add", wide, bias, name="bias"))
