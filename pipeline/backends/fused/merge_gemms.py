"""Linears that read the same codes -> one GEMM and a Split: q, k and v are one plugin, in one launch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from pipeline.backends.base import ProbeRow
from pipeline.backends.fused.lower import OPERANDS_KEY
from pipeline.backends.fused.ops import DOMAIN, fused_node
from pipeline.passes.emit import initializer
from pipeline.passes.graph import attribute, is_op
from pipeline.passes.rewrite import RewritePass
from plugins.gpu.tiles import MERGED_COLUMNS

# Inputs of a Gemm that have a row for each output channel, by place; indices of multipliers may have one for all.
BY_CHANNEL = {2: "codes", 3: "scales", 4: "multipliers", 5: "bias"}
FORMATS = ("activation_format", "weight_format", "in_features", "group_size", "multipliers")


class MergeGemms(RewritePass):
    """Gemm, Gemm, ... of the same codes, formats and groups -> one Gemm of all their channels and a Split, as long as
    it has no more than MERGED_COLUMNS.

    A Gemm with an epilogue reads other inputs as well and stays alone. Constants are joined when the model is written.
    """

    def rewrite(self, model: ir.Model) -> None:
        # Name of the sums of a linear -> name of the merged sums, first column, number of columns.
        self.places: dict[str, tuple[str, int, int]] = {}
        groups: dict[Hashable, list[ir.Node]] = {}
        for node in model.graph:
            if is_op(node, "Gemm", DOMAIN):
                groups.setdefault(_key(node), []).append(node)
        for nodes in groups.values():
            for part in _parts(nodes):
                if len(part) > 1:
                    self._merge(model.graph, part)

    def _merge(self, graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
        name, widths = "+".join(str(node.name) for node in nodes), [_width(node) for node in nodes]
        joined = [_joined(graph, nodes, place, f"{name}.{key}") for place, key in BY_CHANNEL.items()]
        given = {key: found.value for key, found in nodes[0].attributes.items()} | {"layer": name}
        merged = fused_node("Gemm", [*nodes[0].inputs[:2], *joined], name, nodes[0], **given)
        split = _split(graph, merged.outputs[0], widths, f"{name}/split")
        graph.insert_before(nodes[0], [merged, split])
        ends = np.cumsum(widths).tolist()
        for node, part, end, width in zip(nodes, split.outputs, ends, widths, strict=True):
            y, sums = node.outputs
            part.name, part.shape, part.type = y.name, y.shape, y.type
            ir.convenience.replace_all_uses_with(y, part, replace_graph_outputs=True)
            self.places[str(sums.name)] = (str(merged.outputs[1].name), end - width, width)
            graph.remove(node, safe=True)
        self.fired += 1

    def probe(self, row: ProbeRow) -> ProbeRow:
        """The row of a linear with its sums where they are now."""
        if row.gemm not in self.places:
            return row
        sums, first, count = self.places[row.gemm]
        return replace(row, gemm=sums, gemm_columns=(first, count))


def _key(gemm: ir.Node) -> Hashable:
    """Equal for Gemms that may become one."""
    formats = tuple(str(attribute(gemm, name)) for name in FORMATS)
    return (*gemm.inputs[:2], formats, _tensor(gemm, 3).shape[1], gemm.metadata_props.get(OPERANDS_KEY))


def _parts(nodes: Sequence[ir.Node]) -> list[list[ir.Node]]:
    """The nodes in order, in parts of up to MERGED_COLUMNS channels."""
    parts: list[list[ir.Node]] = [[]]
    for node in nodes:
        if parts[-1] and sum(_width(member) for member in (*parts[-1], node)) > MERGED_COLUMNS:
            parts.append([])
        parts[-1].append(node)
    return parts


def _tensor(gemm: ir.Node, place: int) -> ir.TensorProtocol:
    tensor = ir.convenience.get_const_tensor(gemm.inputs[place])  # type: ignore[arg-type]
    assert tensor is not None, f"input {place} of {gemm.name} is no constant"
    return tensor


def _width(gemm: ir.Node) -> int:
    """Output channels."""
    return int(_tensor(gemm, 2).shape[0])  # type: ignore[arg-type]


def _joined(graph: ir.Graph, nodes: Sequence[ir.Node], place: int, name: str) -> ir.Value:
    """An initializer of the nodes' constants at `place`, one after the other."""
    tensors, widths = [_tensor(node, place) for node in nodes], [_width(node) for node in nodes]
    shape = ir.Shape((sum(widths), *tensors[0].shape.numpy()[1:]))

    def rows() -> NDArray:
        pairs = zip(tensors, widths, strict=True)
        return np.concatenate([np.broadcast_to(t.numpy(), (width, *t.numpy().shape[1:])) for t, width in pairs])

    return initializer(
        graph, ir.LazyTensor(lambda: ir.tensor(rows(), name=name), tensors[0].dtype, ir.Shape(shape), name=name)
    )


def _split(graph: ir.Graph, y: ir.Value, widths: Sequence[int], name: str) -> ir.Node:
    """Split of the last axis."""
    sizes = initializer(graph, ir.tensor(np.array(widths, np.int64), name=f"{name}/sizes"))
    axis = ir.convenience.convert_attributes({"axis": -1})
    return ir.Node("", "Split", [y, sizes], axis, num_outputs=len(widths), name=name)
