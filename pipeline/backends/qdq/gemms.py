"""Emits one quantized linear: weight constant, a MatMul per limb, scales, bias."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.dialect.graph import GraphBuilder
from export.formats.operands import decoding_lines
from pipeline.backends.qdq.choose import GemmChoice
from pipeline.backends.qdq.quantizers import Token, round_in
from pipeline.passes.quantized_gemm import STORED, QuantizedGemm


def emit_gemm(
    build: GraphBuilder,
    gemm: QuantizedGemm,
    choice: GemmChoice,
    token: Token,
    limbs: tuple[ir.Value, ...],
    bias: ir.Value,
) -> tuple[ir.Value, ir.Value]:
    """(output [..., N] float32, raw GEMM result).

    Constants are called rtx_..., as in bundles of earlier releases, whose graphs `verify` compares by their hashes.
    """
    if choice.row.real_groups:
        product, channel = _emit_half(build, gemm, choice, limbs[0])
    else:
        product, channel = _emit_exact(build, gemm, choice, limbs), gemm.scales[:, 0]
        product = _emit_unshifted(build, gemm, choice, product) if choice.number.shift else product
    return emit_scaled(build, gemm, choice, token, product, channel, bias), product


def emit_scaled(
    build: GraphBuilder,
    gemm: QuantizedGemm,
    choice: GemmChoice,
    token: Token,
    product: ir.Value,
    channel: NDArray[np.float32],
    bias: ir.Value,
) -> ir.Value:
    """The linear's output [..., N] of its raw product, both float32. channel: the weight's scales [N]."""
    # integer * 2^exponent stands for value * 2^(f + exponent) on both sides; powers of two leave the scale exact.
    unit = choice.number.gain * weight_gain(gemm, choice)
    channel = channel if gemm.activation_scale is None else channel * gemm.activation_scale
    scale = _vector(build, "rtx_scale", (channel / unit).astype(np.float32))
    scaled = build.op("Mul", product, scale, name="channel_scale")
    scaled = scaled if token.scale is None else build.op("Mul", scaled, token.scale, name="token_scale")
    return build.op("Add", scaled, bias, name="bias") if gemm.has_bias else scaled


def weight_gain(gemm: QuantizedGemm, choice: GemmChoice) -> float:
    """Weight operand per unit of value; those of a half-precision GEMM are values already."""
    return 1.0 if choice.row.real_groups else 2.0 ** (gemm.weight.fraction_bits + choice.weight_exponent)


def _vector(build: GraphBuilder, name: str, array: NDArray[np.float32]) -> ir.Value:
    return build.lazy(f"{build.prefix}.{name}", ir.DataType.FLOAT, array.shape, lambda: array)


def matmul_names(layer: str, limbs: int) -> tuple[str, ...]:
    """Names of the MatMul nodes of a linear; the engine's plan shows them."""
    return (f"{layer}/matmul",) if limbs == 1 else (f"{layer}/matmul_high", f"{layer}/matmul_low")


def _emit_exact(build: GraphBuilder, gemm: QuantizedGemm, choice: GemmChoice, limbs: tuple[ir.Value, ...]) -> ir.Value:
    weight = (_emit_decoded if choice.row.weight_type == "INT4" else _emit_stored)(build, gemm, choice)
    if len(limbs) == 1:
        return build.op("MatMul", limbs[0], weight, name="matmul")
    names = zip(matmul_names("", 2), limbs, strict=True)
    high, low = (build.op("MatMul", limb, weight, name=name[1:]) for name, limb in names)
    factor = choice.number.limb_weights[0]
    high = build.op("Mul", high, build.constant(factor), name="high_weighted") if factor != 1 else high
    return build.op("Add", high, low, name="limb_sum")


def _emit_unshifted(build: GraphBuilder, gemm: QuantizedGemm, choice: GemmChoice, product: ir.Value) -> ir.Value:
    """The sum of whole integers: shift * (sum of each channel's weight operands) added, exact as the sums are."""
    sums = gemm.integers().sum(axis=1, dtype=np.int64) * 2.0**choice.weight_exponent * choice.number.shift
    return build.op("Add", product, _vector(build, "rtx_shift", sums.astype(np.float32)), name="unshifted")


def _emit_stored(build: GraphBuilder, gemm: QuantizedGemm, choice: GemmChoice) -> ir.Value:
    """Weight operand [K, N] kept in the hardware type."""
    kind = choice.row.weight_type
    make = partial(gemm.hardware_numbers, kind, choice.weight_exponent)
    stored = build.lazy(f"{gemm.layer}.rtx_weight", STORED[kind], gemm.shape, make)
    return build.op("DequantizeLinear", stored, build.constant(1.0), name="weight")


