"""The custom ONNX ops of domain `fpq`: one row each with schema, shape rule, NumPy meaning and function body.

Two rules for who writes a graph with them:

- Every input is always passed. A weight without multipliers gets the table `multipliers=(1,)` and the codes
  `no_multipliers(in_features, group_size)`; a GEMM without bias gets zeros [N]. (A function body has no portable way
  to ask whether an optional input is there.)
- Attributes come from `attributes(op, **choices)`, which adds the tables of the format that the body reads.

A model carries `OPS[name].function()` of each op it uses and imports DOMAIN at VERSION; then any ONNX runtime with
opset 21 runs it. Registering the schemas with onnx is optional (`register_schemas`) and needed by no runtime.

A runtime that folds constants decodes all weights at load and holds every step of it meanwhile: onnxruntime 1.31 about
38 bytes per weight. For large models turn that off: `InferenceSession(path, disabled_optimizers=["ConstantFolding"])`
holds the packed codes only and decodes in every run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper
from onnx.defs import OpSchema, has, register_schema

from export.dialect import functions as op_bodies
from export.dialect import op_tables
from export.dialect import reference as op_meanings
from export.dialect.reference import ABSMAX_FLOOR, no_multipliers
from export.formats.format import get_format, packed_size

__all__ = ["ABSMAX_FLOOR", "DOMAIN", "OPS", "VERSION", "Op", "attributes", "make_node", "no_multipliers"]

DOMAIN = "fpq"
VERSION = 1
Shape = tuple[int | str | None, ...]
Outputs = list[tuple[int, Shape]]  # (TensorProto element type, shape) of each output

U8, F32 = TensorProto.UINT8, TensorProto.FLOAT
INT, INTS, FLOAT, FLOATS = AttributeProto.INT, AttributeProto.INTS, AttributeProto.FLOAT, AttributeProto.FLOATS
STRING = AttributeProto.STRING
ATTRIBUTE_TYPES = {
    INT: OpSchema.AttrType.INT,
    INTS: OpSchema.AttrType.INTS,
    FLOAT: OpSchema.AttrType.FLOAT,
    FLOATS: OpSchema.AttrType.FLOATS,
    STRING: OpSchema.AttrType.STRING,
}
TYPE_NAMES: dict[Any, str] = {U8: "tensor(uint8)", F32: "tensor(float)"}


@dataclass(frozen=True)
class Op:
    """One custom op.

    inputs and outputs: name -> element type. attributes: name -> (type, meaning). numpy(*inputs, **attributes) ->
    tuple of arrays. body appends the function body's nodes. infer(attributes, *input shapes) -> outputs' types and
    shapes. tables(**choices) -> the attributes that follow from what the user chooses.
    """

    name: str
    doc: str
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    attributes: dict[str, tuple[Any, str]]
    numpy: Callable[..., tuple[Any, ...]]
    body: op_bodies.Builder
    infer: Callable[..., Outputs]
    tables: Callable[..., dict[str, Any]]

    def function(self) -> FunctionProto:
        """The op as an ONNX function in standard ops."""
        body = op_bodies.Body({name: kind for name, (kind, _) in self.attributes.items()})
        self.body(body)
        opsets = [helper.make_opsetid("", op_bodies.OPSET)]
        return helper.make_function(
            DOMAIN, self.name, list(self.inputs), list(self.outputs), body.nodes, opsets, list(self.attributes)
        )

    def schema(self) -> OpSchema:
        """The op as an onnx schema with shape inference; register it with `register_schemas` where wanted."""
        schema = OpSchema(
            self.name,
            DOMAIN,
            VERSION,
            self.doc,
            inputs=[OpSchema.FormalParameter(name, TYPE_NAMES[kind]) for name, kind in self.inputs.items()],
            outputs=[OpSchema.FormalParameter(name, TYPE_NAMES[kind]) for name, kind in self.outputs.items()],
            attributes=[
                OpSchema.Attribute(name, ATTRIBUTE_TYPES[kind], doc) for name, (kind, doc) in self.attributes.items()
            ],
        )
        schema.set_type_and_shape_inference_function(partial(_infer_in_onnx, self))
        return schema


def _infer_in_onnx(op: Op, context: Any) -> None:
    shapes = [_shape_of(context.get_input_type(i)) for i in range(len(op.inputs))]
    if any(shape is None for shape in shapes):
        return
    found = {name: context.get_attribute(name) for name in op.attributes}
    values = {name: helper.get_attribute_value(value) for name, value in found.items() if value is not None}
    for index, (kind, shape) in enumerate(op.infer(values, *shapes)):
        context.set_output_type(index, helper.make_tensor_type_proto(kind, shape))


def _shape_of(type_proto: Any) -> Shape | None:
    if type_proto is None or not type_proto.tensor_type.HasField("shape"):
        return None
    return tuple(
        d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in type_proto.tensor_type.shape.dim
    )


# --- shape rules ---------------------------------------------------------------------------------------------------


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _infer_dequantize_weight(attributes: dict, codes: Shape, *_: Shape) -> Outputs:
    return [(F32, (attributes["in_features"], codes[0]))]


def _infer_quantize_weight(attributes: dict, w: Shape, *_: Shape) -> Outputs:
    bits = get_format(_text(attributes["format"])).bits
    return [(U8, (w[1], packed_size(bits, attributes["in_features"])))]


def _infer_quantizer(_attributes: dict, x: Shape, *_: Shape) -> Outputs:
    return [(U8, x), (F32, (*x[:-1], 1))]


def _infer_quantize_static(_attributes: dict, x: Shape, *_: Shape) -> Outputs:
    return [(U8, x)]


def _infer_quantize_groups(attributes: dict, x: Shape) -> Outputs:
    return [(U8, x), (F32, (*x[:-1], attributes["groups"]))]


def _infer_dequantize_activation(_attributes: dict, codes: Shape, *_: Shape) -> Outputs:
    return [(F32, codes)]


def _infer_packed_gemm(_attributes: dict, a: Shape, _scale: Shape, w: Shape, *_: Shape) -> Outputs:
    return [(F32, (*a[:-1], w[0]))]


# --- the table -----------------------------------------------------------------------------------------------------

_GROUPING = {
    "in_features": (INT, "K, input channels"),
    "group_size": (INT, "input channels that share a multiplier or scale; 0: the whole row"),
    "multipliers": (INTS, "table of at most 16 small integers that multiplier_codes index; (1,) for none"),
    "groups": (INT, "K / group_size, or 1"),
}
_FORMAT = {"format": (STRING, "name of the number format")}
_QUANTIZER = {
    "max_value": (FLOAT, "largest magnitude"),
    "thresholds": (FLOATS, "binade starts above the first; [inf] for integers"),
    "steps": (FLOATS, "distance of neighbouring values in each binade"),
    "binade_codes": (INT, "codes per binade"),
    "max_code": (INT, "code of max_value"),
    "negative_codes": (INTS, "code of minus the value, for every code up to max_code; 0 for 0, so -0 never occurs"),
}
_BITS = {"bits": (INT, "bits of a code")}
_VALUES = {"values": (FLOATS, "value of every code")}
_ACTIVATION_GROUPS = {
    "group_size": (INT, "input channels of a token that share a scale"),
    "groups": (INT, "K / group_size"),
}
_GEMM_INPUTS = {"a_codes": U8, "a_scale": F32, "w_codes": U8, "w_scales": F32, "multiplier_codes": U8, "bias": F32}
_GEMM = {
    "layer": (STRING, "name of the layer, for people and passes"),
    "activation_format": (STRING, "number format of a_codes"),
    "weight_format": (STRING, "number format of w_codes"),
    **_GROUPING,
    "activation_values": (FLOATS, "value of every activation code"),
    "weight_values": (FLOATS, "value of every weight code"),
    "weight_bits": (INT, "bits of a weight code"),
}
_WEIGHT_INPUTS = {"scales": F32, "multiplier_codes": U8}

_ROWS = (
    Op(
        "DequantizeWeight",
        "codes u8 [N, packed], scales f32 [N, 1 or groups], multiplier_codes u8 [N or 1, ceil(groups / 2)] -> "
        "w f32 [K, N] = value * multiplier * scale. Element 2i of a row is the low nibble of byte i.",
        {"codes": U8, **_WEIGHT_INPUTS},
        {"w": F32},
        {**_FORMAT, **_GROUPING, **_BITS, **_VALUES},
        op_meanings.dequantize_weight,
        op_bodies.dequantize_weight,
        _infer_dequantize_weight,
        op_tables.dequantize_weight,
    ),
    Op(
        "QuantizeWeight",
        "w f32 [K, N], scales, multiplier_codes as in DequantizeWeight -> codes u8 [N, packed]: nearest, ties to even, "
        "saturating, -0 folded to +0. w must be finite: no weight code stands for NaN.",
        {"w": F32, **_WEIGHT_INPUTS},
        {"codes": U8},
        {**_FORMAT, **_GROUPING, **_BITS, **_QUANTIZER},
        op_meanings.quantize_weight,
        op_bodies.quantize_weight,
        _infer_quantize_weight,
        op_tables.quantize_weight,
    ),
    Op(
        "QuantizeActivation",
        "x f32 [..., K] -> codes u8 [..., K], scale f32 [..., 1] = max(absmax, 1e-30) / max_value of the token; "
        "nearest, ties to even, saturating, -0 folded to +0. A token with NaN or Inf has scale NaN and codes 0.",
        {"x": F32},
        {"codes": U8, "scale": F32},
        {**_FORMAT, **_QUANTIZER},
        op_meanings.quantize_activation,
        partial(op_bodies.quantize_activation, floor=ABSMAX_FLOOR),
        _infer_quantizer,
        op_tables.quantize_activation,
    ),
    Op(
        "DequantizeActivation",
        "codes u8 [..., K], scale f32 [..., 1] -> x f32 [..., K] = value * scale.",
        {"codes": U8, "scale": F32},
        {"x": F32},
        {**_FORMAT, **_VALUES},
        op_meanings.dequantize_activation,
        op_bodies.dequantize_activation,
        _infer_dequantize_activation,
        op_tables.dequantize_activation,
    ),
    Op(
        "QuantizeStatic",
        "x f32 [..., K], scale f32 [1], zero f32 [1] -> codes u8 [..., K] of (x - zero) / scale; nearest, ties to "
        "even, saturating, -0 folded to +0. NaN has the code 0.",
        {"x": F32, "scale": F32, "zero": F32},
        {"codes": U8},
        {**_FORMAT, **_QUANTIZER},
        op_meanings.quantize_static,
        op_bodies.quantize_static,
        _infer_quantize_static,
        op_tables.quantize_static,
    ),
    Op(
        "DequantizeStatic",
        "codes u8 [..., K], scale f32 [1], zero f32 [1] -> x f32 [..., K] = value * scale + zero.",
        {"codes": U8, "scale": F32, "zero": F32},
        {"x": F32},
        {**_FORMAT, **_VALUES},
        op_meanings.dequantize_static,
        op_bodies.dequantize_static,
        _infer_dequantize_activation,
        op_tables.dequantize_static,
    ),
    Op(
        "QuantizeGroups",
        "x f32 [..., K] -> codes u8 [..., K], scale f32 [..., K / group_size]: QuantizeActivation of each token's "
        "groups of input channels.",
        {"x": F32},
        {"codes": U8, "scale": F32},
        {**_FORMAT, **_ACTIVATION_GROUPS, **_QUANTIZER},
        op_meanings.quantize_groups,
        partial(op_bodies.quantize_groups, floor=ABSMAX_FLOOR),
        _infer_quantize_groups,
        op_tables.quantize_groups,
    ),
    Op(
        "DequantizeGroups",
        "codes u8 [..., K], scale f32 [..., K / group_size] -> x f32 [..., K] = value * scale of its group.",
        {"codes": U8, "scale": F32},
        {"x": F32},
        {**_FORMAT, **_ACTIVATION_GROUPS, **_VALUES},
        op_meanings.dequantize_groups,
        op_bodies.dequantize_groups,
        _infer_dequantize_activation,
        op_tables.dequantize_groups,
    ),
    Op(
        "PackedGemm",
        "a_codes u8 [..., K], a_scale f32 [..., 1] or [1], w_codes u8 [N, packed], w_scales f32 [N, 1 or groups], "
        "multiplier_codes u8 [N or 1, ceil(groups / 2)], bias f32 [N] -> y f32 [..., N] = "
        "(sum of unscaled products) * w_scale * a_scale + bias.",
        _GEMM_INPUTS,
        {"y": F32},
        _GEMM,
        op_meanings.packed_gemm,
        op_bodies.packed_gemm,
        _infer_packed_gemm,
        op_tables.packed_gemm,
    ),
    Op(
        "PackedGroupGemm",
        "As PackedGemm with a_scale f32 [..., K / activation_group] -> y f32 [..., N] = sum over sum_groups of "
        "(sum of unscaled products) * a_scale * w_scale, + bias.",
        _GEMM_INPUTS,
        {"y": F32},
        {
            **_GEMM,
            "activation_group": (INT, "input channels that share a scale of a token"),
            "scale_groups": (INT, "real scales of a weight row"),
            "sum_groups": (INT, "sums of a row, within which neither scale changes"),
        },
        op_meanings.packed_group_gemm,
        op_bodies.packed_group_gemm,
        _infer_packed_gemm,
        op_tables.packed_group_gemm,
    ),
    Op(
        "NormModulateQuantize",
        "x f32 [B, S, C], shift and scale f32 [B, 1, C] -> codes u8 [B, S, C], a_scale f32 [B, S, 1]: "
        "QuantizeActivation of LayerNorm(x) * (1 + scale) + shift, the norm without affine parameters.",
        {"x": F32, "shift": F32, "scale": F32},
        {"codes": U8, "a_scale": F32},
        {**_FORMAT, "epsilon": (FLOAT, "added to the variance"), **_QUANTIZER},
        op_meanings.norm_modulate_quantize,
        partial(op_bodies.norm_modulate_quantize, floor=ABSMAX_FLOOR),
        _infer_quantizer,
        op_tables.norm_modulate_quantize,
    ),
    Op(
        "GeluQuantize",
        "x f32 [..., K] -> codes u8 [..., K], scale f32 [..., 1]: QuantizeActivation of GELU(x) in its tanh form.",
        {"x": F32},
        {"codes": U8, "scale": F32},
        {**_FORMAT, **_QUANTIZER},
        op_meanings.gelu_quantize,
        partial(op_bodies.gelu_quantize, floor=ABSMAX_FLOOR),
        _infer_quantizer,
        op_tables.gelu_quantize,
    ),
)
OPS: dict[str, Op] = {row.name: row for row in _ROWS}


def attributes(op_name: str, **choices: Any) -> dict[str, Any]:
    """All attributes of a node of op `op_name`, the format's tables included, for `onnx.helper.make_node`.

    choices: DequantizeWeight and QuantizeWeight take format, in_features, group_size and multipliers (default (1,));
    GeluQuantize, QuantizeActivation, QuantizeStatic and the inverses of these two format; QuantizeGroups and its
    inverse format, in_features and group_size; PackedGemm layer, activation_format, weight_format, in_features,
    group_size, multipliers; PackedGroupGemm besides activation_group and scale_groups; NormModulateQuantize format and
    epsilon. Raises RecipeError for an unknown format, ContractError for sizes that do not fit.
    """
    return OPS[op_name].tables(**choices)


def make_node(op_name: str, inputs: list[str], outputs: list[str], name: str = "", **choices: Any) -> NodeProto:
    """A node of op `op_name` with its attributes from `choices` (see `attributes`)."""
    return helper.make_node(op_name, inputs, outputs, name=name, domain=DOMAIN, **attributes(op_name, **choices))


def register_schemas() -> None:
    """Make onnx's checker and shape inference know the ops (process-wide; a second call changes nothing)."""
    for op in OPS.values():
        if not has(op.name, DOMAIN):
            register_schema(op.schema())
