"""How the quantizers split their work: a program holds a row in registers, so memory is passed over once.

A tile changes no result beyond the order of a norm's two sums. What it is chosen by, for an H100 (3.35 TB/s, 132
multiprocessors that issue 128 instructions of a lane in a clock of 1.7 GHz), compiled, not run:
- A number moves 3 bytes (fp16 in, a code out), so memory leaves about 26 instructions for it. The norm's machine code
  has 23 for each and some 200 for a row, 6 for each of a thread's 36: balanced, hence 16-byte loads, no idle lanes
  (`split`), and nothing that goes through shared memory in a row of one warp.
- Memory answers after some 600 ns, so a multiprocessor needs 15 KB on their way. 90 registers a thread leave room for
  21 rows of 1152 numbers, 48 KB.
- Few rows: more warps for each, until 16 work on every multiprocessor; below 8 numbers a thread loads would shrink.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from export.errors import ContractError
from plugins.gpu.rounding_tables import rounding_constants
from plugins.gpu.spec import QuantizeSpec

MAX_WARPS = 16
WARP = 32
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


def split(channels: int) -> tuple[int, int]:
    """(block, tail) of a row: the two powers of two with the fewest idle lanes.

    >>> split(1152), split(1408), split(1024), split(2047), split(1)
    ((1024, 128), (1024, 512), (1024, 0), (2048, 0), (1, 0))
    """
    block = 1 << (channels.bit_length() - 1)
    rest = channels - block
    tail = 1 << (rest - 1).bit_length() if rest else 0
    return (2 * block, 0) if tail == block else (block, tail)


def row_tile(spec: QuantizeSpec, rows: int, sm: int) -> RowTile:
    """The tile for `rows` rows of `spec` on compute capability `sm` (0: interpreted). Raises ContractError."""
    if spec.channels > MAX_CHANNELS:
        raise ContractError(f"{spec.channels} channels; a program's registers hold a row of at most {MAX_CHANNELS}")
    block, tail = split(spec.channels)
    warps = 1
    while block + tail > warps * WARP * MOST_A_THREAD:
        warps *= 2
    while block >= 2 * warps * WARP * LEAST_A_THREAD and 2 * warps <= MAX_WARPS and rows * warps < BUSY_WARPS:
        warps *= 2
    return RowTile(block, tail, warps)


def constants(spec: QuantizeSpec, tile: RowTile, sm: int) -> dict[str, Any]:
    """The constexpr arguments that all quantizers share. Raises ContractError for a tile narrower than a row."""
    if tile.block + tile.tail < spec.channels:
        raise ContractError(f"a tile of {tile.block} + {tile.tail} columns is narrower than {spec.channels} channels")
    return {
        "C": spec.channels,
        "BLOCK": tile.block,
        "TAIL": tile.tail,
        **rounding_constants(spec.format, sm, spec.integers),
    }


def norm_constants(spec: QuantizeSpec, tile: RowTile, sm: int) -> dict[str, Any]:
    """`constants` and the epsilon of the norm."""
    return {**constants(spec, tile, sm), "EPSILON": spec.epsilon}


def grid(spec: QuantizeSpec, tile: RowTile, rows: int) -> tuple[int, int, int]:
    """Programs for `rows` rows: one each."""
    return (rows, 1, 1)
