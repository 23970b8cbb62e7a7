"""Builds nodes and stored tensors into onnx_ir graphs, and answers the small questions that passes ask of them.

Inputs and outputs are asked for by the names that an op gives them, `inputs_of(gemm).bias`: those of the row in
`export.dialect.ops` for an op of the dialect, those of the ONNX schema for a standard one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import ArrayLike, DTypeLike, NDArray
from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass

from export.dialect.functions import OPSET
from export.dialect.ops import DOMAIN, OPS, VERSION, Attributes, attributes
from export.errors import ContractError

MICROSOFT = "com.microsoft"
# Metadata of nodes: the quantized linear that they belong to, and its kind.
LAYER_KEY, KIND_KEY = "fpq.layer", "fpq.kind"
# Op that turns activations into codes -> the one that turns the codes into floats.
INVERSE_OF = {
    "QuantizeActivation": "DequantizeActivation",
    "QuantizeStatic": "DequantizeStatic",
    "QuantizeGroups": "DequantizeGroups",
}
QUANTIZERS, DEQUANTIZERS = tuple(INVERSE_OF), tuple(INVERSE_OF.values())
# Nodes of a layer that balance its input channel by channel, in this order -> the field of the layer that they read.
BALANCE = {"multiply": "input_multiplier", "offset": "input_offset"}
Array = NDArray[np.generic]
FLOAT = ir.TensorType(ir.DataType.FLOAT)
# Element type of the result where it is not that of the first input.
RESULT_TYPES = {
    "QuantizeLinear": ir.DataType.UINT8,
    "DequantizeLinear": ir.DataType.FLOAT,
    "MatMulInteger": ir.DataType.INT32,
    "MatMulIntegerToFloat": ir.DataType.FLOAT,
    "Shape": ir.DataType.INT64,
    "ArgMax": ir.DataType.INT64,
}
# onnxruntime's own ops have no schema in the onnx package.
MICROSOFT_INPUTS = {
    "MatMulIntegerToFloat": ("A", "B", "a_scale", "b_scale", "a_zero_point", "b_zero_point", "bias"),
    "MatMulNBits": ("A", "B", "scales", "zero_points", "g_idx", "bias"),
}


# --- building ------------------------------------------------------------------------------------------------------


class GraphBuilder:
    """Inserts nodes in front of `before`. A node and its result are called "prefix/name".

    metadata: of every node. typed: whether results get the element type that follows from the op and its inputs;
    without it a reader of the file infers them.
    """

    def __init__(
        self,
        graph: ir.Graph,
        before: ir.Node,
        prefix: str,
        metadata: dict[str, str] | None = None,
        typed: bool = True,
    ) -> None:
        self.graph, self.before, self.prefix = graph, before, prefix
        self.metadata, self.typed = metadata or {}, typed

    def op(self, op_type: str, *inputs: ir.Value | None, name: str, domain: str = "", **choices: object) -> ir.Value:
        """A node with one output, which is returned."""
        node = self.node(op_type, inputs, name, choices, domain)
        output = node.outputs[0]
        output.type = _result_type(node) if self.typed else None
        return output

    def fpq(self, op_type: str, *inputs: ir.Value, name: str, **choices: object) -> list[ir.Value]:
        """A node of the dialect; further outputs are called "prefix/name/scale". Shapes follow from those of inputs."""
        row, values = OPS[op_type], attributes(op_type, **choices)
        node = self.node(op_type, inputs, name, values, DOMAIN, len(row.outputs))
        for value, suffix, kind in zip(node.outputs, ("", "/scale"), row.outputs.values(), strict=False):
            value.name, value.type = f"{node.name}{suffix}", ir.TensorType(ir.DataType(kind))
        shapes = [value.shape for value in inputs if value.shape is not None]
        if len(shapes) == len(inputs):
            for value, (_, shape) in zip(node.outputs, row.infer(values, *map(tuple, shapes)), strict=True):
                value.shape = ir.Shape(shape)
        return list(node.outputs)

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        choices: Attributes,
        domain: str = "",
        outputs: int = 1,
    ) -> ir.Node:
        """A node with several outputs, of which the first has a name, and none has a type."""
        full = f"{self.prefix}/{name}"
        node = new_node(domain, op_type, inputs, full, choices, outputs, self.metadata)
        result_of(node).name = full
        self.graph.insert_before(self.before, node)
        return node

    def stored(self, key: str, array: Array) -> ir.Value:
        """The initializer "prefix.key"."""
        return add_initializer(self.graph, ir.tensor(np.ascontiguousarray(array), name=f"{self.prefix}.{key}"))

    def constant(self, number: ArrayLike, dtype: DTypeLike = np.float32) -> ir.Value:
        """A small constant (scalar or list), one initializer per value and type in the graph."""
        array = np.asarray(number, dtype)
        name = f"constant/{array.dtype.name}/" + "_".join(repr(v) for v in array.reshape(-1).tolist())
        name += "" if array.ndim == 0 else f"/{'x'.join(map(str, array.shape))}"
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        return add_initializer(self.graph, ir.tensor(array, name=name))

    def lazy(self, name: str, dtype: ir.DataType, shape: tuple[int, ...], make: Callable[[], Array]) -> ir.Value:
        """An initializer whose array is computed when the model is written, and dropped afterwards."""
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        return add_initializer(self.graph, lazy_tensor(name, dtype, shape, make))


def _result_type(node: ir.Node) -> ir.TypeProtocol | None:
    """Type of a node's output: by op, by its `to`, else that of its first input (elementwise and shape ops)."""
    if node.op_type == "Cast":
        return ir.TensorType(ir.DataType(node.attributes["to"].as_int()))
    if node.op_type in RESULT_TYPES:
        return ir.TensorType(RESULT_TYPES[node.op_type])
    return next((value.type for value in node.inputs if value is not None), None)


