"""The custom ONNX ops of domain `fpq`: one row each with schema, shape rule, NumPy reference and function body.

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

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper
from onnx.defs import OpSchema, has, register_schema

from export.dialect import functions, reference
from export.dialect.reference import ABSMAX_FLOOR, no_multipliers
from export.errors import ContractError
from export.formats.format import Format, get_format, packed_size

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
    body: functions.Builder
    infer: Callable[..., Outputs]
    tables: Callable[..., dict[str, Any]]

    def function(self) -> FunctionProto:
        """The op as an ONNX function in standard ops."""
        body = functions.Body({name: kind for name, (kind, _) in self.attributes.items()})
        self.body(body)
        opsets = [helper.make_opsetid("", functions.OPSET)]
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
    protos = {name: context.get_attribute(name) for name in op.attributes}
    values = {name: helper.get_attribute_value(value) for name, value in protos.items() if value is not None}
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


# --- attributes: what a user chooses, checked, and the tables that follow from the rows of the formats ----------------


def _values_of(fmt: Format) -> list[float]:
    return [float(v) for v in fmt.values]


def _quantizer_tables(fmt: Format) -> dict[str, Any]:
    """Tables of the encoder: binade starts, the step in each binade, and the code of minus each non-negative code."""
    starts = [float(v) for v in fmt.binade_starts]
    first = 1.0 if fmt.is_integer else float(np.ldexp(1.0, fmt.min_exponent - fmt.mantissa_bits))
    positive = np.arange(fmt.max_code + 1)
    return {
        "max_value": fmt.max_value,
        "thresholds": starts or [float("inf")],
        "steps": [first * 2**i for i in range(len(starts) + 1)],
        "binade_codes": 2**fmt.mantissa_bits,
        "max_code": fmt.max_code,
        "negative_codes": [int(c) for c in _negatives(fmt, positive)],
    }


def _negatives(fmt: Format, positive: Any) -> Any:
    if fmt.is_integer:
        return -positive % 2**fmt.bits
    if not fmt.sign_bits:
        return np.zeros_like(positive)
    return np.where(positive > 0, positive + 2 ** (fmt.bits - 1), 0)


def _grouping_of(in_features: int, group_size: int, multipliers: tuple[int, ...]) -> dict[str, Any]:
    if group_size and in_features % group_size:
        raise ContractError(
            f"in_features {in_features} is not a multiple of group_size {group_size}; use a divisor or 0"
        )
    if not 1 <= len(multipliers) <= 16:
        raise ContractError(f"{len(multipliers)} multipliers; a 4-bit index reaches 1 to 16 of them")
    return {
        "in_features": in_features,
        "group_size": group_size,
        "multipliers": [int(m) for m in multipliers],
        "groups": in_features // group_size if group_size else 1,
    }


def _weight_tables(*, format: str, in_features: int, group_size: int, multipliers: tuple[int, ...] = (1,)) -> dict:
    fmt = get_format(format)
    return {"format": format, "bits": fmt.bits, **_grouping_of(in_features, group_size, multipliers)}


def _dequantize_weight_tables(*, format: str, **grouping: Any) -> dict:
    return {**_weight_tables(format=format, **grouping), "values": _values_of(get_format(format))}


def _quantize_weight_tables(*, format: str, **grouping: Any) -> dict:
    return {**_weight_tables(format=format, **grouping), **_quantizer_tables(get_format(format))}


def _quantize_activation_tables(*, format: str) -> dict:
    return {"format": format, **_quantizer_tables(get_format(format))}


def _dequantize_activation_tables(*, format: str) -> dict:
    return {"format": format, "values": _values_of(get_format(format))}


def _quantize_groups_tables(*, format: str, in_features: int, group_size: int) -> dict:
    return {**_quantize_activation_tables(format=format), **_activation_groups(in_features, group_size)}


def _dequantize_groups_tables(*, format: str, in_features: int, group_size: int) -> dict:
    return {**_dequantize_activation_tables(format=format), **_activation_groups(in_features, group_size)}


def _activation_groups(in_features: int, group_size: int) -> dict:
    grouping = _grouping_of(in_features, group_size, (1,))
    return {key: grouping[key] for key in ("group_size", "groups")}


def _packed_gemm_tables(
    *,
    layer: str,
    activation_format: str,
    weight_format: str,
    in_features: int,
    group_size: int,
    multipliers: tuple[int, ...] = (1,),
) -> dict:
    return {
        "layer": layer,
        "activation_format": activation_format,
        "weight_format": weight_format,
        **_grouping_of(in_features, group_size, multipliers),
        "activation_values": _values_of(get_format(activation_format)),
        "weight_values": _values_of(get_format(weight_format)),
        "weight_bits": get_format(weight_format).bits,
    }


def _packed_group_gemm_tables(*, activation_group: int, in_features: int, scale_groups: int, **choices: Any) -> dict:
    """scale_groups: real scales of a weight row, K / group_size or 1."""
    of_activation = _activation_groups(in_features, activation_group)["groups"]
    return {
        **_packed_gemm_tables(in_features=in_features, **choices),
        "activation_group": activation_group,
        "scale_groups": scale_groups,
        "sum_groups": math.lcm(of_activation, scale_groups),
    }


def _norm_modulate_quantize_tables(*, format: str, epsilon: float) -> dict:
    return {**_quantize_activation_tables(format=format), "epsilon": epsilon}


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
        reference.dequantize_weight,
        functions.dequantize_weight,
        _infer_dequantize_weight,
        _dequantize_weight_tables,
    ),
    Op(
        "QuantizeWeight",
        "w f32 [K, N], scales, multiplier_codes as in DequantizeWeight -> codes u8 [N, packed]: nearest, ties to even, "
        "saturating, -0 folded to +0. w must be finite: no weight code stands for NaN.",
        {"w": F32, **_WEIGHT_INPUTS},
        {"codes": U8},
        {**_FORMAT, **_GROUPING, **_BITS, **_QUANTIZER},
        reference.quantize_weight,
        functions.quantize_weight,
        _infer_quantize_weight,
        _quantize_weight_tables,
    ),
    Op(
        "QuantizeActivation",
        "x f32 [..., K] -> codes u8 [..., K], scale f32 [..., 1] = max(absmax, 1e-30) / max_value of the token; "
        "nearest, ties to even, saturating, -0 folded to +0. A token with NaN or Inf has scale NaN and codes 0.",
        {"x": F32},
        {"codes": U8, "scale": F32},
        {**_FORMAT, **_QUANTIZER},
        reference.quantize_activation,
        partial(functions.quantize_activation, floor=ABSMAX_FLOOR),
        _infer_quantizer,
        _quantize_activation_tables,
    ),
    Op(
        "DequantizeActivation",
        "codes u8 [..., K], scale f32 [..., 1] -> x f32 [..., K] = value * scale.",
        {"codes": U8, "scale": F32},
        {"x": F32},
        {**_FORMAT, **_VALUES},
        reference.dequantize_activation,
        functions.dequantize_activation,
        _infer_dequantize_activation,
        _dequantize_activation_tables,
    ),
    Op(
        "QuantizeStatic",
        "x f32 [..., K], scale f32 [1], zero f32 [1] -> codes u8 [..., K] of (x - zero) / scale; nearest, ties to "
        "even, saturating, -0 folded to +0. NaN has the code 0.",
        {"x": F32, "scale": F32, "zero": F32},
        {"codes": U8},
        {**_FORMAT, **_QUANTIZER},
        reference.quantize_static,
        functions.quantize_static,
        _infer_quantize_static,
        _quantize_activation_tables,
    ),
    Op(
        "DequantizeStatic",
        "codes u8 [..., K], scale f32 [1], zero f32 [1] -> x f32 [..., K] = value * scale + zero.",
        {"codes": U8, "scale": F32, "zero": F32},
        {"x": F32},
        {**_FORMAT, **_VALUES},
        reference.dequantize_static,
        functions.dequantize_static,
        _infer_dequantize_activation,
        _dequantize_activation_tables,
    ),
    Op(
        "QuantizeGroups",
        "x f32 [..., K] -> codes u8 [..., K], scale f32 [..., K / group_size]: QuantizeActivation of each token's "
        "groups of input channels.",
        {"x": F32},
        {"codes": U8, "scale": F32},
        {**_FORMAT, **_ACTIVATION_GROUPS, **_QUANTIZER},
        reference.quantize_groups,
        partial(functions.quantize_groups, floor=ABSMAX_FLOOR),
        _infer_quantize_groups,
        _quantize_groups_tables,
    ),
    Op(
        "DequantizeGroups",
        "codes u8 [..., K], scale f32 [..., K / group_size] -> x f32 [..., K] = value * scale of its group.",
        {"codes": U8, "scale": F32},
        {"x": F32},
        {**_FORMAT, **_ACTIVATION_GROUPS, **_VALUES},
        reference.dequantize_groups,
        functions.dequantize_groups,
        _infer_dequantize_activation,
        _dequantize_groups_tables,
    ),
    Op(
        "PackedGemm",
        "a_codes u8 [..., K], a_scale f32 [..., 1] or [1], w_codes u8 [N, packed], w_scales f32 [N, 1 or groups], "
        "multiplier_codes u8 [N or 1, ceil(groups / 2)], bias f32 [N] -> y f32 [..., N] = "
        "(sum of unscaled products) * w_scale * a_scale + bias.",
        _GEMM_INPUTS,
        {"y": F32},
        _GEMM,
        reference.packed_gemm,
        functions.packed_gemm,
        _infer_packed_gemm,
        _packed_gemm_tables,
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
        reference.packed_group_gemm,
        functions.packed_group_gemm,
        _infer_packed_gemm,
        _packed_group_gemm_tables,
    ),
    Op(
        "NormModulateQuantize",
        "x f32 [B, S, C], shift and scale f32 [B, 1, C] -> codes u8 [B, S, C], a_scale f32 [B, S, 1]: "
        "QuantizeActivation of LayerNorm(x) * (1 + scale) + shift, the norm without affine parameters.",
        {"x": F32, "shift": F32, "scale": F32},
        {"codes": U8, "a_scale": F32},
        {**_FORMAT, "epsilon": (FLOAT, "added to the variance"), **_QUANTIZER},
        reference.norm_modulate_quantize,
        partial(functions.norm_modulate_quantize, floor=ABSMAX_FLOOR),
        _infer_quantizer,
        _norm_modulate_quantize_tables,
    ),
    Op(
        "GeluQuantize",
        "x f32 [..., K] -> codes u8 [..., K], scale f32 [..., 1]: QuantizeActivation of GELU(x) in its tanh form.",
        {"x": F32},
        {"codes": U8, "scale": F32},
        {**_FORMAT, **_QUANTIZER},
        reference.gelu_quantize,
        partial(functions.gelu_quantize, floor=ABSMAX_FLOOR),
        _infer_quantizer,
        _quantize_activation_tables,
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
