"""Adds nodes and stored tensors to a graph under the names by which they are found again."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.checkpoint import QuantizedLinear
from export.dialect.ops import DOMAIN, OPS, attributes

LAYER_KEY, KIND_KEY = "fpq.layer", "fpq.kind"
FLOAT = ir.TensorType(ir.DataType.FLOAT)


class GraphBuilder:
    """Inserts nodes "prefix/role", whose outputs have that name, before a node; and initializers "prefix.key"."""

    def __init__(self, graph: ir.Graph, before: ir.Node, prefix: str, metadata: dict[str, str] | None = None) -> None:
        self.graph, self.before, self.prefix, self.metadata = graph, before, prefix, metadata or {}

    def plain(self, role: str, op: str, *inputs: ir.Value, kind: Any = FLOAT, **choices: Any) -> ir.Value:
        """A standard op with one output of type `kind`."""
        return self._insert(role, "", op, inputs, choices, [kind])[0]

    def fpq(self, role: str, op: str, *inputs: ir.Value, **choices: Any) -> list[ir.Value]:
        """An op of the dialect; further outputs are called "prefix/role/scale"."""
        kinds = [ir.TensorType(ir.DataType(kind)) for kind in OPS[op].outputs.values()]
        return self._insert(role, DOMAIN, op, inputs, attributes(op, **choices), kinds)

    def _insert(
        self, role: str, domain: str, op: str, inputs: tuple[ir.Value, ...], choices: dict[str, Any], kinds: list[Any]
    ) -> list[ir.Value]:
        name, found = f"{self.prefix}/{role}", ir.convenience.convert_attributes(choices)
        made = ir.Node(domain, op, inputs, found, num_outputs=len(kinds), name=name, metadata_props=dict(self.metadata))
        for value, suffix, kind in zip(made.outputs, ("", "/scale"), kinds, strict=False):
            value.name, value.type = name + suffix, kind
        self.graph.insert_before(self.before, made)
        return list(made.outputs)

    def constant(self, key: str, array: NDArray[Any]) -> ir.Value:
        """Register the initializer "prefix.key"."""
        return add_initializer(self.graph, ir.tensor(np.ascontiguousarray(array), name=f"{self.prefix}.{key}"))


class LayerBuilder(GraphBuilder):
    """Builds one quantized linear; its nodes say in their metadata to which layer they belong."""

    def __init__(self, graph: ir.Graph, before: ir.Node, layer: QuantizedLinear) -> None:
        super().__init__(graph, before, layer.name, {LAYER_KEY: layer.name, KIND_KEY: layer.kind})
        self.layer = layer


def add_initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Register `tensor` under its name as an initializer of the graph."""
    kind = ir.TensorType(tensor.dtype)
    value = ir.Value(name=tensor.name, shape=ir.Shape(list(tensor.shape.numpy())), type=kind, const_value=tensor)
    graph.register_initializer(value)
    return value
