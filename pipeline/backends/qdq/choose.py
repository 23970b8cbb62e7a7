"""Chooses the tensor-core path of each quantized linear; every refusal says why."""

from __future__ import annotations

from dataclasses import dataclass, replace

from export.errors import ContractError
from export.formats.operands import (
    FP32_BITS,
    INT32_MAX,
    HardwareNumber,
    activation_number,
    decoding_lines,
    weight_exponent,
)
from pipeline.passes.probes import GemmRow
from pipeline.passes.quantized_gemm import QuantizedGemm

# Group sizes of block-wise DequantizeLinear that the engine builder takes.
BLOCK_SIZES = (32, 64, 128)
# Largest magnitude up to which all integers are exact in a sum of that type.
EXACT_SUMS = {"FP32": 2**FP32_BITS, "INT32": INT32_MAX}


@dataclass(frozen=True)
class GemmChoice:
    """One GEMM: the row that was taken, its activation's hardware number, the weight's exponent, and the sentence for
    people.

    exact: hardware numbers hold the integers and the sum of all products, in the row's type, is exact in any order.
    """

    row: GemmRow
    number: HardwareNumber
    weight_exponent: int
    why: str
    exact: bool


def choose(gemm: QuantizedGemm, rows: tuple[GemmRow, ...]) -> GemmChoice:
    """The first row that holds the layer's formats. Raises ContractError with the reason of every row."""
    reasons: list[str] = []
    for row in rows:
        choice = _try(gemm, row)
        if isinstance(choice, GemmChoice):
            return replace(choice, why="; ".join([choice.why, *(f"not {reason}" for reason in reasons)]))
        reasons.append(f"{row.path}: {choice}")
    formats = f"{gemm.activation.name} x {gemm.weight.name}"
    raise ContractError(f"{gemm.layer}: no way to run {formats}; {'; '.join(reasons)}")


def _try(gemm: QuantizedGemm, row: GemmRow) -> GemmChoice | str:
    """How `row` runs the layer, or why it cannot."""
    if gemm.real_groups and not row.real_groups:
        return "a real scale per group does not fold into the operand"
    number = activation_number(gemm.activation.name, row.activation_type, row.limbs)
    if number is None:
        return f"{gemm.activation.name} does not embed in {row.limbs} x {row.activation_type}"
    if (bound := _largest_sum(gemm)) > EXACT_SUMS[row.sum_type]:
        if row.sum_type == "INT32":
            return f"the sum can reach {bound}, more than int32 holds"
        if number.shift:
            return f"sums of integers less {number.shift} are not exact in float32: they reach {bound}"
    return _half(gemm, row, number) if row.real_groups else _embedded(gemm, row, number)


def _embedded(gemm: QuantizedGemm, row: GemmRow, number: HardwareNumber) -> GemmChoice | str:
    """Both operands hold integers; 4-bit indices are decoded into the activation's type."""
    operand = row.activation_type if row.weight_type == "INT4" else row.weight_type
    exponent = weight_exponent(gemm.weight.name, operand, gemm.multipliers)
    if exponent is None:
        return f"{gemm.weight.name} with multipliers {gemm.multipliers} does not embed in {operand}"
    if row.weight_type == "INT4" and not decoding_lines(gemm.weight.name):
        return f"{gemm.weight.name} is not a signed 4-bit format with convex magnitudes"
    bound = _largest_sum(gemm)
    return GemmChoice(row, number, exponent, _why(gemm, number, bound, row.sum_type), bound <= EXACT_SUMS[row.sum_type])


def _half(gemm: QuantizedGemm, row: GemmRow, number: HardwareNumber) -> GemmChoice | str:
    """The half-precision GEMM: the weight with its group scales stands in FP16, whatever it is stored as."""
    if row.weight_type != "FP16":
        if not gemm.real_groups:
            return "for real group scales"
        if gemm.group_size not in BLOCK_SIZES:
            return f"the builder takes groups of {BLOCK_SIZES}, not {gemm.group_size}"
        if row.weight_type == "INT4" and len(decoding_lines(gemm.weight.name)) != 1:
            return f"{gemm.weight.name} is not a uniform 4-bit format"
    exponent = _block_exponent(gemm, row)
    if exponent is None:
        return f"{gemm.weight.name} does not embed in {row.weight_type}"
    rounded = "rounded with its group scale" if gemm.real_groups else "exact"
    why = f"{gemm.activation.name} is exact in FP16, the weight {rounded}; the FP16 GEMM rounds its result once"
    return GemmChoice(row, number, exponent, why, exact=False)


def _block_exponent(gemm: QuantizedGemm, row: GemmRow) -> int | None:
    """Stored number = integer * 2^exponent; 4-bit indices of a uniform format are its integers."""
    if row.weight_type == "INT4":
        return 0 if gemm.multipliers == (1,) else None
    return weight_exponent(gemm.weight.name, row.weight_type, gemm.multipliers) if row.weight_type == "E4M3" else 0


def _largest_sum(gemm: QuantizedGemm) -> int:
    """Bound of the integer sums of a linear."""
    return gemm.activation.kmax * gemm.largest_row_sum


def _why(gemm: QuantizedGemm, number: HardwareNumber, bound: int, sum_type: str) -> str:
    rounding = "its own rounding is the format's" if number.rounds_itself else "rounded to the format's grid first"
    limbs = f" less {number.shift}" if number.shift else "" if number.limbs == 1 else f" as {number.limbs} limbs"
    held = f"{gemm.activation.name} is exact in {number.type}{limbs} ({rounding}), {gemm.weight.name} too"
    exact = "every" if bound <= EXACT_SUMS[sum_type] else "not every"
    name = {"FP32": "float32", "INT32": "int32"}[sum_type]
    return f"{held}; |integer sum| <= {bound}, so {exact} {name} sum is exact"
