"""Which of a CPU's GEMM forms runs a quantized linear exactly: bounds checked by code, refusals as sentences."""

from __future__ import annotations

from pipeline.backends.cpu.quantizers import LARGE_ZERO, SMALL_ZERO, largest_operand, limb_base
from pipeline.passes.probes import WIDE_SUM, Capabilities, GemmRow
from pipeline.passes.quantized_gemm import QuantizedGemm

INT8_MAX, UINT8_MAX, INT16_MAX, INT32_MAX = 2**7 - 1, 2**8 - 1, 2**15 - 1, 2**31 - 1


def choose_path(gemm: QuantizedGemm, capabilities: Capabilities) -> tuple[GemmRow | None, str]:
    """(first row that is exact, why) or (None, why none is)."""
    reasons: list[str] = []
    for row in capabilities.gemms:
        reason = refusal(gemm, row, WIDE_SUM in capabilities.ops)
        if not reason:
            return row, "; ".join([_reason_for(gemm, row), *reasons])
        reasons.append(f"not {row.path}: {reason}")
    return None, "; ".join(reasons)


def _reason_for(gemm: QuantizedGemm, row: GemmRow) -> str:
    limbs = "" if row.limbs == 1 else f" in {row.limbs} limbs"
    return f"{gemm.activation.name} x {gemm.weight.name} is exact in u8 x s8 with int32 sums{limbs}"


def refusal(gemm: QuantizedGemm, row: GemmRow, wide_sum: bool) -> str:
    """Why `row` cannot run the linear exactly, '' if it can."""
    if (gemm.sum_groups > 1) != row.real_groups:
        return "it has no scale per group" if gemm.sum_groups > 1 else "the weight has one scale per channel"
    return _too_wide(gemm, row.limbs) or _overflow(gemm, row.limbs, wide_sum)


def _too_wide(gemm: QuantizedGemm, limbs: int) -> str:
    kmax_a = gemm.activation.kmax
    if gemm.weight_kmax > INT8_MAX:
        return f"image {gemm.weight_kmax} of {gemm.weight.name} exceeds int8"
    too_large = kmax_a >= LARGE_ZERO if gemm.activation.sign_bits else kmax_a > UINT8_MAX
    if (limbs == 1 and too_large) or limb_base(kmax_a, limbs) // 2 >= SMALL_ZERO:
        return f"image {kmax_a} of {gemm.activation.name} exceeds {limbs} operand{'s' * (limbs > 1)} of 8 bits"
    return ""


def _overflow(gemm: QuantizedGemm, limbs: int, wide_sum: bool) -> str:
    pair = 2 * largest_operand(gemm.activation, limbs) * gemm.weight_kmax
    if not wide_sum and pair > INT16_MAX:
        return f"a pair of products can reach {pair}; this CPU sums pairs in 16 bits, at most {INT16_MAX}"
    total = gemm.activation.kmax * gemm.weight_kmax * gemm.sum_length
    return f"the sum can reach {total}, more than int32 holds" if total > INT32_MAX else ""
