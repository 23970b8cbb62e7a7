"""One quantizer per tensor: readers of the same tensor (q, k, v) share its codes and scales."""

from __future__ import annotations

import onnx_ir as ir

from export.ops import DOMAIN
from pipeline.passes.graph import attribute, drop_unused, is_op, name_of
from pipeline.passes.refusal import RewritePass


class ShareQuantizers(RewritePass):
    """Replace QuantizeActivation(x) by an earlier QuantizeActivation(x) of the same format.

    Also merges the DequantizeActivation nodes that then read the same codes. Quantizers of the same tensor in another
    format stay (refused): their codes differ.
    """

    def rewrite(self, model: ir.Model) -> None:
        for op_type in ("QuantizeActivation", "DequantizeActivation"):
            self._merge(model.graph, op_type)
        if self.fired:
            drop_unused(model)

    def _merge(self, graph: ir.Graph, op_type: str) -> None:
        first_of: dict[tuple[ir.Value | None, ...], dict[str, ir.Node]] = {}
        for node in list(graph):
            if not is_op(node, op_type, DOMAIN):
                continue
            of_format = first_of.setdefault(tuple(node.inputs), {})
            first = of_format.setdefault(str(attribute(node, "format")), node)
            if first is not node:
                ir.convenience.replace_all_uses_with(node.outputs, first.outputs)
                graph.remove(node, safe=True)
                self.fired += 1
            elif len(of_format) > 1:
                others = ", ".join(f"{key} ({name_of(n)})" for key, n in of_format.items() if n is not node)
                self.refuse(node.name, f"the tensor is also quantized as {others}; {attribute(node, 'format')} differs")
