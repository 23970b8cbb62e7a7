"""One quantizer per tensor: readers of the same tensor (q, k, v) share its balance, codes and scales."""

from __future__ import annotations

import onnx_ir as ir

from export.dialect.graph import (
    BALANCE,
    DEQUANTIZERS,
    QUANTIZERS,
    attribute,
    constant,
    drop_unused,
    has_role,
    inputs_of,
    name_of,
    stored_array,
)
from export.dialect.ops import DOMAIN
from pipeline.passes.rewrite import RewritePass


class ShareQuantizers(RewritePass):
    """Replace a quantizer of x by an earlier quantizer of x of the same format and scaling.

    Before, factors and offsets per channel are merged where they are equal; after, the nodes that decode the same
    codes. Quantizers of the same tensor in another way stay (refused): their codes differ.
    """

    def rewrite(self, model: ir.Model) -> None:
        for role in BALANCE:
            self._merge_balance(model.graph, role)
        for op_types in (QUANTIZERS, DEQUANTIZERS):
            self._merge(model.graph, op_types)
        if self.fired:
            drop_unused(model)

    def _merge_balance(self, graph: ir.Graph, role: str) -> None:
        first_of: dict[tuple[ir.Value | None, bytes], ir.Node] = {}
        for node in list(graph):
            array = constant(inputs_of(node).B) if has_role(node, role) else None
            if array is not None:
                self._replace(graph, node, first_of.setdefault((inputs_of(node).A, array.tobytes()), node))

    def _merge(self, graph: ir.Graph, op_types: tuple[str, ...]) -> None:
        first_of: dict[tuple[ir.Value | None, ...], dict[str, ir.Node]] = {}
        for node in list(graph):
            if node.domain != DOMAIN or node.op_type not in op_types:
                continue
            computed = tuple(value for value in node.inputs if value is None or not value.is_initializer())
            ways = first_of.setdefault(computed, {})
            first = ways.setdefault(way_of(node), node)
            self._replace(graph, node, first)
            if first is node and len(ways) > 1:
                others = ", ".join(f"{key} ({name_of(n)})" for key, n in ways.items() if n is not node)
                self.refuse(node.name, f"the tensor is also quantized as {others}; {way_of(node)} differs")

    def _replace(self, graph: ir.Graph, node: ir.Node, first: ir.Node) -> None:
        if first is not node:
            ir.convenience.replace_all_uses_with(node.outputs, first.outputs)
            graph.remove(node, safe=True)
            self.fired += 1


def way_of(node: ir.Node) -> str:
    """Format and scaling of a quantizer or its inverse, in words that are equal only if both are.

    A static quantizer is told by the numbers of its stored scale and zero.
    """
    words = [str(attribute(node, "format"))]
    if group := attribute(node, "group_size"):
        words.append(f"in groups of {group}")
    if node.op_type in ("QuantizeStatic", "DequantizeStatic"):
        for word, value in (("at scale", inputs_of(node).scale), ("from", inputs_of(node).zero)):
            words += [f"{word} {float(stored_array(value)[0])!r}"] if value.is_initializer() else []
    return " ".join(words)
