"""The custom ONNX ops of domain `fpq`: one row each with schema, shape rule, NumPy reference and function body.

Two rules for who writes a graph with them:

- Every input is always passed. A weight without multipliers gets the table `multipliers=(1,)` and the codes
  `no_multipliers(in_features, group_size)`; a GEMM without bias gets zeros [N]. (A function body has no portable way
  to ask whether an optional input is there.)
- Attributes come from `attributes(op, **choices)`, which adds the tables of the format that the body reads.

A model carries `OPS[name].function()` of each op it uses and imports DOMAIN at VERSION; then an ONNX runtime with opset
21 that reads functions runs it, and no schema need be registered with it. For others `export.inline` puts the bodies in
the place of the nodes.

A runtime that folds constants decodes all weights at load and holds every step of it meanwhile: onnxruntime 1.31 about
38 bytes per weight. For large models turn that off: `InferenceSession(path, disabled_optimizers=["ConstantFolding"])`
holds the packed codes only and decodes in every run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from onnx import AttributeProto, FunctionProto, TensorProto

from export.dialect import functions, reference
from export.dialect.functions import AttributeType
from export.dialect.reference import ABSMAX_FLOOR, no_multipliers
from export.errors import ContractError
from export.formats.attention import WEIGHT_MAX, AttentionFormats
from export.formats.format import Format, get_format, packed_size

__all__ = ["ABSMAX_FLOOR", "DOMAIN", "OPS", "VERSION", "Op", "attributes", "no_multipliers"]

DOMAIN = "fpq"
VERSION = 1
Shape = tuple[Any, ...]  # sizes: numbers, names, or a graph library's own symbols
Outputs = list[tuple[TensorProto.DataType, Shape]]  # of each output
# Attributes of a node by name, and those of them that its writer chooses: numbers, texts, lists of numbers.
Attributes = dict[str, Any]
Choices = Mapping[str, Any]

U8, F32 = TensorProto.UINT8, TensorProto.FLOAT
INT, INTS, FLOAT, FLOATS = AttributeProto.INT, AttributeProto.INTS, AttributeProto.FLOAT, AttributeProto.FLOATS
STRING = AttributeProto.STRING


@dataclass(frozen=True)
class Op:
    """One custom op.

    inputs and outputs: name -> element type. attributes: name -> (type, meaning). numpy(*inputs, **attributes) ->
    tuple of arrays. body appends the function body's nodes. infer(attributes, *input shapes) -> outputs' types and
    shapes. parts(choices) -> the attributes, some from each, in the order in which a node has them.
    """

    name: str
    doc: str
    inputs: dict[str, TensorProto.DataType]
    outputs: dict[str, TensorProto.DataType]
    attributes: dict[str, tuple[AttributeType, str]]
    numpy: Callable[..., tuple[reference.Array, ...]]
    body: functions.Builder
    infer: Callable[..., Outputs]
    parts: tuple[Callable[[Choices], Attributes], ...]

    def function(self) -> FunctionProto:
        """The op as an ONNX function in standard ops."""
        body = functions.Body({name: kind for name, (kind, _) in self.attributes.items()})
        self.body(body)
        return body.function(DOMAIN, self.name, self.inputs, self.outputs)


# --- shape rules ---------------------------------------------------------------------------------------------------


def _infer_dequantize_weight(attributes: Choices, codes: Shape, *_: Shape) -> Outputs:
    return [(F32, (attributes["in_features"], codes[0]))]


def _infer_quantize_weight(attributes: Choices, w: Shape, *_: Shape) -> Outputs:
    return [(U8, (w[1], packed_size(attributes["bits"], attributes["in_features"])))]


def _infer_quantizer(attributes: Choices, x: Shape, *_: Shape) -> Outputs:
    return [(U8, x), (F32, (*x[:-1], attributes.get("groups", 1)))]


def _infer_quantize_static(_attributes: Choices, x: Shape, *_: Shape) -> Outputs:
    return [(U8, x)]


def _infer_dequantize_activation(_attributes: Choices, codes: Shape, *_: Shape) -> Outputs:
    return [(F32, codes)]


def _infer_packed_gemm(_attributes: Choices, a: Shape, _scale: Shape, w: Shape, *_: Shape) -> Outputs:
    return [(F32, (*a[:-1], w[0]))]


def _infer_attention(_attributes: Choices, q: Shape, *_: Shape) -> Outputs:
    return [(F32, q)]


# --- attributes: what a user chooses, checked, and the tables that follow from the rows of the formats ----------------
# A row of the table names the parts that its attributes are made of; each makes some of them out of the choices.


def _format(choices: Choices) -> Attributes:
    return {"format": choices["format"]}


def _bits(choices: Choices) -> Attributes:
    return {"bits": get_format(choices["format"]).bits}


def _values(choices: Choices) -> Attributes:
    return {"values": get_format(choices["format"]).values.tolist()}


def _quantizer(choices: Choices) -> Attributes:
    """Tables of the encoder: those of the grid, and the code of minus each non-negative code."""
    fmt = get_format(choices["format"])
    return {
        **_grid(fmt),
        "binade_codes": 2**fmt.mantissa_bits,
        "max_code": fmt.max_code,
        "negative_codes": [_negative_of(fmt, code) for code in range(fmt.max_code + 1)],
    }


def _grid(fmt: Format) -> Attributes:
    """Largest magnitude, binade starts, and the step in each binade."""
    starts: list[float] = fmt.binade_starts.tolist()
    first = 1.0 if fmt.is_integer else 2.0 ** (fmt.min_exponent - fmt.mantissa_bits)
    return {
        "max_value": fmt.max_value,
        "thresholds": starts or [float("inf")],
        "steps": [first * 2**i for i in range(len(starts) + 1)],
    }


def _negative_of(fmt: Format, code: int) -> int:
    """The code of minus the value of `code`; 0 where there is none but -0."""
    if fmt.is_integer:
        return -code % 2**fmt.bits
    return code + 2 ** (fmt.bits - 1) if fmt.sign_bits and code else 0


def _grouping(choices: Choices) -> Attributes:
    in_features, group_size, multipliers = choices["in_features"], choices["group_size"], choices["multipliers"]
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


def _activation_groups(choices: Choices) -> Attributes:
    grouping = _grouping(choices)
    return {key: grouping[key] for key in ("group_size", "groups")}


def _of_gemm(choices: Choices) -> Attributes:
    activation, weight = get_format(choices["activation_format"]), get_format(choices["weight_format"])
    return {
        "layer": choices["layer"],
        "activation_format": activation.name,
        "weight_format": weight.name,
        **_grouping(choices),
        "activation_values": activation.values.tolist(),
        "weight_values": weight.values.tolist(),
        "weight_bits": weight.bits,
    }


def _sum_groups(choices: Choices) -> Attributes:
    """Of a weight row `scale_groups` real scales, K / group_size or 1."""
    of_token = _activation_groups({**choices, "group_size": choices["activation_group"]})["groups"]
    of_channel = choices["scale_groups"]
    return {
        "activation_group": choices["activation_group"],
        "scale_groups": of_channel,
        "sum_groups": math.lcm(of_token, of_channel),
    }


def _of_attention(choices: Choices) -> Attributes:
    formats = AttentionFormats(choices["qk_format"], choices["pv_format"])
    grids = {"qk_": _grid(get_format(formats.qk)), "pv_": _grid(get_format(formats.pv))}
    tables = {f"{of}{key}": value for of, grid in grids.items() for key, value in grid.items()}
    names = {"layer": choices["layer"], "qk_format": formats.qk, "pv_format": formats.pv}
    return {**names, "scale": choices["scale"], **tables}


def _epsilon(choices: Choices) -> Attributes:
    return {"epsilon": choices["epsilon"]}


# --- the table -----------------------------------------------------------------------------------------------------

_GROUPING = {
    "in_features": (INT, "K, input channels"),
    "group_size": (INT, "input channels that share a multiplier or scale; 0: the whole row"),
    "multipliers": (INTS, "table of at most 16 small integers that multiplier_codes index; (1,) for none"),
    "groups": (INT, "K / group_size, or 1"),
}
_FORMAT = {"format": (STRING, "name of the number format")}
_GRID = {
    "max_value": (FLOAT, "largest magnitude"),
    "thresholds": (FLOATS, "binade starts above the first; [inf] for integers"),
    "steps": (FLOATS, "distance of neighbouring values in each binade"),
}
_QUANTIZER = {
    **_GRID,
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
        (_format, _bits, _grouping, _values),
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
        (_format, _bits, _grouping, _quantizer),
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
        (_format, _quantizer),
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
        (_format, _values),
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
        (_format, _quantizer),
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
        (_format, _values),
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
        _infer_quantizer,
        (_format, _quantizer, _activation_groups),
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
        (_format, _values, _activation_groups),
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
        (_of_gemm,),
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
        (_of_gemm, _sum_groups),
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
        (_format, _quantizer, _epsilon),
    ),
    Op(
        "QuantizedAttention",
        "q f32 [B, H, Tq, D], k and v f32 [B, H, Tk, D], mask f32 that broadcasts to [B, H, Tq, Tk] (zeros [1, 1, 1, "
        "1] for none) -> out f32 [B, H, Tq, D]: softmax(q k' * scale + mask) v with codes of q and of k less its mean "
        "over the tokens (a scale per token), of v (a scale per channel), and weights that are integers up to 255.",
        {"q": F32, "k": F32, "v": F32, "mask": F32},
        {"out": F32},
        {
            "layer": (STRING, "name of the attention, for people and passes"),
            "qk_format": (STRING, "number format of queries and keys"),
            "pv_format": (STRING, "number format of values"),
            "scale": (FLOAT, "factor of the scores"),
            **{f"qk_{key}": row for key, row in _GRID.items()},
            **{f"pv_{key}": row for key, row in _GRID.items()},
        },
        reference.quantized_attention,
        partial(functions.quantized_attention, floor=ABSMAX_FLOOR, weight_max=WEIGHT_MAX),
        _infer_attention,
        (_of_attention,),
    ),
)
OPS: dict[str, Op] = {row.name: row for row in _ROWS}


def attributes(op_name: str, **choices: object) -> Attributes:
    """All attributes of a node of op `op_name`, the format's tables included.

    choices: DequantizeWeight and QuantizeWeight take format, in_features, group_size and multipliers (default (1,));
    QuantizeActivation, QuantizeStatic and their inverses format; QuantizeGroups and its inverse format, in_features and
    group_size; PackedGemm layer, activation_format, weight_format, in_features, group_size, multipliers;
    PackedGroupGemm besides activation_group and scale_groups; NormModulateQuantize format and epsilon;
    QuantizedAttention layer, qk_format, pv_format and scale. Raises RecipeError for an unknown format, ContractError
    for sizes that do not fit.
    """
    values: Attributes = {}
    for part in OPS[op_name].parts:
        values |= part({"multipliers": (1,), **choices})
    # Groups are counted in the input channels, also where those are no attribute.
    if unknown := choices.keys() - values.keys() - {"in_features"}:
        raise TypeError(f"{op_name} has no {', '.join(sorted(unknown))}; it has {', '.join(values)}")
    return values
