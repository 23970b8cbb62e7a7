"""Put quantized linears into a graph: each placeholder node becomes quantize, dequantize, MatMul and bias.

In front of the quantizer may stand a factor and an offset per input channel, behind the bias a low-rank branch. Every
layer has its own nodes and tensors here, so that it can be read back; passes merge what is equal.

A placeholder is a node `fpq.QuantizedLinear(x)` with the layer's name as attribute, left by the exporter where the
module had a linear; its weight never enters the graph as floats.
"""

from __future__ import annotations

from itertools import chain

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.checkpoint import ActivationScaling, QuantizedLinear, half_where_exact, shared_router
from export.dialect.graph import (
    BALANCE,
    FLOAT,
    INVERSE_OF,
    KIND_KEY,
    LAYER_KEY,
    GraphBuilder,
    add_functions,
    attribute,
    is_op,
    result_of,
)
from export.dialect.ops import DOMAIN, no_multipliers
from export.errors import ContractError
from export.formats.format import pack
from export.formats.operands import exact_multipliers
from export.router import ARRAYS, Router

PLACEHOLDER = "QuantizedLinear"
TIMESTEP, ROUTER = "timestep", "router"
GRANULARITY_KEY = "fpq.granularity"
QUANTIZER_OF: dict[ActivationScaling, str] = {
    "per_token": "QuantizeActivation",
    "per_tensor": "QuantizeStatic",
    "token_group": "QuantizeGroups",
}


class LayerBuilder(GraphBuilder):
    """Builds one quantized linear; its nodes say in their metadata to which layer they belong."""

    def __init__(self, graph: ir.Graph, before: ir.Node, layer: QuantizedLinear) -> None:
        super().__init__(graph, before, layer.name, {LAYER_KEY: layer.name, KIND_KEY: layer.kind})
        self.layer = layer


def quantize_graph(model: ir.Model, layers: list[QuantizedLinear]) -> None:
    """Replace every placeholder by its layer, in place, and give the model the functions it then uses.

    Raises ContractError naming a layer without a placeholder, or a placeholder without a layer.
    """
    nodes = {str(attribute(node, "layer")): node for node in model.graph if is_op(node, PLACEHOLDER, DOMAIN)}
    by_name = {layer.name: layer for layer in layers}
    _check_coverage(nodes, by_name)
    router = shared_router(layers)
    branch = None if router is None else add_router(model.graph, router)
    for name, node in nodes.items():
        _replace(model.graph, node, by_name[name], branch)
    used = {layer.activation_scaling for layer in layers}
    pairs = [(op, INVERSE_OF[op]) for scaling, op in QUANTIZER_OF.items() if scaling in used]
    add_functions(model, [*chain(*pairs), "DequantizeWeight"])


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
    (x,), output = node.inputs, result_of(node)
    assert x is not None, f"placeholder of {layer.name} without an input"
    value = _rounded(build, _balanced(build, x))
    weight = _weight(build)
    y = build.op("MatMul", value, weight, name="matmul")
    if layer.bias is not None:
        y.shape = output.shape
        y = build.op("Add", y, build.stored("bias", layer.bias), name="bias")
    if layer.lora_down is not None:
        y.shape = output.shape
        low_rank = add_low_rank(build, x) if layer.router is None else add_routed_low_rank(build, x, branch)
        y = build.op("Add", y, low_rank, name="add_low_rank")
    y.name, y.shape, y.type = f"{layer.name}/output", output.shape, output.type
    ir.convenience.replace_all_uses_with(output, y)
    graph.remove(node, safe=True)


def _balanced(build: LayerBuilder, x: ir.Value) -> ir.Value:
    """x * input_multiplier + input_offset, where the layer has them."""
    for op, (role, key) in zip(("Mul", "Add"), BALANCE.items(), strict=True):
        array, shape = getattr(build.layer, key), x.shape
        if array is not None:
            x = build.op(op, x, build.stored(key, array), name=role)
            x.shape, x.type = shape, FLOAT
    return x


def _rounded(build: LayerBuilder, x: ir.Value) -> ir.Value:
    """x -> quantize -> dequantize."""
    layer = build.layer
    choices: dict[str, str | int] = {"format": layer.activation_format}
    constants = []
    if layer.activation_scaling == "token_group":
        choices |= {"in_features": layer.in_features, "group_size": layer.activation_group}
    if layer.activation_scale is not None:
        zero = np.zeros(1, np.float32) if layer.activation_zero is None else layer.activation_zero
        arrays = {"activation_scale": layer.activation_scale, "activation_zero": zero}
        constants = [build.stored(key, array) for key, array in arrays.items()]
    quantizer = QUANTIZER_OF[layer.activation_scaling]
    codes, *scales = build.fpq(quantizer, x, *constants, name="quantize", **choices)
    return build.fpq(INVERSE_OF[quantizer], codes, *scales, *constants, name="dequantize", **choices)[0]


