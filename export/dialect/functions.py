"""Function bodies of the `fpq` ops in standard ONNX ops, so that runtimes need nothing of ours.

One body serves every number format: tables of the format arrive as attributes, and the body reads them through
Constants that refer to those attributes. Bodies call no other `fpq` function; shared parts are Python functions here
that append nodes, because nested functions are not inlined by every runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper

# Of the standard domain, in bodies and in every graph.
OPSET = 21
AttributeType = AttributeProto.AttributeType
# Attribute of Constant that carries a referenced attribute of each type.
CONSTANT_OF = {
    AttributeProto.FLOAT: "value_float",
    AttributeProto.FLOATS: "value_floats",
    AttributeProto.INT: "value_int",
    AttributeProto.INTS: "value_ints",
}


class Body:
    """A list of nodes under construction. Methods append nodes and return the name of their (first) output."""

    def __init__(self, attribute_types: Mapping[str, AttributeType]) -> None:
        self.nodes: list[NodeProto] = []
        self.attribute_types = attribute_types

    def op(self, op_type: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        """Append one node of the standard domain."""
        output = out or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], **attributes))
        return output

    def attribute(self, name: str) -> str:
        """Constant whose value is the function's attribute `name` (a scalar, or a list of floats or ints)."""
        kind = self.attribute_types[name]
        output = self.op("Constant")
        self.nodes[-1].attribute.append(_reference(CONSTANT_OF[kind], name, kind))
        return output

    def literal(self, kind: int, *values: float, dims: tuple[int, ...] = ()) -> str:
        """Constant as a tensor, which has an element type: tools that fold constants take `value_float` for float64."""
        return self.op("Constant", value=helper.make_tensor("", kind, dims, values))

    def ints(self, *values: int) -> str:
        """int64 constant vector."""
        return self.literal(TensorProto.INT64, *values, dims=(len(values),))

    def integer(self, value: int) -> str:
        """int64 constant scalar."""
        return self.literal(TensorProto.INT64, value)

    def number(self, value: float) -> str:
        """float32 constant scalar."""
        return self.literal(TensorProto.FLOAT, value)

    def cast(self, x: str, to: int, out: str | None = None) -> str:
        return self.op("Cast", x, to=to, out=out)

    def shape(self, *parts: str) -> str:
        """Shape vector from int64 vectors and scalars-as-vectors."""
        return self.op("Concat", *parts, axis=0)

    def vector(self, scalar: str) -> str:
        """int64 scalar -> vector of one element."""
        return self.op("Reshape", scalar, self.ints(1))

    def function(self, domain: str, name: str, inputs: Iterable[str], outputs: Iterable[str]) -> FunctionProto:
        """The nodes so far as the body of an ONNX function."""
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_function(
            domain, name, list(inputs), list(outputs), self.nodes, opsets, list(self.attribute_types)
        )


def _reference(name: str, refers_to: str, kind: AttributeType) -> AttributeProto:
    return AttributeProto(name=name, ref_attr_name=refers_to, type=kind)


# --- shared parts --------------------------------------------------------------------------------------------------


# Bits are moved in 32 of them: there is room for every one, so that nothing is lost where a runtime saturates instead
# (OpenVINO: 144 << 1 is 255 in uint8); and arithmetic of indices in int64, which all runtimes have (`Sub` of uint8 only
# onnxruntime from 1.21 on).
U8, U32 = TensorProto.UINT8, TensorProto.UINT32


def _unpack(body: Body, packed: str, bits: str, count: str) -> str:
    """packed u8 [N, bytes] -> int32 [N, count]. A code of at most 8 bits lies in two neighbouring bytes."""
    first_bit = body.op("Mul", body.op("Range", body.integer(0), count, body.integer(1)), bits)
    offset = body.cast(body.op("Mod", first_bit, body.integer(8)), U32)
    words = body.op("Gather", _pairs(body, packed), body.op("Div", first_bit, body.integer(8)), axis=1)
    shifted = body.op("BitShift", words, offset, direction="RIGHT")
    mask = body.cast(body.op("Sub", _power_of_two(body, bits), body.integer(1)), U32)
    return body.cast(body.op("BitwiseAnd", shifted, mask), TensorProto.INT32)


