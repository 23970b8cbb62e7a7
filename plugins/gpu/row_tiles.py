"""How the quantizers split their work: a program holds a row in registers, so memory is passed over once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from export.errors import ContractError
from plugins.gpu.rounding_tables import rounding_constants
from plugins.gpu.specs import QuantizeSpec

MAX_WARPS = 16
# Elements of a row that a thread holds. Fewer would spread a row of 1152 over several warps, whose sums then meet in
# shared memory behind barriers (one warp needs shuffles only); more would not leave room for a row, its shift and its
# scale in float32 below 255 registers, and fewer rows would be in flight.
ELEMENTS_PER_THREAD = 48
MAX_CHANNELS = MAX_WARPS * 32 * ELEMENTS_PER_THREAD * 2 // 3  # 16384


@dataclass(frozen=True)
class RowTile:
    """block + tail >= channels, powers of two (tail 0 where one block holds the row).

    Two blocks because a tensor's size is a power of two: 1152 = 1024 + 128 wastes nothing, one block of 2048 would
    keep 44 % of the lanes idle, and the kernel's arithmetic is close to what its memory traffic hides.
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
    while block + tail > warps * 32 * ELEMENTS_PER_THREAD:
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
        **rounding_constants(spec.format, sm),
    }


def norm_constants(spec: QuantizeSpec, tile: RowTile, sm: int) -> dict[str, Any]:
    """`constants` and the epsilon of the norm."""
    return {**constants(spec, tile, sm), "EPSILON": spec.epsilon}


def grid(spec: QuantizeSpec, tile: RowTile, rows: int) -> tuple[int, int, int]:
    """Programs for `rows` rows: one each."""
    return (rows, 1, 1)
