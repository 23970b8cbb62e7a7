"""Which of a CPU's GEMM forms runs a quantized linear exactly: bounds checked by code, refusals as sentences."""

from __future__ import annotations

from pipeline.backends.base import WIDE_SUM, Capabilities, GemmRow
from pipeline.backends.cpu.quantizers import LARGE_ZERO, SMALL_ZERO, largest_operand, limb_base
from pipeline.passes.quantized_gemm import GemmSpec

INT8_MAX, UINT8_MAX, INT16_MAX, INT32_MAX = 2**7 - 1, 2**8 - 1, 2**15 - 1, 2**31 - 1


def choose_path(spec: GemmSpec, capabilities: Capabilities) -> tuple[GemmRow | None, str]:
    """(first row that is exact, why) or (None, why none is)."""
    reasons: list[str] = []
    for row in capabilities.gemms:
        reason = refusal(spec, row, WIDE_SUM in capabilities.ops)
        if not reason:
            return row, "; ".join([_praise(spec, row), *reasons])
        reasons.append(f"not {row.path}: {reason}")
    return None, "; ".join(reasons)


def _praise(spec: GemmSpec, row: GemmRow) -> str:
    limbs = "" if row.limbs == 1 else f" in {row.limbs} limbs"
    return f"{spec.activation.name} x {spec.weight.name} is exact in u8 x s8 with int32 sums{limbs}"


def refusal(spec: GemmSpec, row: GemmRow, wide_sum: bool) -> str:
    """Why `row` cannot run the linear exactly, '' if it can."""
    if (spec.sum_groups > 1) != row.real_groups:
        return "it has no scale per group" if spec.sum_groups > 1 else "the weight has one scale per channel"
    return _too_wide(spec, row.limbs) or _overflow(spec, row.limbs, wide_sum)


def _too_wide(spec: GemmSpec, limbs: int) -> str:
    kmax_a = spec.activation.kmax
    if spec.weight_kmax > INT8_MAX:
        return f"image {spec.weight_kmax} of {spec.weight.name} exceeds int8"
    too_large = kmax_a >= LARGE_ZERO if spec.activation.sign_bits else kmax_a > UINT8_MAX
    if (limbs == 1 and too_large) or limb_base(kmax_a, limbs) // 2 >= SMALL_ZERO:
        return f"image {kmax_a} of {spec.activation.name} exceeds {limbs} operand{'s' * (limbs > 1)} of 8 bits"
    return ""


def _overflow(spec: GemmSpec, limbs: int, wide_sum: bool) -> str:
    pair = 2 * largest_operand(spec.activation, limbs) * spec.weight_kmax
    if not wide_sum and pair > INT16_MAX:
        return f"a pair of products can reach {pair}; this CPU sums pairs in 16 bits, at most {INT16_MAX}"
    total = spec.activation.kmax * spec.weight_kmax * spec.sum_length
    return f"the sum can reach {total}, more than int32 holds" if total > INT32_MAX else ""
