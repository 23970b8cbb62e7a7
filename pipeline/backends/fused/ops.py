"""The ops of a graph lowered for our GPU kernels (`cuda`, `trt`, plugins of `rtx`): a row each, with inputs,
outputs and ONNX function body.

Each row is what one kernel (or one call of torch) does. The function body says the same in standard ops, so stock
onnxruntime runs the lowered graph, too. Outputs that only a parity gate asks for are marked; an engine that nobody
asks for them does not compute them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx_ir as ir
from onnx import AttributeProto, FunctionProto, TensorProto, helper

from export.dialect import functions
from export.dialect.functions import Body
from export.dialect.graph import Ports, new_node
from export.dialect.ops import ABSMAX_FLOOR, FLOAT, FLOATS, INT, INTS, STRING, attributes
from plugins.gpu.spec import Epilogue
from plugins.gpu.table import gemm_inputs

DOMAIN, VERSION = "fpq.cuda", 1
# Metadata of quantizers and GEMMs whose codes are INT8 integers by choice: "int8", or "auto" if the GPU decides.
OPERANDS_KEY = "fpq.operands"
F32, U8 = ir.DataType.FLOAT, ir.DataType.UINT8


@dataclass(frozen=True)
class FusedOp:
    """inputs: names. outputs: name -> element type, those of `proof` read by parity gates only. attributes: name ->
    type. body appends the function body's nodes."""

    name: str
    doc: str
    inputs: tuple[str, ...]
    outputs: dict[str, ir.DataType]
    proof: frozenset[str]
    attributes: dict[str, Any]
    body: Callable[[Body], None]

    def function(self) -> FunctionProto:
        """The op as an ONNX function in standard ops."""
        body = Body(self.attributes)
        self.body(body)
        return body.function(DOMAIN, self.name, self.inputs, self.outputs)


# --- bodies ---------------------------------------------------------------------------------------------------------


def _quantized(body: Body, static: bool = False, before: Callable[[Body], str] | None = None) -> None:
    """codes of x, or of the tensor that `before` makes of it; values: the numbers that the codes stand for."""
    x = before(body) if before else "x"
    if static:
        functions.quantize_static(body, x=x)
    else:
        functions.quantize_activation(body, ABSMAX_FLOOR, x=x)
    body.op("Gather", body.attribute("values"), body.cast("codes", TensorProto.INT32), out="values")


def _gelu(body: Body) -> str:
    return body.op("Gelu", "x", approximate="tanh", out="gelu")


def _modulated(body: Body) -> str:
    one = helper.make_tensor("", TensorProto.FLOAT, [1], [1.0])
    ones = body.op("ConstantOfShape", body.op("Shape", "x", start=-1), value=one)
    normal = body.op("LayerNormalization", "x", ones, axis=-1)
    body.nodes[-1].attribute.append(AttributeProto(name="epsilon", ref_attr_name="epsilon", type=FLOAT))
    gained = body.op("Mul", normal, body.op("Add", "gain", body.number(1.0)))
    return body.op("Add", gained, "shift", out="modulated")


def _gemm_gate_residual(body: Body) -> None:
    _linear(body, "linear")
    body.op("Add", body.op("Mul", "gate", "linear"), "residual", out="y")


def _linear(body: Body, out: str) -> None:
    """sums [groups, M, N]: unscaled products added up in float64, where they are exact, and rounded once to float32."""
    groups = body.op("Shape", "w_scales", start=1, end=2)
    width = body.op("Div", body.vector(body.attribute("in_features")), groups)
    a = body.op("Gather", body.attribute("activation_values"), body.cast("a_codes", TensorProto.INT32))
    a = body.op("Transpose", body.op("Reshape", a, body.shape(body.ints(-1), groups, width)), perm=[1, 0, 2])
    w = body.op("Reshape", _weight(body), body.shape(body.ints(0), groups, width))
    w = body.op("Transpose", w, perm=[1, 2, 0])
    exact = body.op("MatMul", body.cast(a, TensorProto.DOUBLE), body.cast(w, TensorProto.DOUBLE))
    body.cast(exact, TensorProto.FLOAT, out="sums")
    w_scales = body.op("Unsqueeze", body.op("Transpose", "w_scales", perm=[1, 0]), body.ints(1))
    total = body.op("ReduceSum", body.op("Mul", "sums", w_scales), body.ints(0), keepdims=0)
    leading, n = body.op("Shape", "a_codes", start=0, end=-1), body.op("Shape", "codes", start=0, end=1)
    shaped = body.op("Reshape", total, body.shape(leading, n))
    body.op("Add", body.op("Mul", shaped, "a_scale"), "bias", out=out)


