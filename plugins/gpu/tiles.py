"""Which tile a GEMM runs in: pure functions of the spec, the number of tokens and the GPU, in this one place.

Nothing here changes a result beyond the order of a sum; every choice is legal for every shape. The tiles to choose from
are in plugins/gpu/tile_table.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from export.errors import RecipeError
from plugins.gpu.operands import E4M3
from plugins.gpu.promotion import promotion_of
from plugins.gpu.spec import GemmSpec, PackSpec
from plugins.gpu.tile_table import INSTRUCTIONS, MACHINES, PROMOTED, TABLE, Products, Tile

# Where tensor cores multiply FP8; below, and for operands that are no E4M3 bytes, FP16.
FIRST_FP8 = 89
INTERPRETED = 0
LEAST_SCALED_STEP = 64
LEAST_STEP: dict[Products, int] = {"fp8": 32, "int8": 32, "fp16": 16}  # products of one instruction
SPLITS = (1, 2, 3, 4, 6, 8)
LEAST_STEPS_OF_A_SPLIT = 4
# Outputs of a thread. With a gate and a residual it holds three tiles, which must fit into registers together, and with
# promotion two sums besides, of which float32 gates leave less room.
MOST_OUTPUTS, MOST_WITH_GATE, MOST_WITH_WIDE_GATE = 255, 64, 32
# Clocks before a program's first product and after its last, and of one more kernel (the sum of splits, an expansion).
FILL_CLOCKS = 2000
KERNEL_CLOCKS = 5000
SPLIT_MARGIN = 1.1  # what a split must promise, for the memory it takes
# Linears of the same codes are merged up to so many output channels: a tile of 128 for each of an H100's 132
# multiprocessors. From there on one row of tiles fills the GPU, and merging more only makes the result larger.
MERGED_COLUMNS = 132 * 128
# From how many tokens on a linear whose weight may stay expanded does: reading N x K bytes and doing 2 M N K operations
# takes equally long on an H100 at M = 1979e12 / 3.35e12 / 2 = 295 (data sheet, FP8); from the next tile on, decoding
# costs more than reading saves. Whether one call pays for an expansion of its own is another question, `expands_first`.
EXPAND_FROM = 512


def architecture(sm: int) -> int:
    """The row of MACHINES that stands for compute capability `sm` (10 * major + minor; 0: interpreted, as 90).

    Raises RecipeError below 80.
    """
    if sm == INTERPRETED:
        return 90
    if sm < min(MACHINES):
        raise RecipeError(f"compute capability {sm} is below 80; the GPU kernels need a GPU of 80 or above (Ampere)")
    return max(known for known in MACHINES if known <= sm)


def product_type(spec: GemmSpec, sm: int) -> Products:
    """What the tensor cores multiply: both operands' INT8 images, their E4M3 bytes, or all decoded to FP16."""
    if spec.multiplies_integers:
        return "int8"
    return "fp8" if architecture(sm) >= FIRST_FP8 and spec.operand.kind == E4M3 else "fp16"


def prefers_integers(sms: Sequence[int]) -> bool:
    """Whether INT8 tensor cores are quicker than what multiplies FP8 operands, on every one of these GPUs.

    By their peak rates: on GeForce and Ampere they are, on data-centre GPUs from Hopper on both run alike, and decoding
    to FP8 costs less. A GPU below 80, or none (0), prefers nothing.
    """
    if min(sms) < min(MACHINES):
        return False
    rates = [MACHINES[architecture(sm)].rates for sm in sms]
    return all(found["int8"] > found.get("fp8", found["fp16"]) for found in rates)


def scales_sums(spec: GemmSpec, step: int, sm: int) -> bool:
    """Whether packed_gemm multiplies the sum of each step by its group's multiplier, instead of each weight.

    It can where a step stays within a group. It does with FP8: that is a float32 multiply-add for each output, where
    multiplying weights takes the FP8 operand to FP16 and back; and it promotes the sum besides. In shorter steps than
    LEAST_SCALED_STEP the additions would outnumber what they save.
    """
    groups = spec.has_multipliers and not spec.real_groups and spec.group_size > 0
    return groups and step >= LEAST_SCALED_STEP and spec.group_size % step == 0 and product_type(spec, sm) == "fp8"


# --- the choice ------------------------------------------------------------------------------------------------------


@lru_cache(4096)
def packed_tile(spec: GemmSpec, rows: int, sm: int, *, may_split: bool = False) -> Tile:
    """The tile of packed_gemm for `rows` tokens (M) on compute capability `sm` (0: interpreted).

    may_split: whether the sum may be split among programs and added by a second kernel.
    """
    return _cheapest(spec, rows, sm, _packed_steps(spec, sm), may_split)[1]


@lru_cache(4096)
def expanded_tile(spec: GemmSpec, rows: int, sm: int, *, may_split: bool = False) -> Tile:
    """The tile of expanded_gemm, as packed_tile."""
    return _cheapest(spec, rows, sm, _expanded_steps(spec, sm), may_split)[1]