def _pairs(body: Body, packed: str) -> str:
    """packed u8 [N, bytes] -> u32 [N, bytes]: each byte with the one behind it as its upper eight bits."""
    wide = body.cast(packed, U32)
    places = body.op("Range", body.integer(0), body.op("Squeeze", body.op("Shape", packed, start=1)), body.integer(1))
    last = body.op("Sub", body.op("Shape", packed, start=1), body.ints(1))
    # Behind a row's last byte comes that byte again; codes end before it, so the mask removes it.
    following = body.op("Gather", wide, body.op("Min", body.op("Add", places, body.integer(1)), last), axis=1)
    upper = body.op("BitShift", following, body.literal(U32, 8), direction="LEFT")
    return body.op("BitwiseOr", wide, upper)


def _pack(body: Body, codes: str, bits: str, count: str, out: str) -> str:
    """codes u8 [N, count] -> u8 [N, ceil(count * bits / 8)]. A byte takes bits of at most two neighbouring codes."""
    bytes_ = body.op("Div", body.op("Add", body.op("Mul", count, bits), body.integer(7)), body.integer(8))
    first_bit = body.op("Mul", body.op("Range", body.integer(0), bytes_, body.integer(1)), body.integer(8))
    element = body.op("Div", first_bit, bits)
    inside = body.op("Mod", first_bit, bits)
    padded = body.cast(body.op("Pad", codes, body.ints(0, 0, 0, 1), body.literal(U8, 0)), U32)
    low = body.op("BitShift", body.op("Gather", padded, element, axis=1), body.cast(inside, U32), direction="RIGHT")
    following = body.op("Gather", padded, body.op("Add", element, body.integer(1)), axis=1)
    room = body.cast(body.op("Sub", bits, inside), U32)
    both = body.op("BitwiseOr", low, body.op("BitShift", following, room, direction="LEFT"))
    return body.cast(body.op("BitwiseAnd", both, body.literal(U32, 255)), U8, out=out)


def _power_of_two(body: Body, exponent: str) -> str:
    shifted = body.op("BitShift", body.literal(U32, 1), body.cast(exponent, U32), direction="LEFT")
    return body.cast(shifted, TensorProto.INT64)


def _in_steps(body: Body, v: str, of: str = "") -> tuple[str, str, str]:
    """v f32, any shape -> (|v| in steps of its binade, rounded to nearest, ties to even; the step; the binade).

    The number of `thresholds` (binade starts) that |v| reaches is its binade; within one, codes count steps.
    of: in front of the names of the attributes that hold the format's tables.
    """
    magnitude = body.op("Min", body.op("Abs", v), body.attribute(f"{of}max_value"))
    thresholds = body.attribute(f"{of}thresholds")
    reached = body.op("GreaterOrEqual", body.op("Unsqueeze", magnitude, body.ints(-1)), thresholds)
    binade = body.op("ReduceSum", body.cast(reached, TensorProto.INT32), body.ints(-1), keepdims=0)
    step = body.op("Gather", body.attribute(f"{of}steps"), binade)
    return body.op("Round", body.op("Div", magnitude, step)), step, binade


def _encode(body: Body, v: str, out: str | None = None) -> str:
    """v f32, any shape -> u8 codes: nearest, ties to even, saturating, -0 folded to +0."""
    in_steps, _, binade = _in_steps(body, v)
    below = body.op("Mul", binade, body.cast(body.attribute("binade_codes"), TensorProto.INT32))
    code = body.op("Add", below, body.cast(in_steps, TensorProto.INT32))
    # Without the Clip a NaN would become an index outside of the table below.
    zero = body.cast(body.integer(0), TensorProto.INT32)
    code = body.op("Clip", code, zero, body.cast(body.attribute("max_code"), TensorProto.INT32))
    negative = body.op("Gather", body.cast(body.attribute("negative_codes"), TensorProto.UINT8), code)
    positive = body.cast(code, TensorProto.UINT8)
    return body.op("Where", body.op("Less", v, body.number(0.0)), negative, positive, out=out)


