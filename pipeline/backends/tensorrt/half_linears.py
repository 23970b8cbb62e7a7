"""Large unquantized linears of the `rtx` target as FP16 GEMMs, so that the engine keeps their weights in 16 bits.

The portable model stores them as FP16 with a cast, and the builder would expand that into float32 constants: twice the
memory, and for models with an adaLN projection in each block most of the engine. Input and product are rounded once,
the bias is added in float32.
"""

from __future__ import annotations

import onnx_ir as ir

from pipeline.backends.tensorrt.half import FP16, emit_half, widen
from pipeline.passes.emit import Emitter

# Smaller weights stay float32: they are a negligible share of an engine.
LARGE_ELEMENTS = 2**20


def halve_large_linears(model: ir.Model) -> list[str]:
    """Convert in place; names of the converted nodes. A weight that is stored as float32 did not fit FP16 and stays."""
    linears = [node for node in model.graph if node.op_type in ("Gemm", "MatMul") and _is_plain(node)]
    found = [(node, half) for node in linears if (half := _half_weight(model.graph, node)) is not None]
    for node, half in found:
        _halve(model.graph, node, half)
    return [str(node.name) for node, _ in found]


def _is_plain(node: ir.Node) -> bool:
    """True unless a Gemm scales its product or its bias."""
    factors = [node.attributes[name].as_float() for name in ("alpha", "beta") if name in node.attributes]
    return all(factor == 1 for factor in factors) and not node.outputs[0].is_graph_output()


def _half_weight(graph: ir.Graph, node: ir.Node) -> ir.Value | None:
    """The large FP16 initializer behind the node's weight, transposed again where the graph transposes it; or None."""
    weight, transpose = node.inputs[1], None
    if weight is not None and (producer := weight.producer()) is not None and producer.op_type == "Transpose":
        weight, transpose = producer.inputs[0], producer
    cast = weight.producer() if weight is not None else None
    stored = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else None
    if stored is None or stored.const_value is None or stored.dtype != FP16:
        return None
    if stored.const_value.size < LARGE_ELEMENTS:
        return None
    if transpose is None:
        return stored
    emit = Emitter(graph, node, f"{node.name}/half")
    permutation = list(transpose.attributes["perm"].as_ints())
    return emit.op("Transpose", stored, name="transposed", perm=permutation)


def _halve(graph: ir.Graph, node: ir.Node, weight: ir.Value) -> None:
    emit = Emitter(graph, node, f"{node.name}/half")
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    node.replace_input_with(0, emit_half(emit, node.inputs[0], "operand"))
    node.replace_input_with(1, weight)
    if bias is None:
        widen(graph, node)
        return
    node.resize_inputs(2)
    widen(graph, node, lambda after, wide: after.op("Add", wide, bias, name="bias"))
