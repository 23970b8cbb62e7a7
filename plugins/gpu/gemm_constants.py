"""The compile-time arguments of the GEMM, pack and expand kernels: what follows from a spec, a tile and the GPU."""

from __future__ import annotations

from typing import Any

from export.errors import RecipeError
from plugins.gpu.operands import E4M3, INT8
from plugins.gpu.promotion import promotion_of
from plugins.gpu.spec import GemmSpec, PackSpec
from plugins.gpu.tile_table import Tile
from plugins.gpu.tiles import BandTile, ReduceTile, architecture, product_type, scales_sums


def packed_table(multipliers: tuple[int, ...]) -> tuple[int, int]:
    """Up to 16 multipliers as the bytes of two 64-bit numbers, the first in the lowest byte."""
    whole = int.from_bytes(bytes(multipliers).ljust(16, b"\0"), "little")
    return whole % 2**64, whole // 2**64


def activation_constants(spec: GemmSpec, products: str) -> tuple[str, int, int]:
    """(KIND, SHIFT, e) of `loads.operand_tile`: an operand stands for value * 2^e. Raises RecipeError."""
    operand, fmt = spec.operand, spec.activation_format
    if operand.kind == INT8:
        return "int8", 0, operand.shift
    if operand.kind == E4M3:
        return "signed", 7, operand.shift - (8 if products == "fp16" else 0)
    if fmt.exponent_bits == 5 and fmt.specials == "none":
        raise RecipeError(f"activations in {fmt.name}: its top binade has the bits of FP16's Inf; use another format")
    return "signed" if fmt.sign_bits else "unsigned", 10 - fmt.mantissa_bits, fmt.bias - 15


def weight_exponent(spec: GemmSpec) -> int:
    """e of the bytes of expanded weights: they stand for value * multiplier * 2^e."""
    fmt = spec.weight_format
    if spec.multiplies_integers:
        return fmt.fraction_bits
    return -9 if fmt.is_integer else fmt.bias - 7


def load_width(spec: GemmSpec) -> int:
    """Operands that are loaded and decoded in one word: 4 where rows and groups allow it, else 2."""
    return 4 if spec.in_features % 4 == 0 and spec.group_size % 4 == 0 else 2


def gemm_constants(spec: GemmSpec, tile: Tile, sm: int, *, by_group: bool = False) -> dict[str, Any]:
    """The compile-time arguments that packed_gemm and expanded_gemm share. by_group: a multiplier follows each sum."""
    products = product_type(spec, sm)
    promotion = promotion_of(spec, products == "fp8", architecture(sm), by_group=by_group or spec.real_groups)
    kind, shift, exponent = activation_constants(spec, products)
    return {
        "N": spec.out_features,
        "K": spec.in_features,
        "GROUP": spec.group_size or spec.in_features,
        "REAL_GROUPS": spec.real_groups,
        "WIDTH": load_width(spec),
        "FACTOR": "multiplier" if by_group else "scale" if spec.real_groups else "none",
        "A_KIND": kind,
        "A_SHIFT": shift,
        "TYPE": products,
        "UNIT": 2.0 ** -(exponent + weight_exponent(spec) - (8 if products == "fp16" else 0)),
        "EPILOGUE": spec.epilogue,
        "PROMOTE": min(promotion.every, tile.k),
        "BM": tile.m,
        "BN": tile.n,
        "BK": tile.k,
        "SPLITS": tile.splits,
        "BAND": tile.band,
        "WEIGHTS_FIRST": tile.weights_first,
    }


def packed_constants(spec: GemmSpec, tile: Tile, sm: int) -> dict[str, Any]:
    """The compile-time arguments of packed_gemm."""
    return {**gemm_constants(spec, tile, sm, by_group=scales_sums(spec, tile.k, sm)), **weight_constants(spec)}


def reduce_constants(spec: GemmSpec, tile: ReduceTile, sm: int) -> dict[str, Any]:
    """The compile-time arguments of reduce_splits."""
    return {
        "N": spec.out_features,
        "REAL_GROUPS": spec.real_groups,
        "EPILOGUE": spec.epilogue,
        "SPLITS": tile.splits,
        "BM": tile.m,
        "BN": tile.n,
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


def pack_constants(spec: PackSpec, tile: BandTile, sm: int) -> dict[str, Any]:
    """The compile-time arguments of pack."""
    return {"K": spec.in_features, "ROWS": tile.rows, "COLUMNS": tile.columns}


def expand_constants(spec: GemmSpec, tile: BandTile, sm: int) -> dict[str, Any]:
    """The compile-time arguments of expand."""
    return {
        **weight_constants(spec),
        "TYPE": "int8" if spec.multiplies_integers else "fp8",
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
    }
