"""How the quantizers split their work: one program holds whole rows in registers, so memory is passed over once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from export.errors import ContractError
from plugins.gpu.rounding_tables import rounding_constants
from plugins.gpu.specs import QuantizeSpec

MAX_CHANNELS = 16384  # 16 warps of 32 threads with 32 elements each
MAX_WARPS = 16
# Elements of a row that a thread holds. Below it a row stays with fewer warps, whose sums need fewer exchanges through
# shared memory (none for one warp); above it the float32 copies of a row would no longer fit into 255 registers.
ELEMENTS_PER_THREAD = 48
NARROW = 256  # a warp of 32 threads reads 8 elements each; narrower rows share a program


@dataclass(frozen=True)
class RowTile:
    """rows: of a program. block + tail >= channels, powers of two (tail 0 where one block holds the row).

    Two blocks because a tensor's size is a power of two: 1152 = 1024 + 128 wastes nothing, one block of 2048 would
    keep 44 % of the lanes idle, and the kernel's arithmetic is close to what its memory traffic hides.
    """

    rows: int
    block: int
    tail: int
    num_warps: int
    num_stages: int = 1

    def __post_init__(self) -> None:
        for name, value in (("rows", self.rows), ("block", self.block), ("num_warps", self.num_warps)):
            if value < 1 or value & (value - 1):
                raise ContractError(f"{name} {value} of a tile must be a power of two")
        if self.tail and self.tail & (self.tail - 1):
            raise ContractError(f"tail {self.tail} of a tile must be 0 or a power of two")


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
        raise ContractError(f"{spec.channels} channels; registers hold a row of at most {MAX_CHANNELS}")
    block, tail = split(spec.channels)
    wide = block + tail
    warps = 1
    while wide > warps * 32 * ELEMENTS_PER_THREAD and warps < MAX_WARPS:
        warps *= 2
    together = 1
    while together * wide < NARROW and together < rows:
        together *= 2
    return RowTile(together, block, tail, warps)


def constants(spec: QuantizeSpec, tile: RowTile, sm: int) -> dict[str, Any]:
    """The constexpr arguments that all quantizers share."""
    return {
        "C": spec.channels,
        "ROWS": tile.rows,
        "BLOCK": tile.block,
        "TAIL": tile.tail,
        **rounding_constants(spec.format, sm),
    }


def norm_constants(spec: QuantizeSpec, tile: RowTile, sm: int) -> dict[str, Any]:
    """`constants` and the epsilon of the norm."""
    return {**constants(spec, tile, sm), "EPSILON": spec.epsilon}


def grid(spec: QuantizeSpec, tile: RowTile, rows: int) -> tuple[int, int, int]:
    """Programs for `rows` rows."""
    return (-(-rows // tile.rows), 1, 1)
