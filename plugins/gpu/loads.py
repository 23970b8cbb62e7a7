"""Tiles of a GEMM's operands, from memory to the type that its tensor cores take."""

from __future__ import annotations

import triton
import triton.language as tl

from plugins.gpu.decode import float_byte_to_fp16, int8_to_fp16, nibble_to_e4m3, scaled_e4m3, small_integer


@triton.jit
def load_activations(a, k, limit, FP8: tl.constexpr, KIND: tl.constexpr, SHIFT: tl.constexpr, MASKED: tl.constexpr):
    """Operand bytes at a + k, zero from k = limit on -> fp8e4nv as they are; or fp16, KIND signed, unsigned, int8."""
    if FP8:
        a = a.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
    byte = tl.load(a + k, mask=k < limit, other=0.0 if FP8 else 0) if MASKED else tl.load(a + k)
    if FP8:
        return byte
    elif KIND == "int8":
        return int8_to_fp16(byte)
    else:
        return float_byte_to_fp16(byte, KIND == "signed", SHIFT)


@triton.jit
def load_multipliers(codes, pair, K: tl.constexpr, GROUP: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """codes: pointers to rows of nibbles [BN, 1]; pair: bytes of weights [1, BK / 2] -> fp16 multipliers."""
    group = pair // (GROUP // 2)
    byte = tl.load(codes + group // 2, mask=pair < K // 2, other=0)
    return small_integer((byte >> ((group % 2) * 4).to(tl.uint8)) & 0x0F, LOW, HIGH)


@triton.jit
def packed_weights(
    w, codes, first, limit, K: tl.constexpr, GROUP: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    SIGNED: tl.constexpr, INTEGER: tl.constexpr, SHIFT: tl.constexpr, BK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Weights first .. first + BK of rows at w [BN, 1] -> u8 [BN, BK], E4M3 bytes with their multipliers."""
    pair = first // 2 + tl.arange(0, BK // 2)[None, :]
    packed = tl.load(w + pair, mask=pair < limit // 2, other=0) if MASKED else tl.load(w + pair)
    low = nibble_to_e4m3(packed & 0x0F, SIGNED, INTEGER, SHIFT)
    high = nibble_to_e4m3(packed >> 4, SIGNED, INTEGER, SHIFT)
    if LOW != 0:
        multiplier = load_multipliers(codes, pair, K, GROUP, LOW, HIGH)
        low, high = scaled_e4m3(low, multiplier), scaled_e4m3(high, multiplier)
    return tl.interleave(low, high)
