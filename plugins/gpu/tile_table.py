"""Tiles to choose from, and what is known of GPUs: the numbers behind plugins/gpu/tiles.py.

The rows were chosen by reading machine code (compiled, not run): registers without spills, instructions in flight, and
`share`, the part of the tensor core's rate that the loop's other instructions leave possible.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Products = Literal["fp16", "fp8", "int8"]  # what the tensor cores multiply


@dataclass(frozen=True)
class Machine:
    """A GPU's multiprocessors, multiply-adds of one of them in a clock (dense), bytes of memory in a clock of all.

    rates: by what is multiplied, where the GPU multiplies it, floats with float32 sums. Of the largest common GPU of
    each architecture: for the ratio of work and waiting, and of operand types.
    """

    multiprocessors: int
    rates: dict[Products, int]
    bytes_per_clock: int


# A100, RTX 3090, RTX 4090, H100, B200, RTX 5090. Rates are NVIDIA's peak numbers (architecture whitepapers) divided by
# multiprocessors and boost clock. GeForce halves what sums floats in float32: an RTX 4090 (2.52 GHz) has 165 FP16, 330
# FP8 and 661 INT8 TOP/s, an RTX 5090 (2.41 GHz) 210, 419 and 838. Professional cards of the same generations (L40S, RTX
# PRO: 504 dense BF16 TFLOP/s of 188 at 2.62 GHz) do not; there FP16 and FP8 have twice the rate below, INT8 the same.
MACHINES = {
    80: Machine(108, {"fp16": 1024, "int8": 2048}, 1100),
    86: Machine(82, {"fp16": 256, "int8": 1024}, 550),
    89: Machine(128, {"fp16": 256, "fp8": 512, "int8": 1024}, 400),
    90: Machine(132, {"fp16": 2048, "fp8": 4096, "int8": 4096}, 1900),
    100: Machine(148, {"fp16": 4096, "fp8": 8192, "int8": 8192}, 4300),
    120: Machine(170, {"fp16": 256, "fp8": 512, "int8": 1024}, 740),
}


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


# --- the table -------------------------------------------------------------------------------------------------------

# plain: packed weights, one accumulator. by_group: the sum of each step is scaled, in registers of its own. bytes:
# expanded weights. promoted, promoted_bytes: the sum of each step is added in registers of its own (where a unit has no
# such rows, those of plain and bytes serve).
Kind = Literal["plain", "by_group", "bytes", "promoted", "promoted_bytes"]


def _rows(*rows: tuple[int, int, int, int, int, bool, float]) -> tuple[tuple[Tile, float], ...]:
    """(m, n, k, warps, stages, weights_first, share) -> (tile, share)."""
    return tuple((Tile(*row[:5], weights_first=row[5]), row[6]) for row in rows)


# (instruction and what it multiplies, kind) -> (tile, share), ...
TABLE: dict[tuple[str, Kind], tuple[tuple[Tile, float], ...]] = {
    ("wgmma_fp8", "plain"): _rows(
        (128, 128, 128, 8, 4, True, 0.8),
        (64, 128, 128, 8, 4, True, 0.5),
        (32, 128, 128, 4, 4, True, 0.3),
        (16, 128, 128, 4, 4, True, 0.15),
    ),
    ("wgmma_fp8", "by_group"): _rows(
        (128, 64, 64, 4, 4, True, 0.5),
        (64, 128, 64, 4, 4, True, 0.4),
        (32, 128, 64, 4, 4, True, 0.25),
        (16, 128, 64, 4, 4, True, 0.12),
    ),
    ("wgmma_fp8", "bytes"): _rows(
        (128, 256, 128, 8, 3, False, 0.9),
        (128, 128, 128, 8, 3, False, 0.85),
        (64, 128, 128, 4, 4, False, 0.7),
        (16, 128, 128, 4, 4, True, 0.2),
    ),
    ("wgmma_fp8", "promoted"): _rows(
        (128, 64, 128, 4, 4, True, 0.6),
        (64, 128, 128, 4, 4, True, 0.4),
        (64, 64, 128, 4, 4, True, 0.35),
        (16, 128, 128, 4, 4, True, 0.15),
    ),
    ("wgmma_fp8", "promoted_bytes"): _rows(
        (64, 128, 128, 4, 3, False, 0.75),
        (64, 64, 128, 4, 4, False, 0.5),
        (16, 128, 128, 4, 4, True, 0.2),
    ),
    ("mma_fp8", "plain"): _rows(
        (128, 128, 128, 8, 3, False, 0.8),
        (64, 128, 128, 4, 3, False, 0.75),
        (32, 64, 128, 4, 3, False, 0.5),
        (16, 128, 128, 4, 4, False, 0.4),
    ),
    ("mma_fp8", "by_group"): _rows(
        (128, 128, 64, 8, 3, False, 0.6),
        (64, 128, 64, 4, 3, False, 0.6),
        (32, 64, 64, 4, 3, False, 0.4),
        (16, 128, 64, 4, 4, False, 0.3),
    ),
    ("mma_fp8", "bytes"): _rows(
        (128, 128, 64, 8, 4, False, 0.9),
        (64, 128, 128, 4, 3, False, 0.8),
        (16, 128, 128, 4, 4, False, 0.5),
    ),
    ("tcgen05_fp8", "plain"): _rows(
        (128, 128, 128, 8, 3, False, 0.7),
        (64, 128, 128, 4, 3, False, 0.5),
        (16, 128, 128, 4, 4, True, 0.15),
    ),
    ("tcgen05_fp8", "by_group"): _rows(
        (64, 128, 64, 4, 3, False, 0.3),
        (16, 128, 64, 4, 4, True, 0.1),
    ),
    ("tcgen05_fp8", "bytes"): _rows(
        (128, 128, 128, 8, 4, False, 0.8),
        (64, 128, 128, 4, 4, False, 0.6),
        (16, 128, 128, 4, 4, True, 0.2),
    ),
    ("mma_fp16", "plain"): _rows(
        (128, 128, 64, 8, 3, False, 0.5),
        (64, 128, 64, 4, 3, True, 0.45),
        (16, 128, 64, 4, 4, True, 0.3),
    ),
    ("mma_fp16", "by_group"): _rows(
        (128, 128, 32, 8, 3, True, 0.4),
        (64, 64, 32, 4, 4, True, 0.4),
        (16, 128, 32, 4, 4, True, 0.25),
    ),
    ("mma_fp16", "bytes"): _rows(
        (128, 128, 64, 8, 3, False, 0.55),
        (64, 128, 64, 8, 3, False, 0.5),
        (16, 128, 64, 4, 4, True, 0.35),
    ),
    ("wgmma_fp16", "plain"): _rows(
        (128, 128, 64, 8, 3, True, 0.5),
        (64, 128, 64, 4, 3, True, 0.45),
        (16, 128, 64, 4, 4, True, 0.2),
    ),
    ("wgmma_fp16", "by_group"): _rows(
        (128, 64, 64, 4, 3, True, 0.4),
        (64, 64, 64, 4, 3, True, 0.35),
        (16, 128, 64, 4, 4, True, 0.15),
    ),
    ("wgmma_fp16", "bytes"): _rows(
        (128, 128, 64, 8, 3, False, 0.5),
        (64, 128, 64, 4, 3, False, 0.45),
        (16, 128, 64, 4, 4, True, 0.2),
    ),
    ("tcgen05_fp16", "plain"): _rows(
        (128, 128, 64, 8, 3, False, 0.5),
        (64, 128, 64, 4, 3, False, 0.4),
    ),
    ("tcgen05_fp16", "by_group"): _rows((64, 64, 64, 4, 3, False, 0.3)),
    ("tcgen05_fp16", "bytes"): _rows(
        (128, 128, 64, 8, 3, False, 0.5),
        (64, 128, 64, 4, 3, False, 0.4),
    ),
    ("mma_int8", "plain"): _rows(
        (128, 128, 128, 8, 3, False, 0.6),
        (64, 128, 128, 4, 3, False, 0.5),
        (32, 64, 128, 4, 3, False, 0.35),
        (16, 128, 128, 4, 4, False, 0.3),
    ),
    ("mma_int8", "by_group"): _rows(
        (128, 128, 64, 8, 3, False, 0.5),
        (64, 128, 64, 4, 3, False, 0.45),
        (16, 128, 64, 4, 4, False, 0.25),
    ),
    ("mma_int8", "bytes"): _rows(
        (128, 128, 64, 8, 4, False, 0.9),
        (64, 128, 128, 4, 3, False, 0.8),
        (16, 128, 128, 4, 4, False, 0.5),
    ),
    ("wgmma_int8", "plain"): _rows(
        (128, 128, 128, 8, 4, True, 0.4),
        (64, 128, 128, 8, 4, True, 0.25),
        (16, 128, 128, 4, 4, True, 0.12),
    ),
    ("wgmma_int8", "by_group"): _rows(
        (128, 64, 64, 4, 4, True, 0.3),
        (64, 128, 64, 4, 4, True, 0.2),
        (16, 128, 64, 4, 4, True, 0.1),
    ),
    ("wgmma_int8", "bytes"): _rows(
        (128, 256, 128, 8, 3, False, 0.9),
        (128, 128, 128, 8, 3, False, 0.85),
        (64, 128, 128, 4, 4, False, 0.7),
        (16, 128, 128, 4, 4, True, 0.2),
    ),
    ("tcgen05_int8", "plain"): _rows(
        (128, 128, 128, 8, 3, False, 0.25),
        (64, 128, 128, 4, 3, False, 0.15),
        (16, 128, 128, 4, 4, True, 0.1),
    ),
    ("tcgen05_int8", "by_group"): _rows(
        (64, 128, 64, 4, 3, False, 0.2),
        (16, 128, 64, 4, 4, True, 0.1),
    ),
    ("tcgen05_int8", "bytes"): _rows(
        (128, 128, 128, 8, 4, False, 0.8),
        (64, 128, 128, 4, 4, False, 0.6),
        (16, 128, 128, 4, 4, True, 0.2),
    ),
}
INSTRUCTIONS = {90: "wgmma", 100: "tcgen05"}  # elsewhere mma
PROMOTED: dict[str, Kind] = {"plain": "promoted", "bytes": "promoted_bytes", "by_group": "by_group"}