@lru_cache(4096)
def expands_first(spec: GemmSpec, rows: int, sm: int) -> bool:
    """Whether a packed weight is better expanded into memory of this call's own, which expanded_gemm then reads.

    A tile decodes its weights anew for every tile of tokens; with many tokens one pass over the weight is cheaper.
    """
    packed = _cheapest(spec, rows, sm, _packed_steps(spec, sm), may_split=True)[0]
    expanded = _cheapest(spec, rows, sm, _expanded_steps(spec, sm), may_split=True)[0]
    moved_bytes = 1.5 * spec.in_features * spec.out_features
    return expanded + moved_bytes / MACHINES[architecture(sm)].bytes_per_clock + KERNEL_CLOCKS < packed


def _packed_steps(spec: GemmSpec, sm: int) -> tuple[tuple[Tile, float], ...]:
    by_group = _steps(spec, sm, "by_group") if spec.group_size else ()
    grouped = spec.real_groups or any(scales_sums(spec, tile.k, sm) for tile, _ in by_group)
    return by_group if grouped else _steps(spec, sm, "plain")


def _expanded_steps(spec: GemmSpec, sm: int) -> tuple[tuple[Tile, float], ...]:
    return _steps(spec, sm, "by_group" if spec.real_groups else "bytes")


def _steps(spec: GemmSpec, sm: int, kind: Literal["plain", "by_group", "bytes"]) -> tuple[tuple[Tile, float], ...]:
    """The table's rows for this GPU, with steps no longer than groups and promotion of `spec` allow.

    A step that divides its group needs no masks; where sums are promoted, every step's sum is.
    """
    products, known = product_type(spec, sm), architecture(sm)
    unit = f"{INSTRUCTIONS.get(known, 'mma')}_{products}"
    every = promotion_of(spec, products == "fp8", known, by_group=kind == "by_group").every
    found = TABLE.get((unit, PROMOTED[kind]), TABLE[unit, kind]) if every else TABLE[unit, kind]
    longest = every or max(tile.k for tile, _ in found)
    if kind == "by_group":
        longest = min(longest, spec.group_size & -spec.group_size)
    wide = every > 0 and spec.output == "fp32"
    most = MOST_OUTPUTS if not spec.has_gate else MOST_WITH_WIDE_GATE if wide else MOST_WITH_GATE
    return tuple(
        (replace(tile, k=max(min(tile.k, longest), LEAST_STEP[products])), share)
        for tile, share in found
        if tile.m * tile.n <= most * 32 * tile.num_warps
    )


def _cheapest(
    spec: GemmSpec, rows: int, sm: int, candidates: tuple[tuple[Tile, float], ...], may_split: bool
) -> tuple[float, Tile]:
    """The tile of the fewest clocks, and those."""
    options = [
        (clocks(spec, rows, sm, split, share) * (1 if split.splits == 1 else SPLIT_MARGIN), split)
        for tile, share in candidates
        for split in (replace(tile, splits=splits) for splits in SPLITS)
        if split.splits == 1 or (may_split and _steps_of(spec, tile) >= LEAST_STEPS_OF_A_SPLIT * split.splits)
    ]
    return min(options, key=lambda option: option[0])


def _steps_of(spec: GemmSpec, tile: Tile) -> int:
    """Steps of K: each group of real scales starts a new one."""
    return spec.scale_groups * -(-spec.in_features // spec.scale_groups // tile.k)


def clocks(spec: GemmSpec, rows: int, sm: int, tile: Tile, share: float) -> float:
    """Estimated clocks: the multiprocessor with the most programs decides; splits are written, read and added.

    A model to rank tiles by, not a prediction of time: programs on one multiprocessor share its tensor cores, and all
    of them wait for the first loads of the last one.
    """
    machine = MACHINES[architecture(sm)]
    rate = machine.rates[product_type(spec, sm)] * share
    programs = -(-rows // tile.m) * -(-spec.out_features // tile.n) * tile.splits
    turns = -(-programs // machine.multiprocessors)
    work = -(-_steps_of(spec, tile) // tile.splits) * tile.m * tile.n * tile.k / rate
    reduction = 2 * 4 * rows * spec.out_features * tile.splits / machine.bytes_per_clock + KERNEL_CLOCKS
    return turns * work + FILL_CLOCKS + (reduction if tile.splits > 1 else 0)


def gemm_grid(spec: GemmSpec, tile: Tile, rows: int) -> tuple[int, int, int]:
    """Programs of packed_gemm and expanded_gemm."""
    return (-(-rows // tile.m) * -(-spec.out_features // tile.n), tile.splits, 1)


# --- the sum of splits -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReduceTile:
    """m, n: outputs of a program, which adds `splits` parts of each."""

    splits: int
    m: int = 16
    n: int = 128
    num_warps: int = 4
    num_stages: int = 3


def reduce_tile(spec: GemmSpec, rows: int, sm: int) -> ReduceTile:
    """The tile of reduce_splits after the packed_gemm that the heuristics choose."""
    return ReduceTile(packed_tile(spec, rows, sm, may_split=True).splits)


def reduce_grid(spec: GemmSpec, tile: ReduceTile, rows: int) -> tuple[int, int, int]:
    """Programs of reduce_splits."""
    return (-(-rows // tile.m) * -(-spec.out_features // tile.n), 1, 1)


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
