"""Builds standard ONNX nodes in front of an anchor node, with deterministic names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

MICROSOFT = "com.microsoft"
RESULT_TYPES = {
    "QuantizeLinear": ir.DataType.UINT8,
    "DequantizeLinear": ir.DataType.FLOAT,
    "MatMulInteger": ir.DataType.INT32,
    "MatMulIntegerToFloat": ir.DataType.FLOAT,
    "Shape": ir.DataType.INT64,
}


class Emitter:
    """Inserts nodes before `anchor`. Nodes and their outputs are called `prefix/name`."""

    def __init__(self, graph: ir.Graph, anchor: ir.Node, prefix: str, metadata: dict[str, str] | None = None) -> None:
        self.graph, self.anchor, self.prefix = graph, anchor, prefix
        self.metadata = metadata or {}

    def op(self, op_type: str, *inputs: ir.Value | None, name: str, domain: str = "", **attributes: Any) -> ir.Value:
        """Append a node with one output and return that output."""
        full = f"{self.prefix}/{name}"
        attrs = ir.convenience.convert_attributes(attributes)
        node = ir.Node(domain, op_type, inputs, attrs, name=full, metadata_props=dict(self.metadata))
        node.outputs[0].name, node.outputs[0].type = full, _result_type(node)
        self.graph.insert_before(self.anchor, node)
        return node.outputs[0]

    def constant(self, number: Any, dtype: Any = np.float32) -> ir.Value:
        """A small constant (scalar or list), one initializer per value and type in the graph."""
        array = np.asarray(number, dtype)
        name = f"constant/{array.dtype.name}/" + "_".join(repr(v) for v in array.reshape(-1).tolist())
        name += "" if array.ndim == 0 else f"/{'x'.join(map(str, array.shape))}"
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        return initializer(self.graph, ir.tensor(array, name=name))

    def lazy(self, name: str, dtype: ir.DataType, shape: tuple[int, ...], make: Callable[[], NDArray[Any]]) -> ir.Value:
        """An initializer whose array is computed when the model is written, and dropped afterwards."""
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        tensor = ir.LazyTensor(lambda: ir.tensor(make(), name=name), dtype, ir.Shape(shape), name=name)
        return initializer(self.graph, tensor)


def _result_type(node: ir.Node) -> ir.TypeProtocol | None:
    """Type of a node's output: by op, by its `to`, else that of its first input (elementwise and shape ops)."""
    if node.op_type == "Cast":
        return ir.TensorType(ir.DataType(node.attributes["to"].as_int()))
    if node.op_type in RESULT_TYPES:
        return ir.TensorType(RESULT_TYPES[node.op_type])
    return next((value.type for value in node.inputs if value is not None), None)


def initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Register `tensor` as initializer of `graph` under its name."""
    shape = ir.Shape(tensor.shape)  # type: ignore[arg-type]
    value = ir.Value(name=tensor.name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
