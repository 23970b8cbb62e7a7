"""Small questions and edits on onnx_ir graphs that the passes share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass

from export.dialect.ops import DOMAIN, OPS, VERSION, attributes

LAYER_KEY, KIND_KEY = "fpq.layer", "fpq.kind"
# Ops that turn floats into codes, and those that turn codes into floats.
QUANTIZERS = ("QuantizeActivation", "QuantizeStatic", "QuantizeGroups")
DEQUANTIZERS = ("DequantizeActivation", "DequantizeStatic", "DequantizeGroups")
# Nodes of a layer that balance its input channel by channel, in this order.
BALANCE = ("multiply", "offset")


def is_op(node: ir.Node | None, op_type: str, domain: str = "") -> bool:
    return node is not None and node.op_type == op_type and node.domain == domain


def produced_by(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node | None:
    """The node that makes `value` if it is of that type, else None."""
    node = value.producer() if value is not None else None
    return node if is_op(node, op_type, domain) else None


def only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads `value`, or None if it has several readers or leaves the graph."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """The array of an initializer or Constant node, else None."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()


def is_constant(value: ir.Value | None, number: float) -> bool:
    """Is `value` a constant whose elements all equal `number`?"""
    array = constant(value)
    return array is not None and array.size > 0 and bool(np.all(array == number))


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    found = node.attributes.get(name)
    return default if found is None else found.value


def layer_of(node: ir.Node) -> str:
    """The quantized linear that a node belongs to, '' for none."""
    return node.metadata_props.get(LAYER_KEY, "")


def has_role(node: ir.Node | None, *roles: str) -> bool:
    """Is it the node "layer/role" of the quantized linear it belongs to?"""
    layer = layer_of(node) if node is not None else ""
    return bool(layer) and node is not None and node.name in {f"{layer}/{role}" for role in roles}


def unbalanced(value: ir.Value) -> ir.Value:
    """What a linear reads, for the tensor that its quantizer reads."""
    for role in reversed(BALANCE):
        node = value.producer()
        if node is not None and has_role(node, role) and node.inputs[0] is not None:
            value = node.inputs[0]
    return value


def low_rank_of(output: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """(result of the low-rank branch, sum with it) where a linear's `output` has a branch added to it."""
    add = only_reader(output)
    if add is None or not has_role(add, "add_low_rank"):
        return None
    return other_input(add, output), add.outputs[0]


def other_input(node: ir.Node, value: ir.Value) -> ir.Value:
    """The operand of a two-operand node that is not `value`."""
    first, second = node.inputs[0], node.inputs[1]
    other = second if first is value else first
    assert other is not None
    return other


def name_of(node: ir.Node) -> str:
    return node.name or (node.outputs[0].name if node.outputs else None) or node.op_type


def replace(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """Put `new` in the place of `old`; outputs correspond by position and keep their names, shapes and types."""
    ir.convenience.replace_nodes_and_values(graph, old, [old], [new], old.outputs, new.outputs)


def add_functions(model: ir.Model, op_names: Sequence[str]) -> None:
    """Give the model the function bodies of the `fpq` ops it starts to use, so that any runtime still runs it."""
    for name in op_names:
        function = ir.serde.deserialize_function(OPS[name].function())
        model.functions.setdefault(function.identifier(), function)
    model.opset_imports.setdefault(DOMAIN, VERSION)


def drop_unused(model: ir.Model) -> None:
    """Remove nodes, initializers and functions that nothing reads any more."""
    RemoveUnusedNodesPass()(model)
    RemoveUnusedFunctionsPass()(model)


def fpq_node(op_name: str, inputs: Sequence[ir.Value | None], name: str, like: ir.Node, **choices: Any) -> ir.Node:
    """A node of an `fpq` op with its format tables; metadata (layer, kind) is taken from `like`."""
    found = ir.convenience.convert_attributes(attributes(op_name, **choices))
    count = len(OPS[op_name].outputs)
    return ir.Node(
        DOMAIN, op_name, inputs, found, num_outputs=count, name=name, metadata_props=dict(like.metadata_props)
    )