def _decode(body: Body, codes: str, values: str) -> str:
    """codes u8, any shape -> f32, what the attribute `values` has for each."""
    index = body.cast(codes, TensorProto.INT32)
    return body.op("Gather", body.attribute(values), index)


def _value_and_scale(body: Body, x: str, floor: float, of: str, axis: int = -1) -> tuple[str, str]:
    """x f32 -> (what its codes stand for, unscaled, f32 of the same shape; scale f32, of size 1 along `axis`)."""
    scale = _scale(body, x, floor, of=of, axis=axis)
    in_units = body.op("Div", x, scale)
    steps, step, _ = _in_steps(body, in_units, of)
    return body.op("Mul", body.op("Sign", in_units), body.op("Mul", steps, step)), scale


def _scale(body: Body, x: str, floor: float, out: str | None = None, of: str = "", axis: int = -1) -> str:
    """x f32 -> f32, of size 1 along `axis`: max(absmax along it, floor) / max_value; NaN where there is NaN or Inf."""
    absmax = body.op("ReduceMax", body.op("Abs", x), body.ints(axis), keepdims=1)
    bounded = body.op("Max", absmax, body.number(floor))
    # 0 where all is finite. Maxima alone would lose a NaN: onnxruntime's ReduceMax skips it unless it comes first.
    poison = body.op("ReduceSum", body.op("Mul", x, body.number(0.0)), body.ints(axis), keepdims=1)
    return body.op("Div", body.op("Add", bounded, poison), body.attribute(f"{of}max_value"), out=out)


def _multipliers(body: Body, packed: str) -> str:
    """packed 4-bit indices [N or 1, ceil(groups / 2)] -> f32 [N or 1, groups, 1]."""
    indices = _unpack(body, packed, body.integer(4), body.attribute("groups"))
    factors = body.op("Gather", body.attribute("multipliers"), indices)
    return body.op("Unsqueeze", body.cast(factors, TensorProto.FLOAT), body.ints(-1))


def _grouped(body: Body, x: str, groups: str) -> str:
    """[N, K] -> [N, groups, K / groups]."""
    return body.op("Reshape", x, body.shape(body.ints(0), body.vector(groups), body.ints(-1)))


def _rows(body: Body, x: str) -> str:
    """[N, groups, K / groups] -> [N, K]."""
    return body.op("Reshape", x, body.ints(0, -1))


def _unscaled_weight(body: Body, codes: str, multiplier_codes: str, bits: str, values: str) -> str:
    """packed codes -> f32 [N, groups, K / groups]: code value times group multiplier (exact)."""
    unpacked = _unpack(body, codes, body.attribute(bits), body.attribute("in_features"))
    value = _grouped(body, body.op("Gather", body.attribute(values), unpacked), body.attribute("groups"))
    return body.op("Mul", value, _multipliers(body, multiplier_codes))


# --- one function per op -------------------------------------------------------------------------------------------


def dequantize_weight(body: Body) -> None:
    """codes, scales, multiplier_codes -> w. The one rounding is that of the last product."""
    unscaled = _unscaled_weight(body, "codes", "multiplier_codes", "bits", "values")
    scaled = body.op("Mul", unscaled, body.op("Unsqueeze", "scales", body.ints(-1)))
    body.op("Transpose", _rows(body, scaled), perm=[1, 0], out="w")