def _weight(build: LayerBuilder) -> ir.Value:
    """DequantizeWeight of the stored codes, [K, N]."""
    layer, table = build.layer, multiplier_table(build.layer)
    group_size = 0 if layer.granularity == "per_channel" else layer.group_size
    multipliers = no_multipliers(layer.in_features, group_size)
    if layer.multipliers is not None:
        multipliers = pack(np.searchsorted(table, layer.multipliers).astype(np.uint8), 4)
    codes, scales = build.stored("codes", layer.codes), build.stored("scales", layer.scales)
    stored = (codes, scales, build.stored("multipliers", multipliers))
    choices = {"in_features": layer.in_features, "group_size": group_size, "multipliers": table}
    (weight,) = build.fpq("DequantizeWeight", *stored, name="weight", format=layer.weight_format, **choices)
    node = weight.producer()
    assert node is not None
    node.metadata_props[GRANULARITY_KEY] = layer.granularity
    return weight


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


# --- low-rank branches, in standard ops: one router, and two small products per layer ------------------------------
# The router reads the graph's input `timestep` once and gives each sample the number of its branch; a layer gathers the
# two matrices of that branch, so a batch may hold samples of different timesteps. A layer's only branch needs
# no router.


def add_router(graph: ir.Graph, router: Router) -> ir.Value:
    """The branch of each sample, int64 [batch], computed at the head of the graph. Raises ContractError."""
    timestep = next((value for value in graph.inputs if value.name == TIMESTEP), None)
    if timestep is None:
        raise ContractError(
            f"the model has no input {TIMESTEP}, which low-rank branches are routed by; calibrate without"
        )
    build = GraphBuilder(graph, graph[0], ROUTER)
    stored = {key: build.stored(key, getattr(router, key)) for key in ARRAYS}
    column = build.op("Reshape", timestep, build.stored("one_column", np.array([-1, 1])), name="column")
    if timestep.dtype != FLOAT.dtype:
        column = build.op("Cast", column, name="timestep", to=FLOAT.dtype.value)
    phase = build.op("Mul", column, stored["frequencies"], name="phase")
    wave = build.op(
        "Concat", build.op("Cos", phase, name="cos"), build.op("Sin", phase, name="sin"), name="wave", axis=1
    )
    hidden = build.op("Gemm", wave, stored["w1"], stored["b1"], name="hidden", transB=1)
    active = build.op("Mul", hidden, build.op("Sigmoid", hidden, name="sigmoid"), name="active")
    logits = build.op("Gemm", active, stored["w2"], stored["b2"], name="logits", transB=1)
    branch = build.op("ArgMax", logits, name="branch", axis=1, keepdims=0)
    branch.shape = timestep.shape
    return branch


def add_low_rank(build: LayerBuilder, x: ir.Value) -> ir.Value:
    """lora_up[0] @ (lora_down[0] @ x) as "layer/low_rank", for x [..., K], of the only branch of a layer.

    Matrices are stored as [1, K, R] and [1, R, N], in float16 where that holds all of their numbers.
    """
    first = build.stored("low_rank_first", np.array(0))
    down, up = (_matrix(build, key, getattr(build.layer, key), first) for key in ("lora_down", "lora_up"))
    return build.op("MatMul", build.op("MatMul", x, down, name="low_rank_inner"), up, name="low_rank")


def add_routed_low_rank(build: LayerBuilder, x: ir.Value, branch: ir.Value | None) -> ir.Value:
    """lora_up[h] @ (lora_down[h] @ x) as "layer/low_rank", for x [batch, K] or [batch, rows, K], h of each sample from
    `branch` [batch]; matrices are stored as in `add_low_rank`, [H, ., .]."""
    layer = build.layer
    assert layer.lora_down is not None and layer.lora_up is not None and branch is not None
    _check_batch(layer.name, x, branch)
    down, up = (_matrix(build, key, getattr(layer, key), branch) for key in ("lora_down", "lora_up"))
    if x.shape is not None and x.shape.rank() == 3:
        return build.op("MatMul", build.op("MatMul", x, down, name="low_rank_inner"), up, name="low_rank")
    axis = build.stored("low_rank_axis", np.array([1]))
    inner = build.op("MatMul", build.op("Unsqueeze", x, axis, name="low_rank_row"), down, name="low_rank_inner")
    return build.op("Squeeze", build.op("MatMul", inner, up, name="low_rank_product"), axis, name="low_rank")


def _matrix(build: LayerBuilder, key: str, array: NDArray[np.float32], branch: ir.Value) -> ir.Value:
    """The matrix of each sample's branch, float32 [batch, ., .]; [., .] where `branch` is one number."""
    stored = build.stored(key, half_where_exact(array).transpose(0, 2, 1))
    matrix = build.op("Gather", stored, branch, name=key, axis=0)
    return matrix if stored.dtype == FLOAT.dtype else build.op("Cast", matrix, name=f"{key}_f32", to=FLOAT.dtype.value)


def _check_batch(layer: str, x: ir.Value, branch: ir.Value) -> None:
    """The first axis of x must be the batch, since each sample has a branch of its own."""
    shape, batch = list(x.shape or ()), next(iter(branch.shape or (None,)))
    known = [str(size) for size in (*shape[:1], batch) if size is not None and str(size) != "None"]
    if len(shape) not in (2, 3) or len(set(known)) > 1:
        raise ContractError(
            f"{layer}: its input has shape {x.shape}, not [{batch}, K] or [{batch}, rows, K], so a low-rank branch for "
            f"each sample does not fit; calibrate without"
        )
