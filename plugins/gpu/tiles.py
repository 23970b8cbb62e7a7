"""Which tile a GEMM runs in: one pure function of the spec, the number of tokens and the GPU.

Nothing here changes a result beyond the order of a sum; every choice is legal for every shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from export.errors import RecipeError
from plugins.gpu.operands import E4M3, INT8
from plugins.gpu.promotion import promotion_of
from plugins.gpu.specs import GemmSpec, PackSpec

# Multiprocessors of the largest common GPU of each architecture, for filling a wave where no GPU can be asked.
MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}
# Where tensor cores multiply FP8; below, and for operands that are no E4M3 bytes, FP16.
FIRST_FP8 = 89
INTERPRETED = 0


@dataclass(frozen=True)
class Tile:
    """m, n: outputs of a program; k: input channels of a step; splits: programs that share an output's sum.

    band: rows of tiles taken together (L2). weights_first: y^T = w a^T, which puts decoded weights in registers.
    """

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int
    splits: int = 1
    band: int = 8
    weights_first: bool = False


def architecture(sm: int) -> int:
    """The row of MULTIPROCESSORS that stands for compute capability `sm` (10 * major + minor; 0: interpreted)."""
    if sm == INTERPRETED:
        return 90
    if sm < min(MULTIPROCESSORS):
        raise RecipeError(
            f"compute capability {sm} is below 80; the GPU kernels need bf16 tensor cores (SM80 or newer)"
        )
    return max(known for known in MULTIPROCESSORS if known <= sm)


def uses_fp8(spec: GemmSpec, sm: int) -> bool:
    """Whether both operands go to FP8 tensor cores as E4M3 bytes."""
    return architecture(sm) >= FIRST_FP8 and spec.operand.kind == E4M3


def packed_tile(spec: GemmSpec, tokens: int, sm: int, *, may_split: bool = False) -> Tile:
    """The tile of packed_gemm for `tokens` rows (M) on compute capability `sm`."""
    architecture(sm)
    return Tile(64 if tokens <= 64 else 128, 128, 128 if uses_fp8(spec, sm) else 64, 8 if sm == 90 else 4, 3)


def expanded_tile(spec: GemmSpec, tokens: int, sm: int, *, may_split: bool = False) -> Tile:
    """The tile of expanded_gemm for `tokens` rows (M) on compute capability `sm`."""
    return packed_tile(spec, tokens, sm, may_split=may_split)


def packed_table(multipliers: tuple[int, ...]) -> tuple[int, int]:
    """Up to 16 multipliers as the bytes of two 64-bit numbers, the first in the lowest byte."""
    whole = int.from_bytes(bytes(multipliers).ljust(16, b"\0"), "little")
    return whole % 2**64, whole // 2**64


def activation_constants(spec: GemmSpec, fp8: bool) -> tuple[str, int, int]:
    """(KIND, SHIFT, e) of `load_activations`: an operand stands for value * 2^e."""
    operand, fmt = spec.operand, spec.activation_format
    if operand.kind == INT8:
        return "int8", 0, operand.shift
    if operand.kind == E4M3:
        return "signed", 7, operand.shift - (0 if fp8 else 8)
    if fmt.exponent_bits == 5 and fmt.specials == "none":
        raise RecipeError(f"activations in {fmt.name}: its top binade has the bits of FP16's Inf; use another format")
    return "signed" if fmt.sign_bits else "unsigned", 10 - fmt.mantissa_bits, fmt.bias - 15


def weight_exponent(spec: GemmSpec) -> int:
    """e of the E4M3 bytes of weights: they stand for value * multiplier * 2^e."""
    fmt = spec.weight_format
    return -9 if fmt.is_integer else fmt.bias - 7


def load_width(spec: GemmSpec) -> int:
    """Operands that are loaded and decoded in one word: 4 where rows and groups allow it, else 2."""
    return 4 if spec.in_features % 4 == 0 and spec.group_size % 4 == 0 else 2


def gemm_constants(spec: GemmSpec, tile: Tile, sm: int) -> dict[str, Any]:
    """The compile-time arguments that packed_gemm and expanded_gemm share."""
    fp8 = uses_fp8(spec, sm)
    kind, shift, exponent = activation_constants(spec, fp8)
    return {
        "N": spec.out_features,
        "K": spec.in_features,
        "GROUP": spec.group_size or spec.in_features,
        "REAL_GROUPS": spec.real_groups,
        "WIDTH": load_width(spec),
        "FACTOR": "scale" if spec.real_groups else "none",
        "A_KIND": kind,
        "A_SHIFT": shift,
        "FP8": fp8,
        "UNIT": 2.0 ** -(exponent + weight_exponent(spec) - (0 if fp8 else 8)),
        "EPILOGUE": spec.epilogue,
        "PROMOTE": promotion_of(spec, sm, tile.k),
        "BM": tile.m,
        "BN": tile.n,
        "BK": tile.k,
        "SPLITS": tile.splits,
        "BAND": tile.band,
        "WEIGHTS_FIRST": tile.weights_first,
    }


def packed_constants(spec: GemmSpec, tile: Tile, sm: int) -> dict[str, Any]:
    """The compile-time arguments of packed_gemm.

    Multipliers go to the sum of a group where a step stays within one and FP8 is used: an addition in float32 for each
    output, where multiplying each weight takes the FP8 operand to FP16 and back. It promotes the sum besides.
    """
    constants = {**gemm_constants(spec, tile, sm), **weight_constants(spec)}
    whole = spec.has_multipliers and not spec.real_groups and constants["GROUP"] % tile.k == 0
    if whole and constants["FP8"]:
        constants["FACTOR"] = "multiplier"
    return constants


def reduce_constants(spec: GemmSpec, tile: Tile) -> dict[str, Any]:
    """The compile-time arguments of reduce_splits."""
    return {
        "N": spec.out_features,
        "REAL_GROUPS": spec.real_groups,
        "EPILOGUE": spec.epilogue,
        "SPLITS": tile.splits,
        "BM": 16,
        "BN": 128,
    }


def weight_constants(spec: GemmSpec) -> dict[str, Any]:
    """The compile-time arguments that say how packed weights are decoded."""
    fmt = spec.weight_format
    low, high = packed_table(spec.multipliers) if spec.has_multipliers else (0, 0)
    return {
        "K": spec.in_features,
        "GROUP": spec.group_size or spec.in_features,
        "MULTIPLIERS_LOW": low,
        "MULTIPLIERS_HIGH": high,
        "W_SIGNED": bool(fmt.sign_bits),
        "W_INTEGER": fmt.is_integer,
        "W_SHIFT": 3 - fmt.mantissa_bits,
        "WIDTH": load_width(spec),
    }


# --- pack and expand -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BandTile:
    """rows: of a program, which walks over them `columns` at a time."""

    rows: int = 4
    columns: int = 1024
    num_warps: int = 4
    num_stages: int = 1


def band_tile(spec: GemmSpec | PackSpec, rows: int, sm: int) -> BandTile:
    """The tile of pack and expand, which only move bytes: about 4 KiB at a time, the same everywhere."""
    architecture(sm)
    return BandTile()


def band_grid(spec: GemmSpec | PackSpec, tile: BandTile, rows: int) -> tuple[int, int, int]:
    """Programs of pack and expand."""
    return (-(-rows // tile.rows), 1, 1)


def pack_constants(spec: PackSpec, tile: BandTile, sm: int) -> dict[str, Any]:
    """The compile-time arguments of pack."""
    return {"K": spec.in_features, "ROWS": tile.rows, "COLUMNS": tile.columns}


def expand_constants(spec: GemmSpec, tile: BandTile, sm: int) -> dict[str, Any]:
    """The compile-time arguments of expand."""
    return {**weight_constants(spec), "ROWS": tile.rows, "COLUMNS": tile.columns}


def gemm_grid(spec: GemmSpec, tile: Tile, rows: int) -> tuple[int, int, int]:
    """Programs of packed_gemm and expanded_gemm."""
    return (-(-rows // tile.m) * -(-spec.out_features // tile.n), tile.splits, 1)