def add_initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Register `tensor` under its name as an initializer of the graph."""
    shape = ir.Shape(list(tensor.shape.numpy()))
    value = ir.Value(name=tensor.name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def lazy_tensor(name: str, dtype: ir.DataType, shape: Sequence[int], make: Callable[[], Array]) -> ir.LazyTensor:
    """A tensor whose array is computed whenever it is read."""
    return ir.LazyTensor(lambda: ir.tensor(make(), name=name), dtype, ir.Shape(shape), name=name)


def new_node(
    domain: str,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    choices: Attributes,
    outputs: int,
    metadata: Mapping[str, str],
) -> ir.Node:
    """A node that stands in no graph yet; its outputs have no names. choices: its attributes."""
    converted = ir.convenience.convert_attributes(choices)
    return ir.Node(domain, op_type, inputs, converted, num_outputs=outputs, name=name, metadata_props=dict(metadata))


def in_order(inputs: Mapping[str, ir.Value], ports: Collection[str], name: str) -> list[ir.Value]:
    """Inputs of the node `name`, given by port, in its op's order. Raises ContractError unless they are just these."""
    if set(inputs) != set(ports):
        stated = f"its inputs are {', '.join(inputs)}, its op reads {', '.join(ports)}"
        raise ContractError(f"{name}: {stated}; export the model again")
    return [inputs[port] for port in ports]


def fpq_node(op_type: str, inputs: Mapping[str, ir.Value], name: str, like: ir.Node, **choices: object) -> ir.Node:
    """A node of the dialect with its format tables, for the place of another one; metadata (layer, kind) is taken from
    `like`. inputs: by the names of the op's row, all of them."""
    row, values = OPS[op_type], attributes(op_type, **choices)
    ordered = in_order(inputs, row.inputs, name)
    return new_node(DOMAIN, op_type, ordered, name, values, len(row.outputs), like.metadata_props)


def add_functions(model: ir.Model, op_types: Sequence[str]) -> None:
    """Give the model the function bodies of the ops of the dialect that it starts to use, so that any runtime still
    runs it."""
    for name in op_types:
        function = ir.serde.deserialize_function(OPS[name].function())
        model.functions.setdefault(function.identifier(), function)
    model.opset_imports.setdefault(DOMAIN, VERSION)


