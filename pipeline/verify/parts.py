"""A graph in several calls, computed part by part in stock onnxruntime, each node once.

All inner tensors of a large model do not fit into memory, and to run it from its inputs for every few layers takes its
time again and again. So each part begins with what the parts before have left: the tensors that later ones read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import onnx

from pipeline.backends.base import Arrays
from pipeline.distance import Array

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

# Their results may have types that NumPy lacks (FP8), and are quickly made again where a later part reads them.
MADE_AGAIN = frozenset({"QuantizeLinear"})


class Parts:
    """The calls of one graph, on their way from its inputs to its outputs."""

    def __init__(
        self,
        model: onnx.ModelProto,
        open_part: Callable[[onnx.ModelProto], InferenceSession],
        calls: Sequence[Arrays],
        asked: Iterable[str],
    ) -> None:
        """open_part: makes an onnxruntime session. calls: model inputs by name. asked: all names that `compute` will be
        called with, as often as it will."""
        self._model, self._open = model, open_part
        self._asked = Counter(asked)
        self._nodes = needed_nodes(model.graph.node, self._asked)
        self._done: set[int] = set()  # ids of nodes
        inputs = {value.name for value in model.graph.input}
        self._arrays = [{name: array for name, array in call.items() if name in inputs} for call in calls]

    def compute(self, asked: Sequence[str], once: Collection[str] = ()) -> list[Arrays]:
        """The tensors of these names in each call; those of `once` in the first call alone.

        Raises what onnxruntime does.
        """
        self._asked -= Counter(asked)
        names = set(asked)
        known = self._arrays[0].keys()
        nodes = needed_nodes(self._nodes, names - known, known)
        self._done.update(map(id, nodes))
        later = self._read_later()
        left = {name for node in nodes if node.op_type not in MADE_AGAIN for name in node.output}
        kept = left & later - {""}
        outputs = sorted((names - known) | kept)
        per_call: list[Arrays] = [{} for _ in self._arrays]
        if outputs:
            session = self._open(part_of(self._model, nodes, self._arrays[0], outputs))
            fed = [value.name for value in session.get_inputs()]
            for call, arrays in enumerate(self._arrays):
                fetched = [name for name in outputs if call == 0 or name not in once or name in kept]
                values = session.run(fetched, {name: arrays[name] for name in fed})
                per_call[call] = dict(zip(fetched, values, strict=True))
        for call, arrays in enumerate(self._arrays):
            computed = arrays | per_call[call]
            self._arrays[call] = {name: array for name, array in computed.items() if name in later}
            per_call[call] = {name: computed[name] for name in names if name in computed}
        return per_call

    def _read_later(self) -> set[str]:
        """The tensors that parts to come begin with or that they are asked for."""
        later = set(self._asked)
        for node in reversed(self._nodes):
            again = node.op_type in MADE_AGAIN and any(name in later for name in node.output)
            if id(node) not in self._done or again:
                later.update(node.input)
        return later


def needed_nodes(
    nodes: Sequence[onnx.NodeProto], outputs: Iterable[str], known: Collection[str] = ()
) -> list[onnx.NodeProto]:
    """Those of `nodes` that compute `outputs` from the tensors `known`; both in the order of computation."""
    names, needed = set(outputs), list[onnx.NodeProto]()
    for node in reversed(nodes):
        if any(name and name in names for name in node.output):
            names.update(name for name in node.input if name not in known)
            needed.append(node)
    return needed[::-1]


def part_of(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], fed: Mapping[str, Array], outputs: Sequence[str]
) -> onnx.ModelProto:
    """The nodes as a model of their own, with these `outputs`; those of `fed` that it reads are inputs of the
    arrays' types and ranks. What reads neither them nor a node reads the inputs and initializers of `model`."""
    part = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    graph = part.graph
    graph.name = model.graph.name
    graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input} - {""}
    inner = {name for node in nodes for name in node.output}
    graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in read)
    for name in sorted(read & fed.keys()):
        kind = onnx.helper.np_dtype_to_tensor_dtype(fed[name].dtype)
        graph.input.append(onnx.helper.make_tensor_value_info(name, kind, [None] * fed[name].ndim))
    graph.input.extend(value for value in model.graph.input if value.name in read and value.name not in fed)
    # Of ops that onnxruntime does not know the types are written down.
    graph.value_info.extend(value for value in model.graph.value_info if value.name in inner and value.name not in fed)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    return part
