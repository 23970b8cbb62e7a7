"""Put quantized linears into a graph: each placeholder node becomes quantize, dequantize, MatMul and bias.

A placeholder is a node `fpq.QuantizedLinear(x)` with the layer's name as attribute, left by the exporter where the
module had a linear; its weight never enters the graph as floats.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.checkpoint import QuantizedLinear
from export.embedding import exact_multipliers
from export.errors import ContractError
from export.formats import pack
from export.ops import DOMAIN, OPS, VERSION, attributes, no_multipliers

PLACEHOLDER = "QuantizedLinear"
LAYER_KEY, KIND_KEY, GRANULARITY_KEY = "fpq.layer", "fpq.kind", "fpq.granularity"
USED_OPS = ("QuantizeActivation", "DequantizeActivation", "DequantizeWeight")


def quantize_graph(model: ir.Model, layers: list[QuantizedLinear]) -> None:
    """Replace every placeholder by its layer, in place, and give the model the functions it then uses.

    Raises ContractError naming a layer without a placeholder, or a placeholder without a layer.
    """
    nodes = {str(node.attributes["layer"].value): node for node in model.graph if _is_placeholder(node)}
    by_name = {layer.name: layer for layer in layers}
    _check_coverage(nodes, by_name)
    for name, node in nodes.items():
        _replace(model.graph, node, by_name[name])
    for op in USED_OPS:
        function = ir.serde.deserialize_function(OPS[op].function())
        model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = VERSION


def _is_placeholder(node: ir.Node) -> bool:
    return node.domain == DOMAIN and node.op_type == PLACEHOLDER


def _check_coverage(nodes: dict[str, ir.Node], by_name: dict[str, QuantizedLinear]) -> None:
    if not nodes:
        raise ContractError(
            "the exported graph has no linear to quantize; check the family's table of quantized linears"
        )
    for name in sorted(set(nodes) - set(by_name)):
        raise ContractError(f"{name}: the graph has this linear but the checkpoint does not; calibrate again")
    for name in sorted(set(by_name) - set(nodes)):
        raise ContractError(f"{name}: quantized, but no node of the graph uses it; does the model skip this layer?")


def _replace(graph: ir.Graph, node: ir.Node, layer: QuantizedLinear) -> None:
    """x -> QuantizeActivation -> DequantizeActivation -> MatMul(., DequantizeWeight) -> Add bias."""
    build = _Builder(graph, node, layer)
    x, output = node.inputs[0], node.outputs[0]
    assert x is not None
    activation = attributes("QuantizeActivation", format=layer.activation_format)
    codes, scale = build.node("quantize", "QuantizeActivation", [x], activation, outputs=2)
    decode = attributes("DequantizeActivation", format=layer.activation_format)
    (value,) = build.node("dequantize", "DequantizeActivation", [codes, scale], decode)
    (weight,) = build.node("weight", "DequantizeWeight", build.weight_inputs(), build.weight_attributes())
    (result,) = build.node("matmul", "MatMul", [value, weight], domain="")
    result.shape = output.shape
    if layer.bias is not None:
        (result,) = build.node("bias", "Add", [result, build.constant("bias", layer.bias)], domain="")
    result.name, result.shape, result.type = f"{layer.name}/output", output.shape, output.type
    codes.shape = value.shape = x.shape
    scale.shape = None if x.shape is None else ir.Shape([*x.shape[:-1], 1])
    weight.shape = ir.Shape([layer.in_features, layer.out_features])
    ir.convenience.replace_all_uses_with(output, result)
    graph.remove(node, safe=True)


class _Builder:
    """Inserts the nodes and initializers of one layer before its placeholder."""

    def __init__(self, graph: ir.Graph, before: ir.Node, layer: QuantizedLinear) -> None:
        self.graph, self.before, self.layer = graph, before, layer
        self.multipliers = multiplier_table(layer)
        self.metadata = {LAYER_KEY: layer.name, KIND_KEY: layer.kind}

    def node(
        self,
        role: str,
        op: str,
        inputs: list[ir.Value],
        choices: dict | None = None,
        domain: str = DOMAIN,
        outputs: int = 1,
    ) -> list[ir.Value]:
        """Insert a node named "layer/role"; its outputs are named after it."""
        name = f"{self.layer.name}/{role}"
        found = ir.convenience.convert_attributes(choices or {})
        made = ir.Node(domain, op, inputs, found, num_outputs=outputs, name=name, metadata_props=dict(self.metadata))
        if role == "weight":
            made.metadata_props[GRANULARITY_KEY] = self.layer.granularity
        types = [ir.DataType.UINT8, ir.DataType.FLOAT] if outputs == 2 else [ir.DataType.FLOAT]
        for value, suffix, kind in zip(made.outputs, ("", "/scale"), types, strict=False):
            value.name, value.type = name + suffix, ir.TensorType(kind)
        self.graph.insert_before(self.before, made)
        return list(made.outputs)

    def constant(self, key: str, array: NDArray) -> ir.Value:
        """Register the initializer "layer.key"."""
        return add_initializer(self.graph, ir.tensor(np.ascontiguousarray(array), name=f"{self.layer.name}.{key}"))

    def weight_inputs(self) -> list[ir.Value]:
        arrays: dict[str, NDArray] = {
            "codes": self.layer.codes,
            "scales": self.layer.scales,
            "multipliers": self._multiplier_codes(),
        }
        return [self.constant(key, array) for key, array in arrays.items()]

    def _multiplier_codes(self) -> NDArray[np.uint8]:
        """4-bit indices into the table, packed two in a byte; one row of zeros where there are no multipliers."""
        if self.layer.multipliers is None:
            return no_multipliers(self.layer.in_features, self._group_size)
        return pack(np.searchsorted(self.multipliers, self.layer.multipliers).astype(np.uint8), 4)

    @property
    def _group_size(self) -> int:
        return 0 if self.layer.granularity == "per_channel" else self.layer.group_size

    def weight_attributes(self) -> dict:
        layer, table = self.layer, self.multipliers
        grouping = {"in_features": layer.in_features, "group_size": self._group_size, "multipliers": table}
        return attributes("DequantizeWeight", format=layer.weight_format, **grouping)


def multiplier_table(layer: QuantizedLinear) -> tuple[int, ...]:
    """The sorted table that a layer's 4-bit indices refer to: the format's own where it suffices, else what is used."""
    if layer.multipliers is None:
        return (1,)
    used = tuple(int(m) for m in np.unique(layer.multipliers))
    own = exact_multipliers(layer.weight_format)
    if set(used) <= set(own) and len(own) <= 16:
        return own
    if len(used) > 16:
        raise ContractError(f"{layer.name}: {len(used)} different group multipliers; a 4-bit index reaches 16")
    return used


def add_initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Register `tensor` under its name as an initializer of the graph."""
    kind = ir.TensorType(tensor.dtype)
    value = ir.Value(name=tensor.name, shape=ir.Shape(list(tensor.shape.numpy())), type=kind, const_value=tensor)
    graph.register_initializer(value)
    return value
