"""Which tile a kernel runs in and its compile-time arguments: pure functions of spec, number of tokens and GPU.

Nothing here changes a result beyond the order of a sum; every choice is legal for every shape. The tiles of GEMMs to
choose from are in plugins/gpu/tile_table.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Literal, NamedTuple

from export.dialect.reference import ABSMAX_FLOOR
from export.errors import ContractError, RecipeError
from export.formats.format import get_format
from export.formats.operands import FLOAT_TYPES, FP32_BITS
from plugins.gpu.promotion import promotion_of
from plugins.gpu.spec import E4M3, HELD_TILES, INT8, GemmSpec, PackSpec, QuantizeSpec, operand_of
from plugins.gpu.tile_table import INSTRUCTIONS, MACHINES, PROMOTED, TABLE, Products, Tile

Constants = dict[str, object]  # compile-time arguments by name
PACKED, EXPANDED = "packed_gemm", "expanded_gemm"  # kernels of the table
# Where tensor cores multiply FP8; below, and for operands that are no E4M3 bytes, FP16.
FIRST_FP8 = 89
INTERPRETED = 0
WARP = 32  # threads
LEAST_SCALED_STEP = 64
LEAST_STEP: dict[Products, int] = {"fp8": 32, "int8": 32, "fp16": 16}  # products of one instruction
SPLITS = (1, 2, 3, 4, 6, 8)
LEAST_STEPS_OF_A_SPLIT = 4
# Outputs of a thread. An epilogue that reads tiles (a gate and a residual) holds up to three, which must fit into
# registers together, and with promotion two sums besides, of which float32 tiles leave less room.
MOST_OUTPUTS, MOST_WITH_TILES, MOST_WITH_WIDE_TILES = 255, 64, 32
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
    """What the tensor cores multiply: both operands' INT8 bytes, their E4M3 bytes, or all decoded to FP16."""
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
    return all(rate["int8"] > rate.get("fp8", rate["fp16"]) for rate in rates)


def scales_sums(spec: GemmSpec, step: int, sm: int) -> bool:
    """Whether packed_gemm multiplies the sum of each step by its group's multiplier, instead of each weight.

    It can where a step stays within a group. It does with FP8: that is a float32 multiply-add for each output, where
    multiplying weights takes the FP8 operand to FP16 and back; and it promotes the sum besides. In shorter steps than
    LEAST_SCALED_STEP the additions would outnumber what they save.
    """
    has_groups = spec.has_multipliers and not spec.real_groups and spec.group_size > 0
    return has_groups and step >= LEAST_SCALED_STEP and spec.group_size % step == 0 and product_type(spec, sm) == "fp8"


# --- the choice ------------------------------------------------------------------------------------------------------


@lru_cache(4096)
def gemm_tile(kernel: str, spec: GemmSpec, rows: int, sm: int, *, may_split: bool = False) -> Tile:
    """The tile of `kernel`, "packed_gemm" or "expanded_gemm", for `rows` tokens (M) on compute capability `sm` (0:
    interpreted).

    may_split: whether the sum may be split among programs and added by a second kernel.
    """
    return _cheapest(kernel, spec, rows, sm, may_split)[1]


@lru_cache(4096)
def expands_first(spec: GemmSpec, rows: int, sm: int) -> bool:
    """Whether a packed weight is better expanded into memory of this call's own, which expanded_gemm then reads.

    A tile decodes its weights anew for every tile of tokens; with many tokens one pass over the weight is cheaper.
    """
    packed, expanded = (_cheapest(kernel, spec, rows, sm, may_split=True)[0] for kernel in (PACKED, EXPANDED))
    moved_bytes = 1.5 * spec.in_features * spec.out_features
    return expanded + moved_bytes / MACHINES[architecture(sm)].bytes_per_clock + KERNEL_CLOCKS < packed