def replace(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """Put `new` in the place of `old`, whose outputs keep their names, shapes and types as the first of its own."""
    ir.convenience.replace_nodes_and_values(graph, old, [old], [new], old.outputs, new.outputs[: len(old.outputs)])


def drop_unused(model: ir.Model) -> None:
    """Remove nodes, initializers and functions that nothing reads any more."""
    RemoveUnusedNodesPass()(model)
    RemoveUnusedFunctionsPass()(model)


# --- ports by name -------------------------------------------------------------------------------------------------


class Ports:
    """Inputs or outputs of a node by name, as attributes. Raises ContractError for one that the node leaves out."""

    def __init__(self, node: ir.Node, names: Sequence[str], values: Sequence[ir.Value | None]) -> None:
        self._node, self._names, self._values = node, names, values

    def __getattr__(self, name: str) -> ir.Value:
        value = self.get(name)
        if value is None:
            raise ContractError(f"{name_of(self._node)}: {self._node.op_type} needs {name}; export the model again")
        return value

    def get(self, name: str) -> ir.Value | None:
        """None for one that the node leaves out."""
        place = self.place(name)
        return self._values[place] if place < len(self._values) else None

    def by_name(self) -> dict[str, ir.Value]:
        """Those that the node has, by name."""
        return {name: value for name in self._names if (value := self.get(name)) is not None}

    def set(self, name: str, value: ir.Value) -> None:
        """Let an input be another value."""
        self._node.replace_input_with(self.place(name), value)

    def place(self, name: str) -> int:
        if name not in self._names:
            raise AttributeError(f"{self._node.op_type} has {', '.join(self._names)}, not {name}")
        return self._names.index(name)


def inputs_of(node: ir.Node) -> Ports:
    """Inputs of a node of the dialect or of a standard op.

    >>> a, b = ir.Value(name="a"), ir.Value(name="b")
    >>> inputs_of(ir.Node("", "Sub", [a, b])).B.name
    'b'
    """
    return Ports(node, _port_names(node.domain, node.op_type)[0], node.inputs)


def outputs_of(node: ir.Node) -> Ports:
    """Outputs of a node of the dialect or of a standard op."""
    return Ports(node, _port_names(node.domain, node.op_type)[1], node.outputs)


@cache
def _port_names(domain: str, op_type: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if domain == DOMAIN:
        return tuple(OPS[op_type].inputs), tuple(OPS[op_type].outputs)
    if domain == MICROSOFT:
        return MICROSOFT_INPUTS[op_type], ("Y",)
    schema = onnx.defs.get_schema(op_type, OPSET, domain)
    return tuple(port.name for port in schema.inputs), tuple(port.name for port in schema.outputs)


def result_of(node: ir.Node) -> ir.Value:
    """The result of a node that has one; of several, the first."""
    return node.outputs[0]


def other_input(node: ir.Node, value: ir.Value) -> ir.Value:
    """The operand of a two-operand node that is not `value`."""
    ports = inputs_of(node)
    return ports.B if ports.A is value else ports.A


# --- questions -----------------------------------------------------------------------------------------------------


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


def read_by(value: ir.Value, op_type: str) -> ir.Node | None:
    """The one node that reads `value` if it is of that standard type, else None."""
    node = only_reader(value)
    return node if is_op(node, op_type) else None


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """The array of an initializer or Constant node, else None."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()


def stored_array(value: ir.Value) -> NDArray[Any]:
    """The array of an initializer or Constant node. Raises ContractError for a computed value."""
    array = constant(value)
    if array is None:
        raise ContractError(f"{value.name} is computed, not stored; export the model again")
    return array


def is_constant(value: ir.Value | None, number: float) -> bool:
    """Is `value` a constant whose elements all equal `number`?"""
    array = constant(value)
    return array is not None and array.size > 0 and bool(np.all(array == number))


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    value = node.attributes.get(name)
    return default if value is None else value.value


def name_of(node: ir.Node) -> str:
    return node.name or (result_of(node).name if node.outputs else None) or node.op_type


def layer_of(node: ir.Node) -> str | None:
    """The quantized linear that a node belongs to, if any."""
    return node.metadata_props.get(LAYER_KEY)


def has_role(node: ir.Node | None, *roles: str) -> bool:
    """Is it the node "layer/role" of the quantized linear it belongs to?"""
    layer = layer_of(node) if node is not None else None
    return layer is not None and node is not None and node.name in {f"{layer}/{role}" for role in roles}


def unbalanced(value: ir.Value) -> ir.Value:
    """What a linear reads, for the tensor that its quantizer reads."""
    for role in reversed(BALANCE):
        node = value.producer()
        if node is not None and has_role(node, role):
            value = inputs_of(node).A
    return value


def low_rank_of(output: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """(result of the low-rank branch, sum with it) where a linear's `output` has a branch added to it."""
    add = only_reader(output)
    if add is None or not has_role(add, "add_low_rank"):
        return None
    return other_input(add, output), result_of(add)
