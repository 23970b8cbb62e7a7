"""The quantizer of the CPU lowering as one TokenChain: what `quantizers.quantize` says in eleven standard ops."""

from __future__ import annotations

import onnx_ir as ir

from export.dialect.graph import GraphBuilder
from export.formats.format import Format
from export.formats.operands import SMALL_ZERO, limb_base, zero_point
from pipeline.backends.cpu.quantizers import Operand, rounding_factor
from pipeline.backends.cpu.token_chain import In, Out, chain_node

U8 = ir.TensorType(ir.DataType.UINT8)


def quantize_with_chain(build: GraphBuilder, x: ir.Value, fmt: Format, limbs: int) -> Operand:
    """x f32 [..., K] -> u8 operands [..., K] and scale [..., 1], bit for bit those of `quantize`."""
    one, base = limbs == 1, limb_base(fmt.kmax, limbs)
    zero = zero_point(fmt.kmax) if one else SMALL_ZERO
    places = {Out.CODES: ("codes" if one else "high", U8), Out.SCALE: ("scale", x.type)}
    if not one:
        places[Out.LOW_CODES] = ("low", U8)
    node = chain_node(
        {In.X: x},
        f"{build.prefix}/{places[Out.CODES][0]}",
        build.metadata,
        max_value=fmt.max_value,
        kmax=float(fmt.kmax),
        rounding_factor=rounding_factor(fmt) if len(fmt.binade_starts) else 0.0,
        zero=zero,
        limb_base=0 if one else base,
    )
    build.graph.insert_before(build.before, node)
    for place, (name, kind) in places.items():
        node.outputs[place].name, node.outputs[place].type = f"{build.prefix}/{name}", kind
    codes = (node.outputs[Out.CODES],) if one else (node.outputs[Out.CODES], node.outputs[Out.LOW_CODES])
    return Operand(x, codes, (1,) if one else (base, 1), zero, node.outputs[Out.SCALE])