def _weight(body: Body) -> str:
    """codes -> f32 [N, groups, K / groups]: value times multiplier, exact. Codes have 4 bits, K is even."""
    groups = body.vector(body.attribute("groups"))
    value = body.op("Gather", body.attribute("values"), _nibbles(body, "codes"))
    value = body.op("Reshape", value, body.shape(body.ints(0), groups, body.ints(-1)))
    padded = body.cast(_nibbles(body, "multiplier_codes"), TensorProto.INT64)
    indices = body.op("Slice", padded, body.ints(0), groups, body.ints(1))
    factors = body.cast(body.op("Gather", body.attribute("multipliers"), indices), TensorProto.FLOAT)
    return body.op("Mul", value, body.op("Unsqueeze", factors, body.ints(-1)))


def _nibbles(body: Body, packed: str) -> str:
    """u8 [N, bytes] -> i32 [N, 2 bytes], element 2i the low nibble."""
    four, mask = (
        body.op("Constant", value=helper.make_tensor("", TensorProto.UINT8, [], [number])) for number in (4, 15)
    )
    low = body.op("Unsqueeze", body.op("BitwiseAnd", packed, mask), body.ints(-1))
    high = body.op("Unsqueeze", body.op("BitShift", packed, four, direction="RIGHT"), body.ints(-1))
    pairs = body.op("Concat", low, high, axis=-1)
    return body.cast(body.op("Reshape", pairs, body.ints(0, -1)), TensorProto.INT32)


def _attention(body: Body, masked: bool) -> None:
    scaled = body.op("Mul", "q", body.attribute("scale"))
    scores = body.op("MatMul", scaled, body.op("Transpose", "k", perm=[0, 1, 3, 2]))
    scores = body.op("Add", scores, "mask") if masked else scores
    body.op("MatMul", body.op("Softmax", scores, axis=-1), "v", out="y")


# --- the table ------------------------------------------------------------------------------------------------------

_QUANTIZER = {
    "format": STRING,
    "max_value": FLOAT,
    "thresholds": FLOATS,
    "steps": FLOATS,
    "binade_codes": INT,
    "max_code": INT,
    "negative_codes": INTS,
    "values": FLOATS,
}
_GEMM = {
    "layer": STRING,
    "activation_format": STRING,
    "weight_format": STRING,
    "in_features": INT,
    "group_size": INT,
    "multipliers": INTS,
    "groups": INT,
    "values": FLOATS,
    "activation_values": FLOATS,
}
# Fused GEMM -> epilogue of its kernel, whose inputs are the op's.
EPILOGUE_OF: dict[str, Epilogue] = {"Gemm": "none", "GemmGateResidual": "gate_residual"}
# Argument of a GEMM kernel -> the op's input, where the two differ: a graph has codes where a kernel has their bytes.
PORTS = {"a": "a_codes", "w": "codes"}


def _gemm_ports(op_name: str) -> tuple[str, ...]:
    return tuple(PORTS.get(name, name) for name in gemm_inputs(EPILOGUE_OF[op_name]))


def _quantizer(
    name: str,
    doc: str,
    inputs: tuple[str, ...] = ("x",),
    seen: str | None = None,
    before: Callable[[Body], str] | None = None,
    static: bool = False,
    **more: AttributeProto.AttributeType,
) -> FusedOp:
    """seen: the output that `before` makes, which the quantizer reads."""
    proof = [seen, "values"] if seen else ["values"]
    outputs = ["codes", *([] if static else ["scale"]), *proof]
    kinds = {name: U8 if name == "codes" else F32 for name in outputs}
    body = partial(_quantized, static=static, before=before)
    return FusedOp(name, doc, inputs, kinds, frozenset(proof), _QUANTIZER | more, body)


