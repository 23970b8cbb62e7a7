"""Cast or Transpose of a stored weight -> a stored weight, computed when the file is written."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.dialect.graph import add_initializer, attribute, drop_unused, inputs_of, is_op, lazy_tensor, result_of
from pipeline.passes.rewrite import RewritePass


class FoldWeights(RewritePass):
    """Replace Cast(w) and Transpose(w) of an initializer by a lazy initializer, so that no runtime does it at load.

    A weight that several nodes turn into different things is stored once for each; a graph output is left alone.
    """

    def rewrite(self, model: ir.Model) -> None:
        for node in list(model.graph):
            if is_op(node, "Cast") or is_op(node, "Transpose"):
                self._try(model.graph, node)
        if self.fired:
            drop_unused(model)

    def _try(self, graph: ir.Graph, node: ir.Node) -> None:
        source, output = inputs_of(node).get("input" if is_op(node, "Cast") else "data"), result_of(node)
        if source is None or source.const_value is None or not source.is_initializer():
            return
        if output.is_graph_output():
            self.refuse(node.name, f"{output.name} is an output of the graph")
            return
        folded = add_initializer(graph, _folded(node, source.const_value, str(output.name)))
        # The node gives up its name for the value that takes over.
        output.name = f"{output.name}/unfolded"
        ir.convenience.replace_all_uses_with(output, folded)
        graph.remove(node, safe=True)
        self.fired += 1


def _folded(node: ir.Node, tensor: ir.TensorProtocol, name: str) -> ir.LazyTensor:
    if node.op_type == "Cast":
        dtype = ir.DataType(attribute(node, "to"))
        make, shape = partial(_cast, tensor, dtype.numpy()), tuple(tensor.shape)
    else:
        order = tuple(attribute(node, "perm") or reversed(range(len(tensor.shape))))
        make, dtype = partial(_transposed, tensor, order), tensor.dtype
        shape = tuple(tensor.shape[axis] for axis in order)
    return lazy_tensor(name, dtype, shape, make)  # type: ignore[arg-type]


def _cast(tensor: ir.TensorProtocol, dtype: np.dtype) -> NDArray[np.generic]:
    return tensor.numpy().astype(dtype)


def _transposed(tensor: ir.TensorProtocol, order: tuple[int, ...]) -> NDArray[np.generic]:
    return np.ascontiguousarray(tensor.numpy().transpose(order))