def _emit_decoded(build: GraphBuilder, gemm: QuantizedGemm, choice: GemmChoice) -> ir.Value:
    """Weight operand [K, N] kept as 4-bit indices, decoded in every inference: sign * max(lines) * multiplier."""
    stored = build.lazy(f"{gemm.layer}.rtx_weight", STORED["INT4"], gemm.shape, gemm.signed_indices)
    index = build.op("DequantizeLinear", stored, build.constant(1.0), name="index")
    value = _emit_lines(build, index, decoding_lines(gemm.weight.name), 2.0**choice.weight_exponent)
    if len(gemm.multipliers) > 1:
        value = _emit_multiplied(build, gemm, value)
    return round_in(build, value, choice.row.activation_type, "weight")


def _emit_lines(build: GraphBuilder, index: ir.Value, lines: tuple[tuple[float, float], ...], unit: float) -> ir.Value:
    """integer(|index|) * sign * unit."""
    if len(lines) == 1:
        slope = lines[0][0] * unit
        return build.op("Mul", index, build.constant(slope), name="decoded") if slope != 1 else index
    size, values = build.op("Abs", index, name="index_size"), []
    for number, (slope, intercept) in enumerate(lines):
        line = build.op("Mul", size, build.constant(slope * unit), name=f"line{number}")
        values.append(
            build.op("Add", line, build.constant(intercept * unit), name=f"line{number}_at") if intercept else line
        )
    return build.op("Mul", build.op("Sign", index, name="sign"), build.op("Max", *values, name="image"), name="decoded")


def _emit_multiplied(build: GraphBuilder, gemm: QuantizedGemm, value: ir.Value) -> ir.Value:
    groups, n = gemm.weight_groups, gemm.out_features
    stored = build.lazy(f"{gemm.layer}.rtx_multipliers", STORED["INT8"], (groups, 1, n), gemm.multiplier_rows)
    factor = build.op("DequantizeLinear", stored, build.constant(1.0), name="multipliers")
    grouped = build.op("Reshape", value, build.constant([groups, -1, n], np.int64), name="grouped")
    product = build.op("Mul", grouped, factor, name="multiplied")
    return build.op("Reshape", product, build.constant([-1, n], np.int64), name="ungrouped")


def _emit_half(
    build: GraphBuilder, gemm: QuantizedGemm, choice: GemmChoice, activation: ir.Value
) -> tuple[ir.Value, NDArray]:
    """Half-precision GEMM of weights with their group scales, normalized per channel so that nothing overflows."""
    channel = gemm.channel_units()
    operand = build.op("Cast", activation, name="operand", to=STORED["FP16"].value)
    emit_weight = _emit_half_stored if choice.row.weight_type == "FP16" else _emit_half_blocks
    half = build.op("MatMul", operand, emit_weight(build, gemm, choice, channel), name="matmul")
    return build.op("Cast", half, name="gemm", to=ir.DataType.FLOAT.value), channel


def _emit_half_stored(
    build: GraphBuilder, gemm: QuantizedGemm, choice: GemmChoice, channel: NDArray[np.float32]
) -> ir.Value:
    return build.lazy(f"{gemm.layer}.rtx_weight", STORED["FP16"], gemm.shape, partial(gemm.dequantized_half, channel))


def _emit_half_blocks(
    build: GraphBuilder, gemm: QuantizedGemm, choice: GemmChoice, channel: NDArray[np.float32]
) -> ir.Value:
    """Weight kept in 8 or 4 bits with an FP16 scale per group, expanded to FP16 in every inference."""
    kind = choice.row.weight_type
    make = gemm.signed_indices if kind == "INT4" else partial(gemm.hardware_numbers, kind, choice.weight_exponent)
    stored = build.lazy(f"{gemm.layer}.rtx_weight", STORED[kind], gemm.shape, make)
    unit = 2.0 ** -(gemm.weight.fraction_bits + choice.weight_exponent)
    scales_shape, scales = (gemm.weight_groups, gemm.out_features), partial(gemm.group_scales_half, channel, unit)
    scale = build.lazy(f"{gemm.layer}.rtx_group_scale", STORED["FP16"], scales_shape, scales)
    return build.op("DequantizeLinear", stored, scale, name="weight", axis=0, block_size=gemm.group_size)
