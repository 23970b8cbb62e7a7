"""Chooses the tensor-core path of each quantized linear on `rtx`; every refusal says why."""

from __future__ import annotations

from dataclasses import dataclass

from export.errors import ContractError
from export.formats.format import get_format
from export.formats.operands import FLOAT_TYPES
from pipeline.backends.base import GemmRow
from pipeline.backends.rtx.operands import Operand, activation_operand, decoding_lines, weight_exponent
from pipeline.backends.rtx.weights import PackedWeight

# Group sizes of block-wise DequantizeLinear that the engine builder takes.
BLOCK_SIZES = (32, 64, 128)
FP32_EXACT = 2 ** FLOAT_TYPES["FP32"][0]


@dataclass(frozen=True)
class Plan:
    """One GEMM: the row that was taken, its activation operand, the weight's exponent, and the sentence for people.

    exact: operands hold the images and the float32 sum of all products is exact in any order.
    """

    row: GemmRow
    operand: Operand
    weight_exponent: int
    why: str
    exact: bool


def choose(weight: PackedWeight, rows: tuple[GemmRow, ...]) -> Plan:
    """The first row that holds the layer's formats. Raises ContractError with the reason of every row."""
    reasons: list[str] = []
    for row in rows:
        reason = _refusal(weight, row)
        if not reason:
            return _plan(weight, row, reasons)
        reasons.append(f"{row.path}: {reason}")
    raise ContractError(
        f"{weight.layer}: no way to run {weight.activation_format} x {weight.format}; {'; '.join(reasons)}"
    )


def _refusal(weight: PackedWeight, row: GemmRow) -> str:
    """Why `row` cannot run the layer; empty if it can."""
    if weight.has_real_groups and not row.real_groups:
        return "a real scale per group does not fold into the operand"
    operand = activation_operand(weight.activation_format, row.activation_type, row.limbs)
    if operand is None:
        return f"{weight.activation_format} does not embed in {row.limbs} x {row.activation_type}"
    if operand.shift and (bound := _largest_sum(weight)) > FP32_EXACT:
        return f"sums of images less {operand.shift} are not exact in float32: they reach {bound}"
    return _group_refusal(weight, row) if row.real_groups else _embedding_refusal(weight, row)


def _embedding_refusal(weight: PackedWeight, row: GemmRow) -> str:
    if weight_exponent(weight.format, operand_type(row), weight.table) is None:
        return f"{weight.format} with multipliers {weight.table} does not embed in {operand_type(row)}"
    if row.weight_type == "INT4" and not decoding_lines(weight.format):
        return f"{weight.format} is not a signed 4-bit format with convex magnitudes"
    return ""


def _group_refusal(weight: PackedWeight, row: GemmRow) -> str:
    """Rows of the half-precision GEMM: the weight with its group scales stands in FP16, whatever it is stored as."""
    if row.weight_type == "FP16":
        return ""
    if not weight.has_real_groups:
        return "for real group scales"
    if weight.group_size not in BLOCK_SIZES:
        return f"the builder takes groups of {BLOCK_SIZES}, not {weight.group_size}"
    if row.weight_type == "INT4" and len(decoding_lines(weight.format)) != 1:
        return f"{weight.format} is not a uniform 4-bit format"
    return "" if _block_exponent(weight, row) is not None else f"{weight.format} does not embed in {row.weight_type}"


def _block_exponent(weight: PackedWeight, row: GemmRow) -> int | None:
    """Stored number = image * 2^exponent; 4-bit indices of a uniform format are its images."""
    if row.weight_type == "INT4":
        return 0 if weight.table == (1,) else None
    return weight_exponent(weight.format, row.weight_type, weight.table) if row.weight_type == "E4M3" else 0


def operand_type(row: GemmRow) -> str:
    """Type of the weight in the GEMM; 4-bit indices are decoded into the activation's type."""
    return row.activation_type if row.weight_type == "INT4" else row.weight_type


def _plan(weight: PackedWeight, row: GemmRow, refused: list[str]) -> Plan:
    operand = activation_operand(weight.activation_format, row.activation_type, row.limbs)
    assert operand is not None
    if row.real_groups:
        rounded = "rounded with its group scale" if weight.has_real_groups else "exact"
        exponent = _block_exponent(weight, row)
        assert exponent is not None
        why = f"{weight.activation_format} is exact in FP16, the weight {rounded}; the FP16 GEMM rounds its result once"
        return Plan(row, operand, exponent, _with_refusals(why, refused), exact=False)
    exponent = weight_exponent(weight.format, operand_type(row), weight.table)
    assert exponent is not None
    bound = _largest_sum(weight)
    return Plan(row, operand, exponent, _with_refusals(_why(weight, operand, bound), refused), bound <= FP32_EXACT)


def _largest_sum(weight: PackedWeight) -> int:
    """Bound of the integer sums of a linear."""
    return get_format(weight.activation_format).kmax * weight.largest_row_sum()


def _why(weight: PackedWeight, operand: Operand, bound: int) -> str:
    rounding = "its own rounding is the format's" if operand.native else "rounded to the format's grid first"
    limbs = f" less {operand.shift}" if operand.shift else "" if operand.limbs == 1 else f" as {operand.limbs} limbs"
    held = f"{weight.activation_format} is exact in {operand.type}{limbs} ({rounding}), {weight.format} too"
    exact = "every" if bound <= FP32_EXACT else "not every"
    return f"{held}; |integer sum| <= {bound}, so {exact} float32 sum is exact"


def _with_refusals(why: str, refused: list[str]) -> str:
    return "; ".join([why, *(f"not {reason}" for reason in refused)])
