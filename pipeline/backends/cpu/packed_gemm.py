"""The op PackedGemm of domain `fpq.native`: its node, and its weight in panels (plugins/cpu/packed_gemm.h: what it
computes)."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.dialect.graph import GraphBuilder
from export.formats.operands import largest_code
from pipeline.backends.cpu.gemms import Product
from pipeline.backends.cpu.quantizers import Operand
from pipeline.passes.quantized_gemm import QuantizedGemm
from plugins.cpu.library import DOMAIN

UINT8, INT32, FLOAT = ir.DataType.UINT8, ir.DataType.INT32, ir.DataType.FLOAT
# As in plugins/cpu/packed_gemm.h: channels of a panel, and the input channels that it is cut into.
PANEL, OCTET = 16, 8


def packed_gemm(build: GraphBuilder, gemm: QuantizedGemm, a: Operand) -> Product:
    """u8 x 4 bits, or 8 -> float32(int32 sum) * scale, for real groups added up; one op for one limb or two. A weight
    of 4 bits stays packed in memory; another one is stored as its integers times their multipliers."""
    layer, n = gemm.layer, gemm.out_features
    table = gemm.weight.bits == 4
    panels, octets = -(-n // PANEL), -(-gemm.in_features // OCTET)
    stored = (panels, octets if table else 2 * octets, PANEL * OCTET // 2)
    weight = build.lazy(f"{layer}.panels", UINT8, stored, partial(weight_panels, gemm))
    multipliers = None
    if table and gemm.multipliers != (1,):
        cut = (panels, gemm.weight_groups, PANEL)
        multipliers = build.lazy(f"{layer}.panel_multipliers", UINT8, cut, partial(multiplier_panels, gemm))
    shape = (gemm.scale_groups, n) if gemm.real_groups else (n,)
    scales = build.lazy(f"{layer}.unit_scales", FLOAT, shape, gemm.unit_scales)
    high, low = a.codes if len(a.codes) == 2 else (a.codes[0], None)
    y = build.op(
        "PackedGemm",
        high,
        low,
        weight,
        multipliers,
        build.constant(gemm.weight.integers, np.int8) if table else None,
        scales,
        build.lazy(f"{layer}.weight_sums", INT32, shape, partial(weight_sums, gemm)),
        name="product",
        domain=DOMAIN,
        zero=a.zero,
        limb_weight=a.weights[0],
        largest_code=largest_code(gemm.activation, len(a.codes)),
        largest_weight=0 if table else gemm.weight_kmax,
        group_size=0 if multipliers is None else gemm.group_size,
    )
    y.type = ir.TensorType(FLOAT)
    return Product(y, y, None if gemm.real_groups else scales, a.scale)


def weight_panels(gemm: QuantizedGemm) -> NDArray[np.uint8]:
    """[panels, K / 8, 64]: the codes of a panel's channels at eight input channels, filled up with the code of 0. Of
    more than 4 bits [panels, K / 4, 64]: the integers at four."""
    if gemm.weight.bits != 4:
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
    """[N], or [groups, N]: what a zero point is a factor of."""
    parts = gemm.integers(np.int32).reshape(gemm.out_features, gemm.scale_groups, -1)
    sums = parts.sum(axis=2, dtype=np.int32)
    return np.ascontiguousarray(sums.T) if gemm.real_groups else sums[:, 0]
