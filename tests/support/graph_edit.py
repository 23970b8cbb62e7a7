"""Edit an ONNX graph whose weights stay in the file beside it: what faults in whole graphs are planted with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo

Item = TypeVar("Item")


class NothingToPlantError(LookupError):
    """The graph has no place for a fault. A fault that changes nothing must not count as one that was looked for."""


@dataclass(frozen=True)
class Step:
    """One op on the way of a tensor: op(tensor, *inputs), or op(inputs[0], tensor, ...) with `place` 1. Inputs are
    names of tensors, or arrays."""

    op: str
    inputs: tuple[str | NDArray[Any] | np.generic, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    place: int = 0


class GraphEdit:
    """A graph and what faults do to it; `save` writes it beside the original, whose weights it goes on using."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = onnx.load(path, load_external_data=False)
        self.graph = self.model.graph
        self._made = 0

    def save(self, name: str = "faulty.onnx") -> Path:
        """Write the graph, its nodes in an order in which each comes after what it reads. Raises if nothing changed."""
        original = onnx.load(self.path, load_external_data=False)
        if original.SerializeToString(deterministic=True) == self.model.SerializeToString(deterministic=True):
            raise NothingToPlantError(f"{self.path.parent.name}/{self.path.name}: the fault changed nothing")
        self._sort()
        path = self.path.with_name(name)
        onnx.save(self.model, path)
        return path

    # --- finding ------------------------------------------------------------------------------------------------

    def nodes(self, *op_types: str) -> list[onnx.NodeProto]:
        """Nodes of these types in graph order. Raises NothingToPlantError if there is none."""
        fitting = [node for node in self.graph.node if node.op_type in op_types]
        return some(fitting, f"no {' or '.join(op_types)}")

    def producer(self, tensor: str) -> onnx.NodeProto | None:
        """The node that makes `tensor`; None for an input or initializer."""
        return next((node for node in self.graph.node if tensor in node.output), None)

    def readers(self, tensor: str) -> list[onnx.NodeProto]:
        return [node for node in self.graph.node if tensor in node.input]

    def tensors(self, end: str) -> list[str]:
        """Outputs of nodes whose names end so, in graph order."""
        names = [name for node in self.graph.node for name in node.output if name.endswith(end)]
        return some(names, f"no tensor {end}")

    def constants(self, part: str, end: str = "") -> list[str]:
        """Float initializers with `part` in their names and `end` at the end."""
        floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
        items = [item for item in self.graph.initializer if part in item.name and item.name.endswith(end)]
        return some([item.name for item in items if item.data_type in floats], f"no kept weight {part}{end}")

    def is_constant(self, name: str) -> bool:
        return any(item.name == name for item in self.graph.initializer)

    def array(self, name: str) -> NDArray[Any]:
        """The numbers of an initializer, wherever they are stored."""
        tensor = self._initializer(name)
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor).copy()
        info, dtype = ExternalDataInfo(tensor), helper.tensor_dtype_to_np_dtype(tensor.data_type)
        file = self.path.parent / info.location
        return np.fromfile(file, dtype, math.prod(tensor.dims), offset=info.offset or 0).reshape(tensor.dims)

    def _initializer(self, name: str) -> onnx.TensorProto:
        matches = [tensor for tensor in self.graph.initializer if tensor.name == name]
        return some(matches, f"no initializer {name}")[0]

    # --- changing -----------------------------------------------------------------------------------------------

    def change(self, name: str, function: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
        """Put function(array) in the place of an initializer."""
        before = self.array(name)
        after = np.ascontiguousarray(function(before.copy())).astype(before.dtype)
        if np.array_equal(before, after):
            raise NothingToPlantError(f"{name} is the same after the change")
        self._initializer(name).CopyFrom(numpy_helper.from_array(after, name))

    def constant(self, value: NDArray[Any] | np.generic) -> str:
        """A new initializer."""
        self._made += 1
        name = f"fault/constant_{self._made}"
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def redirect(self, nodes: Iterable[onnx.NodeProto], old: str, new: str) -> None:
        """Have `nodes` read `new` in place of `old`."""
        for node in nodes:
            node.input[:] = [new if name == old else name for name in node.input]

    def route(self, tensor: str, *steps: Step, readers: Sequence[onnx.NodeProto] | None = None) -> None:
        """Send `tensor` through `steps`, for `readers`, or for all and for whoever asks for it by name."""
        producer = self.producer(tensor)
        every = readers is None
        if every and producer is not None:
            self._made += 1
            source = f"fault/{tensor}/{self._made}"
            producer.output[:] = [source if name == tensor else name for name in producer.output]
            self.apply(source, *steps, result=tensor)
            return
        concerned = self.readers(tensor) if readers is None else readers
        self.redirect(concerned, tensor, self.apply(tensor, *steps))

    def apply(self, tensor: str, *steps: Step, result: str = "") -> str:
        """New nodes that compute `steps` of `tensor`; the name of their result."""
        for index, step in enumerate(steps):
            self._made += 1
            last = index == len(steps) - 1
            output = result if result and last else f"fault/tensor_{self._made}"
            inputs = [item if isinstance(item, str) else self.constant(item) for item in step.inputs]
            inputs.insert(step.place, tensor)
            node = helper.make_node(step.op, inputs, [output], f"fault/node_{self._made}", **step.attributes)
            self.graph.node.append(node)
            tensor = output
        return tensor

    def _sort(self) -> None:
        """Nodes after the nodes they read, otherwise in their old order."""
        waiting, sorted_nodes = list(self.graph.node), []
        made_here = {name for node in waiting for name in node.output if name}
        ready: set[str] = set()
        while waiting:
            later = []
            for node in waiting:
                if all(name in ready or name not in made_here for name in node.input):
                    sorted_nodes.append(node)
                    ready.update(node.output)
                else:
                    later.append(node)
            assert len(later) < len(waiting), "the fault made a cycle"
            waiting = later
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in sorted_nodes]
        del self.graph.node[:]
        self.graph.node.extend(nodes)


def some(items: Sequence[Item], why: str) -> list[Item]:
    """`items` as a list. Raises NothingToPlantError if there is none."""
    if not items:
        raise NothingToPlantError(why)
    return list(items)


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """Value of a node's attribute."""
    return next((helper.get_attribute_value(item) for item in node.attribute if item.name == name), default)


def set_attribute(node: onnx.NodeProto, name: str, value: Any) -> None:
    kept = [item for item in node.attribute if item.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])
