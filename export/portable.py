"""Read the quantized layers back from a portable model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.checkpoint import ActivationScaling, Granularity, QuantizedLinear, router_of
from export.dialect.graph import BALANCE, KIND_KEY, LAYER_KEY, inputs_of
from export.dialect.ops import DOMAIN
from export.errors import ContractError
from export.formats.format import get_format, unpack
from export.onnx_files import load_model, reading
from export.quantize_graph import GRANULARITY_KEY, QUANTIZER_OF, ROUTER
from export.router import ARRAYS as ROUTER_ARRAYS
from export.router import Router

F32 = NDArray[np.float32]


def read_layers(path: Path) -> list[QuantizedLinear]:
    """Every quantized linear of a portable model, in graph order, equal to what was exported.

    Raises ContractError if a layer lacks one of its nodes or tensors.
    """
    model = load_model(path)
    with reading(path):
        nodes: dict[str, dict[str, ir.Node]] = {}
        for node in model.graph:
            if layer := node.metadata_props.get(LAYER_KEY):
                nodes.setdefault(layer, {})[(node.name or "").removeprefix(f"{layer}/")] = node
        if not nodes:
            raise ContractError(
                f"{path}: no quantized linear in it; it is not a portable model, or one lowered already"
            )
        router = _read_router(path, model)
        return [_read_layer(path, layer, roles, router) for layer, roles in nodes.items()]


def _read_layer(path: Path, layer: str, nodes: dict[str, ir.Node], router: Router | None) -> QuantizedLinear:
    missing = {"quantize", "weight", "matmul"} - set(nodes)
    if missing:
        raise ContractError(f"{path}: layer {layer} has no node {layer}/{min(missing)}; export the model again")
    weight, bias = nodes["weight"], nodes.get("bias")
    granularity = cast(Granularity, weight.metadata_props[GRANULARITY_KEY])  # the layer refuses any other
    in_features, group_size = (weight.attributes[name].as_int() for name in ("in_features", "group_size"))
    around = _around(path, nodes)
    multipliers = None
    if granularity == "exact_group":
        table = np.asarray(weight.attributes["multipliers"].as_ints(), np.uint8)
        multipliers = table[unpack(_array(path, weight, "multiplier_codes"), 4, in_features // group_size)]
    return QuantizedLinear(
        name=layer,
        kind=weight.metadata_props[KIND_KEY],
        in_features=in_features,
        weight_format=weight.attributes["format"].as_string(),
        granularity=granularity,
        group_size=group_size,
        codes=_array(path, weight, "codes"),
        scales=_array(path, weight, "scales"),
        multipliers=multipliers,
        bias=None if bias is None else _array(path, bias, "B"),
        **_activation(path, nodes["quantize"]),
        **around,
        router=router_of(around["lora_down"], router),
    )


class Activation(TypedDict):
    """Fields of a layer that say how its input is rounded."""

    activation_format: str
    activation_scaling: ActivationScaling
    activation_group: int
    activation_scale: F32 | None
    activation_zero: F32 | None


def _activation(path: Path, quantizer: ir.Node) -> Activation:
    """Format and scaling of the activation, and the constants of a static one."""
    scaling = next(key for key, op in QUANTIZER_OF.items() if op == quantizer.op_type)
    static, name = scaling == "per_tensor", quantizer.attributes["format"].as_string()
    return {
        "activation_format": name,
        "activation_scaling": scaling,
        "activation_group": quantizer.attributes["group_size"].as_int() if scaling == "token_group" else 0,
        "activation_scale": _array(path, quantizer, "scale") if static else None,
        "activation_zero": _array(path, quantizer, "zero") if static and not get_format(name).sign_bits else None,
    }


class Around(TypedDict):
    """Fields of a layer for what stands beside its GEMM."""

    input_multiplier: F32 | None
    input_offset: F32 | None
    lora_down: F32 | None
    lora_up: F32 | None


def _around(path: Path, nodes: dict[str, ir.Node]) -> Around:
    """Balance of the input and low-rank branches, as far as the layer has them."""
    balance = {key: _array(path, nodes[role], "B") for role, key in BALANCE.items() if role in nodes}
    branches = {key: _array(path, nodes[key], "data") for key in ("lora_down", "lora_up") if key in nodes}
    turned = {key: np.ascontiguousarray(array.transpose(0, 2, 1).astype(np.float32)) for key, array in branches.items()}
    return {
        "input_multiplier": balance.get("input_multiplier"),
        "input_offset": balance.get("input_offset"),
        "lora_down": turned.get("lora_down"),
        "lora_up": turned.get("lora_up"),
    }


def _read_router(path: Path, model: ir.Model) -> Router | None:
    stored = {key: model.graph.initializers.get(f"{ROUTER}.{key}") for key in ROUTER_ARRAYS}
    arrays = {key: value.const_value for key, value in stored.items() if value is not None}
    if not arrays:
        return None
    missing = [key for key in ROUTER_ARRAYS if arrays.get(key) is None]
    if missing:
        raise ContractError(f"{path}: the router has no tensor {ROUTER}.{missing[0]}; export the model again")
    return Router(**{key: tensor.numpy() for key, tensor in arrays.items() if tensor is not None})


def _array(path: Path, node: ir.Node, name: str) -> NDArray[Any]:
    value = inputs_of(node).get(name) if node.domain in ("", DOMAIN) else None
    if value is None or value.const_value is None:
        raise ContractError(f"{path}: input {name} of {node.name} is not a stored tensor; export the model again")
    return value.const_value.numpy()
