"""Tiles of a GEMM's operands, from memory to the type that its tensor cores take."""

from __future__ import annotations

import triton
import triton.language as tl

from plugins.gpu.decode import (
    bytes_of,
    bytes_to_fp16,
    negated,
    nibbles_to_e4m3,
    nibbles_to_magnitudes,
    repeated,
    scaled_e4m3,
    small_integer,
    spread_nibbles,
)


@triton.jit
def load_words(base, first, limit, BYTES: tl.constexpr, COUNT: tl.constexpr, MASKED: tl.constexpr):
    """COUNT words of BYTES (1, 2 or 4) from each pointer of base u8 [N, 1] + first words on -> u32 [N, COUNT].

    Zero from word `limit` on.
    """
    if BYTES == 4:
        base = base.to(tl.pointer_type(tl.uint32), bitcast=True)
    elif BYTES == 2:
        base = base.to(tl.pointer_type(tl.uint16), bitcast=True)
    word = first + tl.arange(0, COUNT)[None, :]
    found = tl.load(base + word, mask=word < limit, other=0) if MASKED else tl.load(base + word)
    return found.to(tl.uint32)


@triton.jit
def operand_tile(
    a, first, limit, TYPE: tl.constexpr, KIND: tl.constexpr, SHIFT: tl.constexpr, WIDTH: tl.constexpr,
    BK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Operand bytes first .. first + BK of the rows at a [N, 1], zero from `limit` on -> [N, BK] of TYPE."""
    if TYPE == "fp16":
        words = load_words(a, first // WIDTH, limit // WIDTH, WIDTH, BK // WIDTH, MASKED)
        return bytes_to_fp16(words, KIND, SHIFT, WIDTH)
    else:
        at = a.to(tl.pointer_type(tl.int8 if TYPE == "int8" else tl.float8e4nv), bitcast=True)
        k = first + tl.arange(0, BK)[None, :]
        return tl.load(at + k, mask=k < limit, other=0.0) if MASKED else tl.load(at + k)


@triton.jit
def load_multipliers(codes, group, COUNT: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """codes: pointers to rows of nibbles; group: which of COUNT groups -> int32 multipliers."""
    byte = tl.load(codes + tl.minimum(group, COUNT - 1) // 2)
    return small_integer((byte >> ((group % 2) * 4).to(tl.uint8)) & 0x0F, LOW, HIGH)


@triton.jit
def multiplier_of_words(
    codes, first, K: tl.constexpr, GROUP: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, WIDTH: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """int32 multipliers of the BK / WIDTH words of WIDTH weights from `first` on, for rows of codes [BN]."""
    if GROUP % BK == 0:
        return load_multipliers(codes, first // GROUP, K // GROUP, LOW, HIGH)[:, None]
    elif BK % GROUP == 0:  # groups are whole parts of the tile: load each once
        rows: tl.constexpr = codes.shape[0]
        parts: tl.constexpr = BK // GROUP
        found = load_multipliers(codes[:, None], first // GROUP + tl.arange(0, parts)[None, :], K // GROUP, LOW, HIGH)
        wide = tl.broadcast_to(found[:, :, None], (rows, parts, GROUP // WIDTH))
        return tl.reshape(wide, (rows, BK // WIDTH))
    else:
        group = (first + tl.arange(0, BK // WIDTH)[None, :] * WIDTH) // GROUP
        return load_multipliers(codes[:, None], group, K // GROUP, LOW, HIGH)


@triton.jit
def packed_weights(
    w, codes, first, limit, K: tl.constexpr, GROUP: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    SIGNED: tl.constexpr, INTEGER: tl.constexpr, SHIFT: tl.constexpr, TYPE: tl.constexpr, WIDTH: tl.constexpr,
    BK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Weights first .. first + BK of the rows at w [BN, 1], codes [BN] -> [BN, BK], zero from `limit` on.

    u8 for "int8" and "fp8" (E4M3 bytes), else fp16; with LOW not 0 times the multipliers of their groups. WIDTH:
    weights of a load (4 or 2); it divides K, GROUP and `limit`.
    """
    x = spread_nibbles(load_words(w, first // WIDTH, limit // WIDTH, WIDTH // 2, BK // WIDTH, MASKED), WIDTH)
    if LOW != 0:
        factor = multiplier_of_words(codes, first, K, GROUP, LOW, HIGH, WIDTH, BK)
    if TYPE == "int8":
        v = nibbles_to_magnitudes(x, SIGNED, INTEGER, SHIFT)
        if LOW != 0:
            v *= factor.to(tl.uint32)
        return bytes_of(negated(v, x) if SIGNED else v, WIDTH)
    elif TYPE == "fp8":
        r = nibbles_to_e4m3(x, SIGNED, INTEGER, SHIFT)
        return bytes_of(scaled_e4m3(r, factor.to(tl.float16)) if LOW != 0 else r, WIDTH)
    else:
        value = bytes_to_fp16(nibbles_to_e4m3(x, SIGNED, INTEGER, SHIFT), "signed", 7, WIDTH)
        if LOW != 0 and GROUP % BK == 0:
            value *= factor.to(tl.float16)
        elif LOW != 0:
            value *= repeated(factor.to(tl.float16), WIDTH)
        return value
