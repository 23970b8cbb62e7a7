"""Split a graph by how often its parts run: what depends on the condition alone once per image, what depends on the
timestep alone once per step, for all samples that share it, and the rest once per step for each sample."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from export.dialect.graph import attribute, drop_unused, inputs_of, is_op, result_of
from export.models.families import STEP_INPUTS

logger = logging.getLogger(__name__)
TIMESTEP = "timestep"
# Without one of these in the first part a split saves nothing worth a second graph.
PRODUCTS = frozenset(
    {"MatMul", "Gemm", "MatMulInteger", "MatMulIntegerToFloat", "PackedGemm", "HalfGemm", "QuantizedAttention", "Conv"}
)
# Products whose rows are the same bits whatever rows stand beside them.
ROW_BY_ROW = frozenset({"HalfGemm", "PackedGemm"})


@dataclass(frozen=True)
class Split:
    """`condition`: condition inputs -> the tensors that cross. `step`: the other inputs and those -> outputs."""

    condition: ir.Model
    step: ir.Model


def split_condition(model: ir.Model) -> Split | None:
    """Two models that share `model`'s tensors; None where no input changes per step, or no matrix product need not."""
    sizes = _shared_sizes(model.graph)
    once = _once(model.graph, sizes)
    if not any(value.name in STEP_INPUTS for value in model.graph.inputs):
        return None
    if not any(node.op_type in PRODUCTS for node in once):
        return None
    boundary = _boundary(model.graph, once)
    condition, step = model.clone(), model.clone()
    _measure_elsewhere(condition.graph, sizes)
    _cut(condition, step, boundary)
    logger.info("%d of %d nodes run once per image, %d tensors cross", len(once), len(model.graph), len(boundary))
    return Split(condition, step)


@dataclass(frozen=True)
class TimestepSplit:
    """`timestep`: the timestep [batch] -> the tensors that cross, a row of each for a sample. `rest`: the other inputs
    and those -> outputs."""

    timestep: ir.Model
    rest: ir.Model


def split_timestep(model: ir.Model) -> TimestepSplit | None:
    """Two models that share `model`'s tensors; the first holds the matrix products that depend on the timestep alone,
    and what leads to them. None where there are none, or where one row of it for all samples of an equal timestep would
    not be the same bits as a row for each."""
    of_timestep = _up_to_products(model.graph, _of_timestep_alone(model.graph))
    boundary = _boundary(model.graph, of_timestep)
    if not {node.op_type for node in of_timestep} & PRODUCTS <= ROW_BY_ROW or not boundary:
        return None
    values, times = _values(model.graph), next(value for value in model.graph.inputs if value.name == TIMESTEP)
    shapes = [value.shape for value in (times, *(values[name] for name in boundary))]
    if any(not shape or shape[0] != (times.shape or [None])[0] for shape in shapes):
        return None
    timestep, rest = model.clone(), model.clone()
    _cut(timestep, rest, boundary)
    logger.info(
        "%d of %d nodes read the timestep alone, %d tensors cross", len(of_timestep), len(model.graph), len(boundary)
    )
    return TimestepSplit(timestep, rest)


def _of_timestep_alone(graph: ir.Graph) -> set[ir.Node]:
    """Nodes that read the timestep's numbers and beside them constants alone."""
    values, nodes = {value for value in graph.inputs if value.name == TIMESTEP}, set()
    for node in graph:
        varying = [value for value in node.inputs if value is not None and not _is_constant(value)]
        if varying and values.issuperset(varying) and not is_op(node, "Shape"):
            values.update(node.outputs)
            nodes.add(node)
    return nodes


def _is_constant(value: ir.Value) -> bool:
    node = value.producer()
    return value.const_value is not None or (node is not None and not node.inputs)


def _up_to_products(graph: ir.Graph, nodes: set[ir.Node]) -> set[ir.Node]:
    """Those of `nodes` that are matrix products, or lead to one."""
    leading: set[ir.Node] = set()
    for node in reversed(graph):
        followers = {use.node for value in node.outputs for use in value.uses()}
        if node in nodes and (node.op_type in PRODUCTS or followers & leading):
            leading.add(node)
    return leading