def _candidates(kernel: str, spec: GemmSpec, sm: int) -> tuple[tuple[Tile, float], ...]:
    if kernel == EXPANDED:
        return _steps(spec, sm, "by_group" if spec.real_groups else "bytes")
    by_group = _steps(spec, sm, "by_group") if spec.group_size else ()
    grouped = spec.real_groups or any(scales_sums(spec, tile.k, sm) for tile, _ in by_group)
    return by_group if grouped else _steps(spec, sm, "plain")


def _steps(spec: GemmSpec, sm: int, kind: Literal["plain", "by_group", "bytes"]) -> tuple[tuple[Tile, float], ...]:
    """The table's rows for this GPU, with steps no longer than groups and promotion of `spec` allow.

    A step that divides its group needs no masks; where sums are promoted, every step's sum is.
    """
    products, known = product_type(spec, sm), architecture(sm)
    unit = f"{INSTRUCTIONS.get(known, 'mma')}_{products}"
    every = promotion_of(spec, products == "fp8", known, by_group=kind == "by_group").every
    rows = TABLE.get((unit, PROMOTED[kind]), TABLE[unit, kind]) if every else TABLE[unit, kind]
    longest = every or max(tile.k for tile, _ in rows)
    if kind == "by_group":
        longest = min(longest, spec.group_size & -spec.group_size)
    wide = every > 0 and spec.output == "fp32"
    most = MOST_OUTPUTS if not HELD_TILES[spec.epilogue] else MOST_WITH_WIDE_TILES if wide else MOST_WITH_TILES
    return tuple(
        (replace(tile, k=max(min(tile.k, longest), LEAST_STEP[products])), share)
        for tile, share in rows
        if tile.m * tile.n <= most * WARP * tile.num_warps
    )


