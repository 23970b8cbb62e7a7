"""The op PackedGemm of domain `fpq.native`: its node, and its weight in panels (plugins/cpu/packed_gemm.h: what it
computes)."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.dialect.graph import GraphBuilder
from export.formats.operands import largest_code
from pipeline.backends.cpu.gemms import Product
from pipeline.backends.cpu.quantizers import Operand
from pipeline.backends.cpu.token_chain import ATTRIBUTES, Activation, Number
from pipeline.passes.quantized_gemm import QuantizedGemm
from plugins.cpu.library import DOMAIN

UINT8, INT32, FLOAT = ir.DataType.UINT8, ir.DataType.INT32, ir.DataType.FLOAT
OP = "PackedGemm"
# As in plugins/cpu/packed_gemm.h: channels of a panel, and the input channels that it is cut into.
PANEL, OCTET = 16, 8


class In(IntEnum):
    """Inputs by place; codes, weight, scale and weight_sum are always there."""

    CODES = 0
    LOW_CODES = 1
    WEIGHT = 2
    MULTIPLIERS = 3
    TABLE = 4
    SCALE = 5
    WEIGHT_SUM = 6
    GROUP_SCALE = 7
    TOKEN_SCALE = 8
    BIAS = 9
    GATE = 10
    RESIDUAL = 11
    NORM_SCALE = 12
    NORM_SHIFT = 13


class Out(IntEnum):
    """Outputs by place, each optional; one that nobody wants has no name and costs nothing."""

    PRODUCT = 0
    INTEGER_SUMS = 1
    LINEAR = 2
    Y = 3
    CODES = 4
    SCALE = 5
    QUANTIZED = 6
    LOW_CODES = 7


# Of a chain that is taken in: its attribute -> that of the op. The zero of the op's own codes has the other name.
OF_QUANTIZER = {
    "epsilon": "epsilon",
    "absmax_floor": "absmax_floor",
    "max_value": "max_value",
    "kmax": "kmax",
    "rounding_factor": "rounding_factor",
    "zero": "code_zero",
    "limb_base": "limb_base",
}


def quantizer_attributes(stages: Mapping[str, Number]) -> dict[str, Number]:
    """Those of a norm and a quantizer with these stages of a chain (token_chain.ATTRIBUTES), absent where not named."""
    return {own: stages.get(name, ATTRIBUTES[name]) for name, own in OF_QUANTIZER.items()}


def packed_gemm(
    build: GraphBuilder, gemm: QuantizedGemm, a: Operand, bias: ir.Value | None = None
) -> tuple[Product, ir.Value]:
    """u8 x 4 bits, or 8 -> (float32(int32 sum) * scale, for groups added up; the linear, with scales of tokens and
    bias); one op for one limb or two. A weight of 4 bits stays packed in memory; another one is stored as its integers
    times their multipliers. The product and the sums of groups are outputs for the parity gates."""
    layer, n, sums = gemm.layer, gemm.out_features, gemm.sum_groups
    table = packs(gemm)
    panels, octets = -(-n // PANEL), -(-gemm.in_features // OCTET)
    stored = (panels, octets if table else 2 * octets, PANEL * OCTET // 2)
    weight = build.lazy(f"{layer}.panels", UINT8, stored, partial(weight_panels, gemm))
    multipliers = None
    if table and gemm.multipliers != (1,):
        cut = (panels, gemm.weight_groups, PANEL)
        multipliers = build.lazy(f"{layer}.panel_multipliers", UINT8, cut, partial(multiplier_panels, gemm))
    shape = (gemm.scale_groups, n) if gemm.real_groups else (n,)
    scales = build.lazy(f"{layer}.unit_scales", FLOAT, shape, gemm.unit_scales)
    codes = a.codes
    if gemm.activation_group:  # [M, groups, group] and [M, groups, 1]
        like = build.op("Shape", a.x, name="like")
        codes = tuple(build.op("Reshape", code, like, name=f"rows_{i}") for i, code in enumerate(codes))
    inputs: dict[In, ir.Value | None] = {
        In.CODES: codes[0],
        In.LOW_CODES: codes[1] if len(codes) == 2 else None,
        In.WEIGHT: weight,
        In.MULTIPLIERS: multipliers,
        In.TABLE: build.constant(gemm.weight.integers, np.int8) if table else None,
        In.SCALE: scales,
        In.WEIGHT_SUM: build.lazy(f"{layer}.weight_sums", INT32, (sums, n), partial(weight_sums, gemm)),
        In.GROUP_SCALE: a.scale if gemm.activation_group else None,
        In.TOKEN_SCALE: None if gemm.activation_group else a.scale,
        In.BIAS: bias,
    }
    attributes = {
        "zero": a.zero,
        "limb_weight": a.weights[0],
        "largest_code": largest_code(gemm.activation, len(codes)),
        "largest_weight": 0 if table else gemm.weight_kmax,
        "group_size": 0 if multipliers is None else gemm.group_size,
        "activation": Activation.NONE,
        "heads_out": 0,
    }
    places = [inputs.get(place) for place in In]
    node = build.node(OP, places, "product", attributes | quantizer_attributes({}), DOMAIN, len(Out))
    for value in node.outputs[Out.LINEAR :]:
        value.name = ""
    product, sums_of_groups, linear = node.outputs[: Out.Y]
    for value in (product, sums_of_groups, linear):
        value.type = ir.TensorType(FLOAT)
    linear.name = f"{build.prefix}/{'scaled_tokens' if bias is None else 'output'}"
    if sums == 1:
        sums_of_groups.name = ""
        return Product(product, product, scales, None), linear
    sums_of_groups.name = f"{build.prefix}/sum_f32"
    return Product(product, sums_of_groups, None, None), linear


def packs(gemm: QuantizedGemm) -> bool:
    """Does its weight stay packed? Its pairs of products are sums of the format's own integers, before any multiplier:
    at most 2 * 255 * 64, which 16 bits hold."""
    return gemm.weight.bits == 4 and (gemm.multipliers == (1,) or gemm.group_size % OCTET == 0)


def weight_panels(gemm: QuantizedGemm) -> NDArray[np.uint8]:
    """[panels, K / 8, 64]: the codes of a panel's channels at eight input channels, filled up with the code of 0. Of
    a weight that is not packed [panels, K / 4, 64]: the integers at four."""
    if not packs(gemm):
        return _integer_panels(gemm)
    codes = gemm.codes()
    rows, columns = -codes.shape[0] % PANEL, -codes.shape[1] % OCTET
    if rows or columns:
        zero = int(np.flatnonzero(gemm.weight.integers == 0)[0])
        codes = np.pad(codes, ((0, rows), (0, columns)), constant_values=zero)
    parts = codes.reshape(codes.shape[0] // PANEL, PANEL, -1, 2, OCTET // 2)
    both = parts[:, :, :, 0] | parts[:, :, :, 1] << 4
    return np.ascontiguousarray(both.transpose(0, 2, 1, 3)).reshape(len(both), -1, PANEL * OCTET // 2)


def _integer_panels(gemm: QuantizedGemm) -> NDArray[np.uint8]:
    rows = gemm.integers(np.int8)
    rows = np.pad(rows, ((0, -rows.shape[0] % PANEL), (0, -rows.shape[1] % OCTET)))
    quads = rows.reshape(rows.shape[0] // PANEL, PANEL, -1, OCTET // 2).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(quads).view(np.uint8).reshape(len(quads), -1, PANEL * OCTET // 2)


def multiplier_panels(gemm: QuantizedGemm) -> NDArray[np.uint8]:
    """[panels, groups, 16], filled up with 1."""
    rows = np.broadcast_to(gemm.group_multipliers(), (gemm.out_features, gemm.weight_groups))
    rows = np.pad(rows, ((0, -gemm.out_features % PANEL), (0, 0)), constant_values=1)
    return np.ascontiguousarray(rows.reshape(-1, PANEL, gemm.weight_groups).transpose(0, 2, 1))


def weight_sums(gemm: QuantizedGemm) -> NDArray[np.int32]:
    """[sums, N]: what a zero point is a factor of."""
    parts = gemm.integers(np.min_scalar_type(-gemm.weight_kmax)).reshape(gemm.out_features, gemm.sum_groups, -1)
    return np.ascontiguousarray(parts.sum(axis=2, dtype=np.int32).T)
