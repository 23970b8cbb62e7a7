"""Emits operands and GEMMs of the `ort_cuda` graph where they differ from those of `qdq`: bytes that MatMulInteger
multiplies, and 4-bit weights that MatMulNBits does."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.dialect.graph import FLOAT, MICROSOFT, GraphBuilder
from export.formats.operands import HardwareNumber
from pipeline.backends.qdq import gemms as qdq
from pipeline.backends.qdq import quantizers
from pipeline.backends.qdq.choose import GemmChoice
from pipeline.backends.qdq.quantizers import Token
from pipeline.passes.quantized_gemm import STORED, QuantizedGemm

INT32 = ir.DataType.INT32
# MatMulNBits: value = (code - ZERO) * scale, two codes in a byte, the lower channel in the lower half.
BITS, ZERO = 4, 8


def emit_token(build: GraphBuilder, x: ir.Value, format_name: str) -> Token:
    """As that of `qdq`, but a token with NaN has the scale NaN: no int8 code carries it, and ReduceMax may skip it."""
    token = quantizers.emit_token(build, x, format_name)
    assert token.scale is not None
    zeros = build.op("Mul", x, build.constant(0.0), name="zeros")  # and NaN of NaN or Inf
    lost = build.op("ReduceSum", zeros, build.constant([-1], np.int64), name="lost", keepdims=1)
    return replace(token, scale=build.op("Add", token.scale, lost, name="carrying_scale"))


def emit_limbs(build: GraphBuilder, token: Token, number: HardwareNumber) -> tuple[ir.Value, ...]:
    """Operands, high limb first: int8 for MatMulInteger; else float32, as those of `qdq`."""
    if number.type != "INT8":
        if number.format == number.type:
            # The type saturates where the format ends. onnxruntime's optimizer fails on a Clip before a float8 code.
            token = replace(token, value=token.quotient)
        return quantizers.emit_limbs(build, token, number)
    scaled = quantizers.emit_scaled(build, token, number)
    if number.limbs == 1:
        return (_to_int8(build, scaled, 1.0, "operand"),)
    base = number.limb_weights[0]
    high = _to_int8(build, scaled, base, "operand_high")
    taken = build.op("DequantizeLinear", high, build.constant(base), name="taken")
    return (high, _to_int8(build, build.op("Sub", scaled, taken, name="rest"), 1.0, "operand_low"))


def _to_int8(build: GraphBuilder, x: ir.Value, unit: float, name: str) -> ir.Value:
    """x / unit (a power of two) rounded to the nearest integer, ties to even, saturating."""
    return build.op("QuantizeLinear", x, build.constant(unit), build.constant(0, np.int8), name=name)


def emit_gemm(
    build: GraphBuilder,
    gemm: QuantizedGemm,
    choice: GemmChoice,
    token: Token,
    limbs: tuple[ir.Value, ...],
    bias: ir.Value,
) -> tuple[ir.Value, ir.Value]:
    """(output [..., N] float32, raw GEMM result as float32)."""
    if choice.row.activation_type == "INT8":
        product, channel = _emit_integer(build, gemm, choice, limbs), gemm.scales[:, 0]
    elif choice.row.weight_type == "INT4":
        product, channel = _emit_nbits(build, gemm, limbs[0])
    else:
        return qdq.emit_gemm(build, gemm, choice, token, limbs, bias)
    return qdq.emit_scaled(build, gemm, choice, token, product, channel, bias), product


def _emit_integer(
    build: GraphBuilder, gemm: QuantizedGemm, choice: GemmChoice, limbs: tuple[ir.Value, ...]
) -> ir.Value:
    """float32 of the exact int32 sum of whole integers."""
    make = partial(gemm.hardware_numbers, "INT8", choice.weight_exponent)
    weight = build.lazy(f"{gemm.layer}.ort_weight", STORED["INT8"], gemm.shape, make)
    names = [name.removeprefix("/") for name in qdq.matmul_names("", len(limbs))]
    sums = [build.op("MatMulInteger", limb, weight, name=name) for name, limb in zip(names, limbs, strict=True)]
    total = sums[-1]
    if len(sums) == 2:
        base = build.constant(int(choice.number.limb_weights[0]), np.int32)
        total = build.op("Add", build.op("Mul", sums[0], base, name="high_weighted"), total, name="limb_sum")
    if choice.number.shift:
        shift = partial(_shift, gemm, choice.number.shift)
        stored = build.lazy(f"{gemm.layer}.ort_shift", INT32, (gemm.out_features,), shift)
        total = build.op("Add", total, stored, name="unshifted")
    return build.op("Cast", total, name="gemm", to=FLOAT.dtype.value)


def _shift(gemm: QuantizedGemm, shift: int) -> NDArray[np.int32]:
    """[N]: what activations less `shift` lack in each channel's sum."""
    return (gemm.integers().sum(axis=1, dtype=np.int64) * shift).astype(np.int32)


def _emit_nbits(build: GraphBuilder, gemm: QuantizedGemm, activation: ir.Value) -> tuple[ir.Value, NDArray[np.float32]]:
    """Half-precision GEMM of 4-bit weights with their group scales, normalized per channel so that nothing overflows:
    (product as float32, the channels' units [N])."""
    channel = gemm.channel_units()
    n, groups, group = gemm.out_features, gemm.weight_groups, gemm.group_size
    codes = build.lazy(
        f"{gemm.layer}.ort_weight", ir.DataType.UINT8, (n, groups, group // 2), partial(_packed_indices, gemm)
    )
    scales = partial(_scales, gemm, channel)
    scale = build.lazy(f"{gemm.layer}.ort_group_scale", STORED["FP16"], (n, groups), scales)
    operand = build.op("Cast", activation, name="operand", to=STORED["FP16"].value)
    sizes = {"K": gemm.in_features, "N": n, "bits": BITS, "block_size": group}
    half = build.op("MatMulNBits", operand, codes, scale, name="matmul", domain=MICROSOFT, **sizes)
    return build.op("Cast", half, name="gemm", to=FLOAT.dtype.value), channel


def _packed_indices(gemm: QuantizedGemm) -> NDArray[np.uint8]:
    """[N, groups, group_size / 2] uint8."""
    codes = (gemm.signed_indices().astype(np.int8).T + ZERO).astype(np.uint8)
    codes = codes.reshape(gemm.out_features, gemm.weight_groups, -1, 2)
    return np.ascontiguousarray(codes[..., 0] | codes[..., 1] << BITS)


def _scales(gemm: QuantizedGemm, channel: NDArray[np.float32]) -> NDArray[np.float16]:
    """[N, groups] float16."""
    return np.ascontiguousarray(gemm.group_scales_half(channel, 2.0**-gemm.weight.fraction_bits).T)