def _cheapest(kernel: str, spec: GemmSpec, rows: int, sm: int, may_split: bool) -> tuple[float, Tile]:
    """The tile of the fewest clocks, and those."""
    options = [
        (clocks(spec, rows, sm, split, share) * (1 if split.splits == 1 else SPLIT_MARGIN), split)
        for tile, share in _candidates(kernel, spec, sm)
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
    return ReduceTile(gemm_tile(PACKED, spec, rows, sm, may_split=True).splits)


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


# --- constants of the GEMMs, pack and expand -------------------------------------------------------------------------


class GemmShape(NamedTuple):
    """GROUP: input channels that share a multiplier, or with REAL_GROUPS a real scale."""

    N: int
    K: int
    GROUP: int
    REAL_GROUPS: bool


class GemmOperands(NamedTuple):
    """What tensor cores multiply, and how it comes from memory.

    TYPE: of both operands, "fp16", "fp8" or "int8". WIDTH: those that are loaded and decoded in one word. A_KIND,
    A_SHIFT: of decode.operand_tile. FACTOR: what multiplies the sum of a group: its real "scale"; its "multiplier",
    where a tile lies in one group; or "none". PROMOTE: products of a partial sum, 0 for all. UNIT: of the whole sum.
    Of packed weights: MULTIPLIED: whether they are as they are decoded; MULTIPLIERS_LOW, MULTIPLIERS_HIGH: 16 factors,
    a byte each; W_SIGNED, W_INTEGER, W_SHIFT: of decode.nibbles_to_e4m3.
    """

    TYPE: Products
    WIDTH: int
    A_KIND: str = "signed"
    A_SHIFT: int = 0
    FACTOR: str = "none"
    PROMOTE: int = 0
    UNIT: float = 1.0
    MULTIPLIED: bool = False
    MULTIPLIERS_LOW: int = 0
    MULTIPLIERS_HIGH: int = 0
    W_SIGNED: bool = False
    W_INTEGER: bool = False
    W_SHIFT: int = 0


class GemmTile(NamedTuple):
    """As tile_table.Tile."""

    BM: int
    BN: int
    BK: int
    SPLITS: int
    BAND: int
    WEIGHTS_FIRST: bool


def packed_table(multipliers: tuple[int, ...]) -> tuple[int, int]:
    """Up to 16 multipliers as the bytes of two 64-bit numbers, the first in the lowest byte."""
    whole = int.from_bytes(bytes(multipliers).ljust(16, b"\0"), "little")
    return whole % 2**64, whole // 2**64


def activation_constants(spec: GemmSpec, products: str) -> tuple[str, int, int]:
    """(KIND, SHIFT, e) of `decode.operand_tile`: an operand stands for value * 2^e. Raises RecipeError."""
    operand, fmt = spec.operand, spec.activation_format
    if operand.kind == INT8:
        return "int8", 0, operand.shift
    if operand.kind == E4M3:
        return "signed", 7, operand.shift - (8 if products == "fp16" else 0)
    if fmt.exponent_bits == 5 and fmt.specials == "none":
        raise RecipeError(f"activations in {fmt.name}: its top binade has the bits of FP16's Inf; use another format")
    return "signed" if fmt.sign_bits else "unsigned", 10 - fmt.mantissa_bits, fmt.bias - 15


def load_width(spec: GemmSpec) -> int:
    """Operands that are loaded and decoded in one word: 4 where rows and groups allow it, else 2."""
    return 4 if spec.in_features % 4 == 0 and spec.group_size % 4 == 0 else 2


def gemm_constants(spec: GemmSpec, tile: Tile, sm: int) -> Constants:
    """The compile-time arguments of expanded_gemm."""
    return _gemm_constants(spec, tile, gemm_operands(spec, tile, sm))


def packed_constants(spec: GemmSpec, tile: Tile, sm: int) -> Constants:
    """The compile-time arguments of packed_gemm."""
    by_group = scales_sums(spec, tile.k, sm)
    operands = gemm_operands(spec, tile, sm, by_group=by_group)
    return _gemm_constants(spec, tile, decoding(operands, spec, multiplied=not by_group))


def _gemm_constants(spec: GemmSpec, tile: Tile, operands: GemmOperands) -> Constants:
    of_tile = GemmTile(tile.m, tile.n, tile.k, tile.splits, tile.band, tile.weights_first)
    return {"SHAPE": gemm_shape(spec), "OPERANDS": operands, "TILE": of_tile, "EPILOGUE": spec.epilogue}


def gemm_shape(spec: GemmSpec) -> GemmShape:
    """What GEMM, reduction and expansion know of their sizes."""
    return GemmShape(spec.out_features, spec.in_features, spec.group_size or spec.in_features, spec.real_groups)


def gemm_operands(spec: GemmSpec, tile: Tile, sm: int, *, by_group: bool = False) -> GemmOperands:
    """Operands of expanded weights. by_group: a multiplier follows each sum."""
    products = product_type(spec, sm)
    promotion = promotion_of(spec, products == "fp8", architecture(sm), by_group=by_group or spec.real_groups)
    kind, shift, exponent = activation_constants(spec, products)
    return GemmOperands(
        TYPE=products,
        WIDTH=load_width(spec),
        A_KIND=kind,
        A_SHIFT=shift,
        FACTOR="multiplier" if by_group else "scale" if spec.real_groups else "none",
        PROMOTE=min(promotion.every, tile.k),
        UNIT=2.0 ** -(exponent + spec.byte_exponent - (8 if products == "fp16" else 0)),
    )


def decoding(operands: GemmOperands, spec: GemmSpec, *, multiplied: bool) -> GemmOperands:
    """`operands` with what says how packed weights are decoded. multiplied: as they are, if they have factors."""
    fmt = spec.weight_format
    low, high = packed_table(spec.multipliers) if spec.has_multipliers else (0, 0)
    return operands._replace(
        MULTIPLIED=multiplied and spec.has_multipliers,
        MULTIPLIERS_LOW=low,
        MULTIPLIERS_HIGH=high,
        W_SIGNED=bool(fmt.sign_bits),
        W_INTEGER=fmt.is_integer,
        W_SHIFT=3 - fmt.mantissa_bits,
    )


def reduce_constants(spec: GemmSpec, tile: ReduceTile, sm: int) -> Constants:
    """The compile-time arguments of reduce_splits."""
    return {
        "SHAPE": gemm_shape(spec),
        "SPLITS": tile.splits,
        "BM": tile.m,
        "BN": tile.n,
        "EPILOGUE": spec.epilogue,
    }


def pack_constants(spec: PackSpec, tile: BandTile, sm: int) -> Constants:
    """The compile-time arguments of pack."""
    return {"K": spec.in_features, "ROWS": tile.rows, "COLUMNS": tile.columns}


def expand_constants(spec: GemmSpec, tile: BandTile, sm: int) -> Constants:
    """The compile-time arguments of expand."""
    kind: Products = "int8" if spec.multiplies_integers else "fp8"
    operands = decoding(GemmOperands(kind, load_width(spec)), spec, multiplied=True)
    return {"SHAPE": gemm_shape(spec), "OPERANDS": operands, "ROWS": tile.rows, "COLUMNS": tile.columns}


# --- quantizers ------------------------------------------------------------------------------------------------------

# A program holds a row in registers, so memory is passed over once. What a tile is chosen by, for an H100 (3.35 TB/s,
# 132 multiprocessors that issue 128 instructions of a lane in a clock of 1.7 GHz), compiled, not run:
# - A number moves 3 bytes (fp16 in, a code out), so memory leaves about 26 instructions for it. The norm's machine code
#   has 23 for each and some 200 for a row, 6 for each of a thread's 36: balanced, hence 16-byte loads, no idle lanes
#   (`row_blocks`), and nothing that goes through shared memory in a row of one warp.
# - Memory answers after some 600 ns, so a multiprocessor needs 15 KB on their way. 90 registers a thread leave room for
#   21 rows of 1152 numbers, 48 KB.
# - Few rows: more warps for each, until 16 work on every multiprocessor; below 8 numbers a thread loads would shrink.
MAX_WARPS = 16
# Numbers of a row that a thread holds. More than the largest would not leave room for a row, its shift and its scale in
# float32 below 255 registers, and fewer rows would be in flight; fewer than the least load less than 16 bytes at once.
MOST_A_THREAD, LEAST_A_THREAD = 48, 8
BUSY_WARPS = 132 * 16
MAX_CHANNELS = 16384  # 32 a thread of 16 warps


@dataclass(frozen=True)
class RowTile:
    """block + tail >= channels, powers of two (tail 0 where one block holds the row).

    Two blocks because a tensor's size is a power of two: 1152 = 1024 + 128 wastes nothing, one block of 2048 would
    keep 44 % of the lanes idle.
    """

    block: int
    tail: int
    num_warps: int
    num_stages: int = 1

    def __post_init__(self) -> None:
        for name, value in (("block", self.block), ("num_warps", self.num_warps), ("tail", self.tail or 1)):
            if value < 1 or value & (value - 1):
                raise ContractError(f"{name} {value} of a tile must be a power of two (tail: or 0)")


def row_blocks(channels: int) -> tuple[int, int]:
    """(block, tail) of a row: the two powers of two with the fewest idle lanes.

    >>> [row_blocks(channels) for channels in (1152, 1408, 1024, 2047, 1)]
    [(1024, 128), (1024, 512), (1024, 0), (2048, 0), (1, 0)]
    """
    block = 1 << (channels.bit_length() - 1)
    rest = channels - block
    tail = 1 << (rest - 1).bit_length() if rest else 0
    return (2 * block, 0) if tail == block else (block, tail)


def row_tile(spec: QuantizeSpec, rows: int, sm: int) -> RowTile:
    """The tile for `rows` rows of `spec` on compute capability `sm` (0: interpreted). Raises ContractError."""
    if spec.channels > MAX_CHANNELS:
        raise ContractError(f"{spec.channels} channels; a program's registers hold a row of at most {MAX_CHANNELS}")
    block, tail = row_blocks(spec.channels)
    warps = 1
    while block + tail > warps * WARP * MOST_A_THREAD:
        warps *= 2
    while block >= 2 * warps * WARP * LEAST_A_THREAD and 2 * warps <= MAX_WARPS and rows * warps < BUSY_WARPS:
        warps *= 2
    return RowTile(block, tail, warps)


def quantize_constants(spec: QuantizeSpec, tile: RowTile, sm: int) -> Constants:
    """The constexpr arguments that all quantizers share. Raises ContractError for a tile narrower than a row."""
    if tile.block + tile.tail < spec.channels:
        raise ContractError(f"a tile of {tile.block} + {tile.tail} columns is narrower than {spec.channels} channels")
    return {"ROW": Row(spec.channels, tile.block, tile.tail), "GRID": rounding_grid(spec.format, sm, spec.integers)}


def norm_constants(spec: QuantizeSpec, tile: RowTile, sm: int) -> Constants:
    """`quantize_constants` and the epsilon of the norm."""
    return {**quantize_constants(spec, tile, sm), "EPSILON": spec.epsilon}


def row_grid(spec: QuantizeSpec, tile: RowTile, rows: int) -> tuple[int, int, int]:
    """Programs for `rows` rows: one each."""
    return (rows, 1, 1)


FP32_MANTISSA_BITS, FP32_MIN_EXPONENT = FP32_BITS - 1, FLOAT_TYPES["FP32"][1]
HAS_E4M3_CONVERSION = 89  # first compute capability with cvt.e4m3x2 (PTX ISA, cvt)


class Row(NamedTuple):
    """C channels, as a block and a tail."""

    C: int
    BLOCK: int
    TAIL: int


class Grid(NamedTuple):
    """A number format as the quantizers round to it, and its operand byte.

    MAX_VALUE and ABSMAX_FLOOR: of the scale. SIGNED. The grid: ANCHOR = 1.5 * 2^(23 - mantissa bits) and LOWEST, the
    start of the lowest binade; for integers 1.5 * 2^23 and 0. KIND of byte: "int8", "bits" or "e4m3" (converted by the
    hardware). UP: the power of two that takes a value to the byte's number. MOVE, SIGN: where the byte lies in the
    float32.
    """

    MAX_VALUE: float
    ABSMAX_FLOOR: float
    SIGNED: bool
    ANCHOR: float
    LOWEST: float
    KIND: str
    UP: float
    MOVE: int = 0
    SIGN: int = 0


def rounding_grid(name: str, sm: int, integers: bool = False) -> Grid:
    """The grid of format `name` on compute capability `sm`."""
    fmt, operand = get_format(name), operand_of(name, integers)
    signed = bool(fmt.sign_bits)
    anchor = 1.5 * 2.0 ** (FP32_MANTISSA_BITS - fmt.mantissa_bits * (not fmt.is_integer))
    lowest = 0.0 if fmt.is_integer else 2.0**fmt.min_exponent
    grid = partial(Grid, fmt.max_value, ABSMAX_FLOOR, signed, anchor, lowest)
    if operand.kind == INT8:
        return grid("int8", 2.0**operand.shift)
    if operand.kind == E4M3 and sm >= HAS_E4M3_CONVERSION:
        return grid("e4m3", 2.0**operand.shift)
    byte = get_format(operand.kind)
    up = 2.0 ** (operand.shift + FP32_MIN_EXPONENT - byte.min_exponent)
    sign = byte.exponent_bits + byte.mantissa_bits if signed else 0
    return grid("bits", up, FP32_MANTISSA_BITS - byte.mantissa_bits, sign)