_ROWS = (
    _quantizer("Quantize", "x [..., K] -> codes, scale of each token; fpq.QuantizeActivation."),
    _quantizer("GeluQuantize", "Quantize of gelu(x), tanh form.", seen="gelu", before=_gelu),
    _quantizer(
        "NormModulateQuantize",
        "Quantize of LayerNorm(x) * (1 + gain) + shift; x [B, S, C], shift and gain [B, 1, C].",
        ("x", "shift", "gain"),
        seen="modulated",
        before=_modulated,
        epsilon=FLOAT,
    ),
    _quantizer(
        "QuantizeStatic",
        "x, scale [1], zero [1] -> codes of (x - zero) / scale; fpq.QuantizeStatic.",
        ("x", "scale", "zero"),
        static=True,
    ),
    _quantizer(
        "GeluQuantizeStatic",
        "QuantizeStatic of gelu(x), tanh form.",
        ("x", "scale", "zero"),
        seen="gelu",
        before=_gelu,
        static=True,
    ),
    FusedOp(
        "Gemm",
        "a_codes [..., K], a_scale [..., 1] or [1], codes [N, packed], w_scales [N, groups], multiplier_codes, bias [N]"
        " -> y [..., N]; fpq.PackedGemm. sums [groups, M, N]: the exact sums of unscaled products.",
        _gemm_ports("Gemm"),
        {"y": F32, "sums": F32},
        frozenset({"sums"}),
        _GEMM,
        partial(_linear, out="y"),
    ),
    FusedOp(
        "GemmGateResidual",
        "y = residual + gate * Gemm; gate [B or 1, 1, N], residual [B, S, N]. linear: what Gemm gives.",
        _gemm_ports("GemmGateResidual"),
        {"y": F32, "linear": F32, "sums": F32},
        frozenset({"linear", "sums"}),
        _GEMM,
        _gemm_gate_residual,
    ),
    FusedOp(
        "Attention",
        "softmax(scale * q k') v; q [B, H, S, D], k and v [B, H, T, D].",
        ("q", "k", "v"),
        {"y": F32},
        frozenset(),
        {"scale": FLOAT},
        partial(_attention, masked=False),
    ),
    FusedOp(
        "MaskedAttention",
        "softmax(scale * q k' + mask) v; mask is broadcast to [B, H, S, T].",
        ("q", "k", "v", "mask"),
        {"y": F32},
        frozenset(),
        {"scale": FLOAT},
        partial(_attention, masked=True),
    ),
)
OPS: dict[str, FusedOp] = {row.name: row for row in _ROWS}


def gemm_attributes(packed: dict[str, Any]) -> dict[str, Any]:
    """Attributes of Gemm from those of a fpq.PackedGemm."""
    renamed = packed | {"values": packed["weight_values"]}
    return {key: renamed[key] for key in _GEMM}


def quantizer_attributes(format_name: str, **choices: Any) -> dict[str, Any]:
    """Attributes of a quantizer of that format."""
    decoder = attributes("DequantizeActivation", format=format_name)
    return {**attributes("QuantizeActivation", format=format_name), "values": decoder["values"], **choices}


def fused_node(op_name: str, inputs: Sequence[ir.Value | None], name: str, like: ir.Node, **choices: Any) -> ir.Node:
    """A node of this dialect; metadata (layer, kind) is taken from `like`. Outputs have types, no names yet."""
    row = OPS[op_name]
    node = new_node(DOMAIN, op_name, inputs, name, choices, len(row.outputs), like.metadata_props)
    for output, (key, kind) in zip(node.outputs, row.outputs.items(), strict=True):
        output.name, output.type = f"{name}/{key}", ir.TensorType(kind)
    return node


def fused_inputs(node: ir.Node) -> Ports:
    """Inputs of a node of this dialect by the names of its op's row."""
    return Ports(node, OPS[node.op_type].inputs, node.inputs)


def fused_outputs(node: ir.Node) -> Ports:
    """Outputs of a node of this dialect by the names of its op's row."""
    return Ports(node, tuple(OPS[node.op_type].outputs), node.outputs)


def add_functions(model: ir.Model) -> None:
    """Give the model the function bodies of the ops of this dialect that it uses."""
    for name in sorted({node.op_type for node in model.graph if node.domain == DOMAIN}):
        function = ir.serde.deserialize_function(OPS[name].function())
        model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = VERSION
