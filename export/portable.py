"""Read the quantized layers back from a portable model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.checkpoint import QuantizedLinear
from export.errors import ContractError
from export.formats import unpack
from export.ops import DOMAIN
from export.quantize_graph import GRANULARITY_KEY, KIND_KEY, LAYER_KEY


def read_layers(path: Path) -> list[QuantizedLinear]:
    """Every quantized linear of a portable model, in graph order, equal to what was exported.

    Raises ContractError if a layer lacks one of its nodes or tensors.
    """
    model = ir.load(path)
    nodes: dict[str, dict[str, ir.Node]] = {}
    for node in model.graph:
        if layer := node.metadata_props.get(LAYER_KEY):
            nodes.setdefault(layer, {})[(node.name or "").removeprefix(f"{layer}/")] = node
    if not nodes:
        raise ContractError(f"{path}: no quantized linear in it; it is not a portable model, or one lowered already")
    return [_read_layer(path, layer, roles) for layer, roles in nodes.items()]


def _read_layer(path: Path, layer: str, nodes: dict[str, ir.Node]) -> QuantizedLinear:
    missing = {"quantize", "weight", "matmul"} - set(nodes)
    if missing:
        raise ContractError(f"{path}: layer {layer} has no node {layer}/{min(missing)}; export the model again")
    weight, bias = nodes["weight"], nodes.get("bias")
    codes, scales, multiplier_codes = (_array(path, weight, index) for index in range(3))
    granularity: Any = weight.metadata_props[GRANULARITY_KEY]
    found = {name: weight.attributes[name].value for name in ("format", "in_features", "group_size", "multipliers")}
    multipliers = None
    if granularity == "exact_group":
        groups = found["in_features"] // found["group_size"]
        multipliers = np.asarray(found["multipliers"], np.uint8)[unpack(multiplier_codes, 4, groups)]
    return QuantizedLinear(
        name=layer,
        kind=weight.metadata_props[KIND_KEY],
        in_features=found["in_features"],
        weight_format=found["format"],
        activation_format=nodes["quantize"].attributes["format"].value,
        granularity=granularity,
        group_size=found["group_size"],
        codes=codes,
        scales=scales,
        multipliers=multipliers,
        bias=None if bias is None else _array(path, bias, 1),
    )


def _array(path: Path, node: ir.Node, index: int) -> NDArray[Any]:
    value = node.inputs[index]
    if value is None or value.const_value is None or node.domain not in ("", DOMAIN):
        raise ContractError(f"{path}: input {index} of {node.name} is not a stored tensor; export the model again")
    return value.const_value.numpy()
