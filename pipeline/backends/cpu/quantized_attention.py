"""Quantized attention by the kernel library (plugins/cpu/quantized_attention.h): AttentionOperands makes bytes of keys
and values, QuantizedAttention reads them. Of keys that do not change from step to step the bytes are what is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from export.dialect.graph import Attributes, attribute, inputs_of, is_op, new_node, replace, result_of
from export.dialect.ops import ABSMAX_FLOOR
from export.dialect.ops import DOMAIN as DIALECT
from export.formats.format import Format, get_format
from pipeline.backends.cpu.quantizers import rounding_factor
from pipeline.backends.sizes import evaluated
from pipeline.passes.rewrite import RewritePass
from plugins.cpu.attention_operands import head_bytes
from plugins.cpu.library import DOMAIN

OP, OPERANDS = "QuantizedAttention", "AttentionOperands"
U8 = ir.TensorType(ir.DataType.UINT8)


class UseQuantizedAttention(RewritePass):
    """QuantizedAttention of the dialect -> the two ops of the kernel library."""

    def rewrite(self, model: ir.Model) -> None:
        for node in [node for node in model.graph if is_op(node, OP, DIALECT)]:
            ports, name = inputs_of(node), node.name or result_of(node).name
            assert name is not None
            choices = {key: attribute(node, key) for key in ("layer", "qk_format", "pv_format", "scale")}
            inputs = (ports.q, ports.k, ports.v, ports.mask)
            first, second = attention_nodes(inputs, name, choices, node.metadata_props)
            replace(model.graph, node, second)
            model.graph.insert_before(second, first)
            self.fired += 1


def attention_nodes(
    inputs: Sequence[ir.Value | None], name: str, choices: Attributes, metadata: Mapping[str, str]
) -> tuple[ir.Node, ir.Node]:
    """AttentionOperands of k and v, and QuantizedAttention of q, what that makes, and the mask.

    inputs: q, k, v and a mask or None; choices: those of the dialect's op. The codes' formats are the first one's to
    say; the other has the numbers by which it makes codes of q, and what bounds its sums of values."""
    q, k, v, mask = inputs
    assert k is not None
    formats = {key: choices[key] for key in ("qk_format", "pv_format")}
    qk, pv = (grid_numbers(get_format(str(formats[f"{part}_format"]))) for part in ("qk", "pv"))
    of_tokens = {f"qk_{key}": number for key, number in qk.items()} | {"absmax_floor": ABSMAX_FLOOR}
    of_values = {f"pv_{key}": number for key, number in pv.items()}
    first = new_node(DOMAIN, OPERANDS, [k, v], f"{name}/operands", formats | of_tokens | of_values, 1, metadata)
    operands = result_of(first)
    operands.name, operands.type, operands.shape = f"{name}/operands", U8, _shape_of_operands(k)
    own = {key: choices[key] for key in choices if key not in formats}
    told = own | of_tokens | {"pv_kmax": of_values["pv_kmax"]}
    return first, new_node(DOMAIN, OP, [q, operands, mask], name, told, 1, metadata)


def _shape_of_operands(k: ir.Value) -> ir.Shape | None:
    """[samples, heads, bytes of a head] for keys [samples, heads, keys, size], as far as their sizes are known."""
    if k.shape is None or k.shape.rank() != 4:
        return None
    samples, heads, keys, size = k.shape
    text = str(keys) if isinstance(keys, int) else keys.value
    if text is None or not isinstance(size, int) or not (text.isidentifier() or text.isdigit()):
        return ir.Shape([samples, heads, None])
    expression = head_bytes(text, size)
    known = evaluated(expression, {})
    return ir.Shape([samples, heads, expression if known is None else known])


def grid_numbers(fmt: Format) -> dict[str, float]:
    """How numbers become integers of a format: `Grid` of plugins/cpu/quantized_attention.h."""
    factor = rounding_factor(fmt) if len(fmt.binade_starts) else 0.0
    return {"max_value": fmt.max_value, "kmax": float(fmt.kmax), "rounding_factor": factor}