def quantize_weight(body: Body) -> None:
    """w, scales, multiplier_codes -> codes."""
    scale = body.op("Mul", body.op("Unsqueeze", "scales", body.ints(-1)), _multipliers(body, "multiplier_codes"))
    rows = _grouped(body, body.op("Transpose", "w", perm=[1, 0]), body.attribute("groups"))
    plain = _encode(body, _rows(body, body.op("Div", rows, scale)))
    _pack(body, plain, body.attribute("bits"), body.attribute("in_features"), "codes")


def quantize_activation(body: Body, floor: float, x: str = "x") -> None:
    """x -> codes, scale."""
    scale = _scale(body, x, floor, "scale")
    _encode(body, body.op("Div", x, scale), "codes")


def dequantize_activation(body: Body) -> None:
    """codes, scale -> x."""
    value = _decode(body, "codes", "values")
    body.op("Mul", value, "scale", out="x")


def quantize_static(body: Body, x: str = "x") -> None:
    """x, scale, zero -> codes."""
    _encode(body, body.op("Div", body.op("Sub", x, "zero"), "scale"), "codes")


def dequantize_static(body: Body) -> None:
    """codes, scale, zero -> x."""
    value = _decode(body, "codes", "values")
    body.op("Add", body.op("Mul", value, "scale"), "zero", out="x")


def quantize_groups(body: Body, floor: float) -> None:
    """x -> codes, scale [..., groups]."""
    grouped = _token_groups(body, "x")
    scale = _scale(body, grouped, floor)
    codes = _encode(body, body.op("Div", grouped, scale))
    body.op("Reshape", codes, body.op("Shape", "x"), out="codes")
    body.op("Squeeze", scale, body.ints(-1), out="scale")


def dequantize_groups(body: Body) -> None:
    """codes, scale [..., groups] -> x."""
    value = _token_groups(body, _decode(body, "codes", "values"))
    scaled = body.op("Mul", value, body.op("Unsqueeze", "scale", body.ints(-1)))
    body.op("Reshape", scaled, body.op("Shape", "codes"), out="x")


def _token_groups(body: Body, x: str) -> str:
    """[..., K] -> [..., groups, group_size]."""
    sizes = (body.vector(body.attribute(name)) for name in ("groups", "group_size"))
    return body.op("Reshape", x, body.shape(body.op("Shape", x, end=-1), *sizes))


def packed_gemm(body: Body) -> None:
    """The sum runs over unscaled values, so it is exact in float32 wherever the integers' sum fits 24 bits.

    Groups with real scales are summed by themselves, scaled by [G, 1, N] and added up.
    """
    partial = _partial_sums(body, body.op("Shape", "w_scales", start=1, end=2))
    w_scales = body.op("Unsqueeze", body.op("Transpose", "w_scales", perm=[1, 0]), body.ints(1))
    total = _total(body, body.op("Mul", partial, w_scales))
    body.op("Add", body.op("Mul", total, "a_scale"), "bias", out="y")


def packed_group_gemm(body: Body) -> None:
    """Sums of S groups, scaled by [S, M, 1] and [S, 1, N] and added up."""
    sums = body.vector(body.attribute("sum_groups"))
    partial = _partial_sums(body, sums)
    of_token = body.op("Unsqueeze", _repeated(body, "a_scale", sums), body.ints(2))
    of_channel = body.op("Unsqueeze", _repeated(body, "w_scales", sums), body.ints(1))
    scaled = body.op("Mul", body.op("Mul", partial, of_token), of_channel)
    body.op("Add", _total(body, scaled), "bias", out="y")


def _partial_sums(body: Body, groups: str) -> str:
    """Groups are the leading axis: a [G, M, K/G] @ w [G, K/G, N], unscaled -> f32 [G, M, N]."""
    a = _decode(body, "a_codes", "activation_values")
    a = body.op("Reshape", a, body.shape(body.ints(-1), groups, _group_width(body, groups)))
    w = _rows(body, _unscaled_weight(body, "w_codes", "multiplier_codes", "weight_bits", "weight_values"))
    w = body.op("Reshape", w, body.shape(body.ints(0), groups, body.ints(-1)))
    return body.op("MatMul", body.op("Transpose", a, perm=[1, 0, 2]), body.op("Transpose", w, perm=[1, 2, 0]))


