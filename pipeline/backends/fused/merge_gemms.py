"""Linears that read the same codes -> one GEMM and a Split: q, k and v in one launch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.dialect.graph import GraphBuilder, add_initializer, attribute, is_op, lazy_tensor
from pipeline.backends.fused.ops import DOMAIN, OPERANDS_KEY, fused_inputs, fused_node, fused_outputs
from pipeline.passes.probes import ProbeRow
from pipeline.passes.rewrite import RewritePass
from plugins.gpu.tiles import MERGED_COLUMNS

# Input of a Gemm that has a row for each output channel -> what the joined constant is called. Indices of multipliers
# may have one row for all channels.
BY_CHANNEL = {"codes": "codes", "w_scales": "scales", "multiplier_codes": "multipliers", "bias": "bias"}
FORMATS = ("activation_format", "weight_format", "in_features", "group_size", "multipliers")


class MergeGemms(RewritePass):
    """Gemm, Gemm, ... of the same codes, formats and groups -> one Gemm of all their channels and a Split, as long as
    it has no more than MERGED_COLUMNS.

    A Gemm with an epilogue reads other inputs as well and stays alone. Constants are joined when the model is written.
    """

    def rewrite(self, model: ir.Model) -> None:
        # Name of the sums of a linear -> name of the merged sums, first column, number of columns.
        self.places: dict[str, tuple[str, int, int]] = {}
        alike: dict[Hashable, list[ir.Node]] = {}
        for node in model.graph:
            if is_op(node, "Gemm", DOMAIN):
                alike.setdefault(_key(node), []).append(node)
        for nodes in alike.values():
            for part in _parts(nodes):
                if len(part) > 1:
                    self._merge(model.graph, part)

    def _merge(self, graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
        first, name, widths = nodes[0], "+".join(str(node.name) for node in nodes), [_width(node) for node in nodes]
        joined = {port: _joined(graph, nodes, port, f"{name}.{key}") for port, key in BY_CHANNEL.items()}
        attributes = {key: item.value for key, item in first.attributes.items()} | {"layer": name}
        merged = fused_node("Gemm", fused_inputs(first).by_name() | joined, name, first, **attributes)
        graph.insert_before(first, merged)
        sizes = add_initializer(graph, ir.tensor(np.array(widths, np.int64), name=f"{name}/split/sizes"))
        operands = [fused_outputs(merged).y, sizes]
        split = GraphBuilder(graph, first, name).node("Split", operands, "split", {"axis": -1}, outputs=len(widths))
        ends = np.cumsum(widths).tolist()
        for node, part, end, width in zip(nodes, split.outputs, ends, widths, strict=True):
            y, sums = fused_outputs(node).y, fused_outputs(node).sums
            part.name, part.shape, part.type = y.name, y.shape, y.type
            ir.convenience.replace_all_uses_with(y, part, replace_graph_outputs=True)
            self.places[str(sums.name)] = (str(fused_outputs(merged).sums.name), end - width, width)
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
    groups = _tensor(gemm, "w_scales").shape[1]
    operands = gemm.metadata_props.get(OPERANDS_KEY)
    return (fused_inputs(gemm).a_codes, fused_inputs(gemm).a_scale, formats, groups, operands)


def _parts(nodes: Sequence[ir.Node]) -> list[list[ir.Node]]:
    """The nodes in order, in parts of up to MERGED_COLUMNS channels."""
    parts: list[list[ir.Node]] = [[]]
    for node in nodes:
        if parts[-1] and sum(_width(member) for member in (*parts[-1], node)) > MERGED_COLUMNS:
            parts.append([])
        parts[-1].append(node)
    return parts


def _tensor(gemm: ir.Node, port: str) -> ir.TensorProtocol:
    tensor = ir.convenience.get_const_tensor(getattr(fused_inputs(gemm), port))
    assert tensor is not None, f"{port} of {gemm.name} is no constant"
    return tensor


def _width(gemm: ir.Node) -> int:
    """Output channels."""
    return int(_tensor(gemm, "codes").shape[0])  # type: ignore[arg-type]


def _joined(graph: ir.Graph, nodes: Sequence[ir.Node], port: str, name: str) -> ir.Value:
    """An initializer of the nodes' constants at `port`, one after the other."""
    tensors, widths = [_tensor(node, port) for node in nodes], [_width(node) for node in nodes]
    shape = (sum(widths), *tensors[0].shape.numpy()[1:])

    def rows() -> NDArray:
        pairs = zip(tensors, widths, strict=True)
        return np.concatenate([np.broadcast_to(t.numpy(), (width, *t.numpy().shape[1:])) for t, width in pairs])

    return add_initializer(graph, lazy_tensor(name, tensors[0].dtype, shape, rows))