def _cut(first: ir.Model, rest: ir.Model, boundary: tuple[str, ...]) -> None:
    """Of two copies of a model leave in `first` what gives the values `boundary`, in `rest` what reads them."""
    _keep_outputs(first, boundary)
    _turn_into_inputs(rest, boundary)
    for part in (first, rest):
        drop_unused(part)
        part.graph.inputs[:] = [value for value in part.graph.inputs if value.uses() or value.is_graph_output()]


def _shared_sizes(graph: ir.Graph) -> dict[str, tuple[str, int]]:
    """Outputs of Shape nodes that measure one named size (the batch) -> (condition input, axis) that has it too.

    What is computed from such a size alone belongs to both parts: the first may measure its own input instead.
    """
    places = {
        str(size): (str(value.name), axis)
        for value in graph.inputs
        if value.name not in STEP_INPUTS
        for axis, size in enumerate(value.shape or ())
        if not isinstance(size, int) and size.value is not None
    }
    measured = {str(result_of(node).name): _measured(node) for node in graph if is_op(node, "Shape")}
    return {name: places[size] for name, size in measured.items() if size is not None and size in places}


def _measured(node: ir.Node) -> str | None:
    """The one size that a Shape node reads, by name or number; None for several."""
    value, start, end = inputs_of(node).data, attribute(node, "start", 0), attribute(node, "end")
    sizes = list(value.shape)[start:end] if value.is_graph_input() and value.shape else []
    return str(sizes[0]) if len(sizes) == 1 else None


def _once(graph: ir.Graph, sizes: Collection[str]) -> set[ir.Node]:
    """Nodes that depend on at least one graph input, and on no input of STEP_INPUTS other than its size."""
    varying = {value for value in graph.inputs if value.name in STEP_INPUTS}
    conditional = {value for value in graph.inputs if value.name not in STEP_INPUTS}
    once = set()
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if result_of(node).name in sizes:
            continue
        if any(value in varying for value in inputs):
            varying.update(node.outputs)
        elif any(value in conditional for value in inputs):
            conditional.update(node.outputs)
            once.add(node)
    return once


def _measure_elsewhere(graph: ir.Graph, sizes: Mapping[str, tuple[str, int]]) -> None:
    inputs = {value.name: value for value in graph.inputs}
    for node in graph:
        if result_of(node).name in sizes:
            name, axis = sizes[str(result_of(node).name)]
            inputs_of(node).set("data", inputs[name])
            node.attributes["start"], node.attributes["end"] = (
                ir.AttrInt64("start", axis),
                ir.AttrInt64("end", axis + 1),
            )


def _boundary(graph: ir.Graph, once: set[ir.Node]) -> tuple[str, ...]:
    """Names of the values that `once` makes and the other nodes or the caller read, in graph order."""
    crossing = (
        value
        for node in graph
        if node in once
        for value in node.outputs
        if value.is_graph_output() or any(use.node not in once for use in value.uses())
    )
    return tuple(str(value.name) for value in crossing)


def _values(graph: ir.Graph) -> dict[str, ir.Value]:
    return {str(value.name): value for node in graph for value in node.outputs}


def _keep_outputs(model: ir.Model, names: tuple[str, ...]) -> None:
    values = _values(model.graph)
    model.graph.outputs[:] = [values[name] for name in names]
    for name in names:
        values[name].type = values[name].type or ir.TensorType(ir.DataType.FLOAT)


def _turn_into_inputs(model: ir.Model, names: tuple[str, ...]) -> None:
    values = _values(model.graph)
    for name in names:
        inner = values[name]
        kind = inner.type or ir.TensorType(ir.DataType.FLOAT)
        outer = ir.Value(name=name, type=kind, shape=inner.shape)
        inner.name = f"{name}/unused"
        ir.convenience.replace_all_uses_with(inner, outer, replace_graph_outputs=True)
        model.graph.inputs.append(outer)