def _group_width(body: Body, groups: str) -> str:
    return body.op("Div", body.vector(body.attribute("in_features")), groups)


def _total(body: Body, scaled: str) -> str:
    """f32 [G, M, N] -> their sum over G, f32 [..., N] with the leading axes of a_codes."""
    total = body.op("ReduceSum", scaled, body.ints(0), keepdims=0)
    leading = body.op("Shape", "a_codes", start=0, end=-1)
    return body.op("Reshape", total, body.shape(leading, body.op("Shape", "w_codes", start=0, end=1)))


def _repeated(body: Body, scale: str, sums: str) -> str:
    """[..., groups] -> [sums, rows]: each scale as often as it spans groups of sums."""
    groups = body.op("Shape", scale, start=-1)
    rows = body.op("Reshape", scale, body.shape(body.ints(-1), groups, body.ints(1)))
    wide = body.op("Expand", rows, body.shape(body.ints(1, 1), body.op("Div", sums, groups)))
    return body.op("Transpose", body.op("Reshape", wide, body.shape(body.ints(-1), sums)), perm=[1, 0])


def norm_modulate_quantize(body: Body, floor: float) -> None:
    """x, shift, scale -> codes, a_scale."""
    one = helper.make_tensor("", TensorProto.FLOAT, [1], [1.0])
    ones = body.op("ConstantOfShape", body.op("Shape", "x", start=-1), value=one)
    normal = body.op("LayerNormalization", "x", ones, axis=-1)
    body.nodes[-1].attribute.append(_reference("epsilon", "epsilon", AttributeProto.FLOAT))
    y = body.op("Add", body.op("Mul", normal, body.op("Add", "scale", body.number(1.0))), "shift")
    a_scale = _scale(body, y, floor, "a_scale")
    _encode(body, body.op("Div", y, a_scale), "codes")


def quantized_attention(body: Body, floor: float, weight_max: int) -> None:
    """q, k, v, mask -> out. Sums of unscaled values are exact: those over channels in float32, those over keys in
    float64, in which there may be as many keys as int32 can add up. So is the mean of k but for its last rounding.

    Values are not turned on their way into the product in float64: onnxruntime before 1.21 would make one op of both,
    of which it has no kernel for float64.
    """
    mean = body.op("ReduceMean", body.cast("k", TensorProto.DOUBLE), body.ints(-2), keepdims=1)
    centred = body.op("Sub", "k", body.cast(mean, TensorProto.FLOAT))
    q_value, q_scale = _value_and_scale(body, "q", floor, "qk_")
    k_value, k_scale = _value_and_scale(body, centred, floor, "qk_")
    v_value, v_scale = _value_and_scale(body, "v", floor, "pv_", axis=-2)
    total = body.op("MatMul", q_value, _turned(body, k_value))
    in_units = body.op("Mul", total, body.op("Mul", q_scale, body.attribute("scale")))
    score = body.op("Add", body.op("Mul", in_units, _turned(body, k_scale)), "mask")
    above = body.op("Sub", score, body.op("ReduceMax", score, body.ints(-1), keepdims=1))
    weight = body.op("Round", body.op("Mul", body.op("Exp", above), body.number(float(weight_max))))
    wide = (body.cast(x, TensorProto.DOUBLE) for x in (weight, v_value))
    mixed = body.cast(body.op("MatMul", *wide), TensorProto.FLOAT)
    sums = body.op("ReduceSum", weight, body.ints(-1), keepdims=1)
    body.op("Div", body.op("Mul", mixed, v_scale), sums, out="out")


def _turned(body: Body, x: str) -> str:
    """[B, H, T, D] -> [B, H, D, T]."""
    return body.op("Transpose", x, perm=[0, 1, 3, 2])


Builder = Callable[[Body], None]
