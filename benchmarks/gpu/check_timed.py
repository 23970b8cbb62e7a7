"""Is every GEMM right in the tile it is timed in? Each variant that a section of the benchmark launches, once.

The tiles are chosen as for the shapes to be timed; a case takes N and K of the first such shape and just enough tokens
for a second row of tiles. So the machine code that is checked is the one that is timed, and need not be compiled again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from benchmarks.gpu.check import GemmCase, allowed, inputs_of, over, run_gemm
from benchmarks.gpu.gemm import ACTIVATION, INT8, WAYS, WEIGHT, contestants_of, is_ours, rows_to_measure
from benchmarks.gpu.run import Device, Task
from benchmarks.gpu.weights import EXACT_64
from plugins.gpu import tiles
from plugins.gpu.table import kernel
from plugins.gpu.tile_table import Tile

LEAST_ROWS, MORE_ROWS = 64, 32  # multiples of 16 even when halved (two gates): Triton compiles for such alike


@dataclass(frozen=True)
class TimedGemm:
    """A launch of `kernel`. case.m is the number of tokens it is timed at."""

    kernel: str
    case: GemmCase
    tile: Tile

    @property
    def variant(self) -> tuple[Any, ...]:
        """What distinguishes its code from that of others, sizes apart."""
        case, span = self.case, self.case.spec.in_features // self.case.spec.scale_groups
        return self.kernel, case.granularity, case.integers, case.epilogue, self.tile, span % self.tile.k == 0

    @property
    def small(self) -> GemmCase:
        """The case with as few tokens as two rows of tiles need."""
        return replace(self.case, m=max(LEAST_ROWS, self.tile.m + MORE_ROWS))

    @property
    def name(self) -> str:
        tile = f"{self.tile.m}x{self.tile.n}x{self.tile.k}, {self.tile.splits} splits"
        return f"{self.kernel} in tiles of {tile}: {self.small.name}"


def launched(name: str, case: GemmCase, sm: int, expand_first: bool | None = None) -> TimedGemm:
    """The GEMM that launch.packed_gemm or launch.expanded_gemm runs for `case` on compute capability `sm`."""
    if name == "packed_gemm":
        first = tiles.expands_first(case.spec, case.m, sm) if expand_first is None else expand_first
        name = "expanded_gemm" if first else name
    choose = {"packed_gemm": tiles.packed_tile, "expanded_gemm": tiles.expanded_tile}[name]
    return TimedGemm(name, case, choose(case.spec, case.m, sm, may_split=True))


def of_gemm_section(device: Device) -> Iterator[TimedGemm]:
    """What benchmarks/gpu/gemm.py launches."""
    for shape, granularity in rows_to_measure():
        case = GemmCase(ACTIVATION, WEIGHT, shape.m, shape.n, shape.k, granularity)
        for name in filter(is_ours, contestants_of(device, shape)):
            kind = "packed_gemm" if name in WAYS else name.removesuffix(INT8)
            yield launched(kind, replace(case, integers=name.endswith(INT8)), device.sm, WAYS.get(name))


def of_denoiser_section(device: Device) -> Iterator[TimedGemm]:
    """What benchmarks/gpu/denoiser_times.py launches."""
    from benchmarks.gpu.denoiser import LINEARS, Size
    from benchmarks.gpu.denoiser_times import FORMS, SIZES, grid

    size = Size()
    for pixels, batch in SIZES:
        for linear_name, linear in LINEARS.items():
            rows = size.caption if linear_name == "cross_kv" else grid(size, pixels) ** 2
            n, k = linear.outputs * size.width, linear.inputs * size.width
            case = GemmCase(ACTIVATION, WEIGHT, batch * rows, n, k, EXACT_64, epilogue=linear.epilogue)
            for form in FORMS.values():
                kind = "expanded_gemm" if form.expand else "packed_gemm"
                yield launched(kind, replace(case, integers=form.integers), device.sm)


def timed_gemms(device: Device) -> list[TimedGemm]:
    """One for each variant, the first that is timed."""
    by_variant: dict[tuple[Any, ...], TimedGemm] = {}
    for one in (*of_gemm_section(device), *of_denoiser_section(device)):
        by_variant.setdefault(one.variant, one)
    return list(by_variant.values())


def check_timed(device: Device, timed: TimedGemm) -> dict[str, Any]:
    """One row: the worst error of an output over what is allowed."""
    case = timed.small
    arrays, tokens = inputs_of(case, sm=device.sm), case.m // 2 if case.spec.has_gate else 0
    (expected,) = kernel("packed_gemm").reference(case.spec, **arrays, tokens=tokens)
    y = run_gemm(device, case.spec, arrays, timed.kernel, tokens, timed.tile)
    limit = allowed(case, arrays, expected, tokens, cut=device.interpreted)
    worst = over(y - expected, limit, np.isnan(expected) == np.isnan(y))
    return {"tile": str(timed.tile), "error_over_allowed": worst, "of": expected.size, "passed": worst <= 1}


def timed_tasks(device: Device) -> list[Task]:
    """One task for each variant; none under the interpreter, which times nothing."""
    if device.interpreted:
        return []
    return [Task(one.name, partial(check_timed, device, one)) for one in timed_gemms(device)]
