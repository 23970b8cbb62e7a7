"""Put quantized linears into a graph: each placeholder node becomes quantize, dequantize, MatMul and bias.

In front of the quantizer may stand a factor and an offset per input channel, behind the bias a low-rank branch. Every
layer has its own nodes and tensors here, so that it can be read back; passes merge what is equal.

A placeholder is a node `fpq.QuantizedLinear(x)` with the layer's name as attribute, left by the exporter where the
module had a linear; its weight never enters the graph as floats.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.checkpoint import QuantizedLinear, shared_router
from export.dialect.graph import KIND_KEY, LAYER_KEY, LayerBuilder
from export.dialect.ops import DOMAIN, OPS, VERSION, no_multipliers
from export.errors import ContractError
from export.formats.format import pack
from export.formats.operands import exact_multipliers
from export.low_rank_graph import add_low_rank, add_router

__all__ = [
    "GRANULARITY_KEY",
    "KIND_KEY",
    "LAYER_KEY",
    "PLACEHOLDER",
    "QUANTIZERS",
    "multiplier_table",
    "quantize_graph",
]

PLACEHOLDER = "QuantizedLinear"
GRANULARITY_KEY = "fpq.granularity"
# Activation scaling -> its quantizer and the inverse.
QUANTIZERS = {
    "per_token": ("QuantizeActivation", "DequantizeActivation"),
    "per_tensor": ("QuantizeStatic", "DequantizeStatic"),
    "token_group": ("QuantizeGroups", "DequantizeGroups"),
}


def quantize_graph(model: ir.Model, layers: list[QuantizedLinear]) -> None:
    """Replace every placeholder by its layer, in place, and give the model the functions it then uses.

    Raises ContractError naming a layer without a placeholder, or a placeholder without a layer.
    """
    nodes = {str(node.attributes["layer"].value): node for node in model.graph if _is_placeholder(node)}
    by_name = {layer.name: layer for layer in layers}
    _check_coverage(nodes, by_name)
    router = shared_router(layers)
    branch = None if router is None else add_router(model.graph, router)
    for name, node in nodes.items():
        _replace(model.graph, node, by_name[name], branch)
    used = {layer.activation_scaling for layer in layers}
    for op in (*(op for scaling, pair in QUANTIZERS.items() if scaling in used for op in pair), "DequantizeWeight"):
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


def _replace(graph: ir.Graph, node: ir.Node, layer: QuantizedLinear, branch: ir.Value | None) -> None:
    """x [-> Mul -> Add] -> quantize -> dequantize -> MatMul(., DequantizeWeight) -> Add bias [-> Add low-rank]."""
    build = LayerBuilder(graph, node, layer)
    x, output = node.inputs[0], node.outputs[0]
    assert x is not None
    value = _rounded(build, _balanced(build, x))
    weight = _weight(build)
    result = build.plain("matmul", "MatMul", value, weight)
    if layer.bias is not None:
        result.shape = output.shape
        result = build.plain("bias", "Add", result, build.constant("bias", layer.bias))
    if branch is not None and layer.router is not None:
        result.shape = output.shape
        result = build.plain("add_low_rank", "Add", result, add_low_rank(build, x, branch))
    result.name, result.shape, result.type = f"{layer.name}/output", output.shape, output.type
    ir.convenience.replace_all_uses_with(output, result)
    graph.remove(node, safe=True)


def _balanced(build: LayerBuilder, x: ir.Value) -> ir.Value:
    """x * input_multiplier + input_offset, where the layer has them."""
    for role, op, key in (("multiply", "Mul", "input_multiplier"), ("offset", "Add", "input_offset")):
        array, shape = getattr(build.layer, key), x.shape
        if array is not None:
            x = build.plain(role, op, x, build.constant(key, array))
            x.shape = shape
    return x


def _rounded(build: LayerBuilder, x: ir.Value) -> ir.Value:
    """x -> quantize -> dequantize."""
    layer = build.layer
    choices: dict[str, Any] = {"format": layer.activation_format}
    constants = []
    if layer.activation_scaling == "token_group":
        choices |= {"in_features": layer.in_features, "group_size": layer.activation_group}
    if layer.activation_scale is not None:
        zero = np.zeros(1, np.float32) if layer.activation_zero is None else layer.activation_zero
        arrays = {"activation_scale": layer.activation_scale, "activation_zero": zero}
        constants = [build.constant(key, array) for key, array in arrays.items()]
    quantizer, inverse = QUANTIZERS[layer.activation_scaling]
    codes, *scale = build.fpq("quantize", quantizer, x, *constants, **choices)
    (value,) = build.fpq("dequantize", inverse, codes, *scale, *constants, **choices)
    codes.shape = value.shape = x.shape
    for item in scale:
        item.shape = None if x.shape is None else ir.Shape([*x.shape[:-1], layer.activation_groups])
    return value


def _weight(build: LayerBuilder) -> ir.Value:
    """DequantizeWeight of the stored codes, [K, N]."""
    layer, table = build.layer, multiplier_table(build.layer)
    group_size = 0 if layer.granularity == "per_channel" else layer.group_size
    multipliers = _multiplier_codes(layer, table, group_size)
    arrays: dict[str, NDArray[Any]] = {"codes": layer.codes, "scales": layer.scales, "multipliers": multipliers}
    stored = [build.constant(key, array) for key, array in arrays.items()]
    choices = {"in_features": layer.in_features, "group_size": group_size, "multipliers": table}
    (weight,) = build.fpq("weight", "DequantizeWeight", *stored, format=layer.weight_format, **choices)
    node = weight.producer()
    assert node is not None
    node.metadata_props[GRANULARITY_KEY] = layer.granularity
    weight.shape = ir.Shape([layer.in_features, layer.out_features])
    return weight


def _multiplier_codes(layer: QuantizedLinear, table: tuple[int, ...], group_size: int) -> NDArray[np.uint8]:
    """4-bit indices into the table, packed two in a byte; one row of zeros where there are no multipliers."""
    if layer.multipliers is None:
        return no_multipliers(layer.in_features, group_size)
    return pack(np.searchsorted(table, layer.multipliers).astype(np.uint8), 4)


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
