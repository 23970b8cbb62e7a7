"""Are sums of products of small formats exact in this GPU's FP8 tensor cores? Outputs that differ from integer sums.

Operands embed in E4M3 exactly; the question is how many bits the accumulator keeps. Published models of Hopper's say
about 13 below the largest addend. Each pair of formats is tried on random inputs and on inputs made to lose bits, with
the tensor core's sums added in float32 every so many products, and through expanded_gemm as it is compiled. The pair of
the default recipe is tried with multipliers of exact groups of 64 besides.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Generator, Tensor

from benchmarks.gpu.run import Device, Task
from benchmarks.record import Json
from benchmarks.shapes import CHANNEL, EXACT_64, Granularity
from export.formats.format import get_format
from plugins.gpu import launch
from plugins.gpu.promotion import promotion_of
from plugins.gpu.spec import GemmSpec, operand_of
from plugins.gpu.tiles import architecture

WEIGHT = "E2M1"
PAIRS = (("E2M3", CHANNEL), ("E2M3", EXACT_64), ("E3M2", CHANNEL), ("E4M3", CHANNEL))
DEPTHS = (1152, 4608)
SIZE, TILE, WARPS = 256, 128, 8  # outputs [SIZE, SIZE] in tiles; two sums of a tile fit 8 warps' registers
STEP = 32  # K of one FP8 tensor-core instruction
NEVER = 0
# Products that the tensor core sums up before a float32 addition.
INTERVALS = (NEVER, 512, 128, STEP)


@dataclass(frozen=True)
class Drawer:
    """Draws values: the positive ones of a format, as float64 on the device, ascending from zero."""

    values: Tensor
    generator: Generator

    def any(self, rows: int, k: int) -> Tensor:
        """Uniform over all codes, either sign."""
        return self.positive(rows, k) * self.signs(rows, k)

    def positive(self, rows: int, k: int, first: int = 0) -> Tensor:
        index = self._integers(rows, k, first, len(self.values))
        return self.values[index]

    def signs(self, rows: int, k: int) -> Tensor:
        return 1.0 - 2.0 * self._integers(rows, k, 0, 2)

    def _integers(self, rows: int, k: int, low: int, high: int) -> Tensor:
        return torch.randint(low, high, (rows, k), generator=self.generator, device=self.values.device)

    def normal(self, rows: int, k: int, outliers: int = 0) -> Tensor:
        """Normal numbers, `outliers` of their channels 15 times as large, rounded under a token's scale."""
        x = torch.randn((rows, k), generator=self.generator, device=self.values.device, dtype=torch.float64)
        x[:, :outliers] *= 15
        x = x / x.abs().amax(1, keepdim=True) * self.values[-1]
        middles = (self.values[1:] + self.values[:-1]) / 2
        return self.values[torch.bucketize(x.abs(), middles)] * x.sign()

    def large(self, rows: int, k: int) -> Tensor:
        """The upper half of the codes, positive."""
        return self.positive(rows, k, len(self.values) // 2)


def _large_then_small(draw: Drawer, rows: int, k: int) -> Tensor:
    """A large sum first, to which only the smallest products are added."""
    x = draw.large(rows, k)
    x[:, k // 2 :] = draw.values[1]
    return x


def _small_beside_large(draw: Drawer, rows: int, k: int) -> Tensor:
    """One large product in each instruction among the smallest."""
    x = draw.values[1] * draw.signs(rows, k)
    x[:, ::STEP] = draw.large(rows, x[:, ::STEP].shape[1])
    return x


def _cancelling(draw: Drawer, rows: int, k: int) -> Tensor:
    """Large sums that cancel, with small products between."""
    x = draw.large(rows, k)
    x[:, k // 2 :] = -x[:, : k - k // 2]
    x[:, 1::2] = draw.values[1]
    return x


# name -> activations [rows, k]; weights are drawn by the second, so that signs of products are as the name says.
PATTERNS: dict[str, tuple[Callable[[Drawer, int, int], Tensor], Callable[[Drawer, int, int], Tensor]]] = {
    "all codes": (Drawer.any, Drawer.any),
    "normal": (Drawer.normal, Drawer.normal),
    "normal with outliers": (lambda draw, rows, k: draw.normal(rows, k, 8), Drawer.normal),
    "one sign": (Drawer.positive, Drawer.positive),
    "large, then small": (_large_then_small, _large_then_small),
    "small beside large": (_small_beside_large, _large_then_small),
    "cancelling": (_cancelling, lambda draw, rows, k: _cancelling(draw, rows, k).abs()),
}


def spec_of(activation: str, k: int, granularity: Granularity, size: int) -> GemmSpec:
    """The GEMM whose sums are looked at, of `size` output channels and as many tokens."""
    return GemmSpec(activation, WEIGHT, k, size, output="fp32", **granularity.spec_fields(WEIGHT))


def operands(device: Device, spec: GemmSpec, pattern: str) -> tuple[Tensor, Tensor]:
    """(a [N, K], w [N, K]): values as float64 on the device, those of w times a drawn multiplier of their group."""
    k, size = spec.in_features, spec.out_features
    generator = torch.Generator(device=device.type).manual_seed(k)
    matrices = []
    for name, make in zip((spec.activation, WEIGHT), PATTERNS[pattern], strict=True):
        values = get_format(name).values
        positive = np.unique(values[np.isfinite(values) & (values >= 0)])
        matrices.append(make(Drawer(device.tensor(positive), generator), size, k))
    table = torch.tensor(spec.multipliers, dtype=torch.float64, device=device.type)
    drawn = torch.randint(len(table), (size, spec.groups), generator=generator, device=device.type)
    return matrices[0], matrices[1] * table[drawn].repeat_interleave(k // spec.groups, 1)


def e4m3_bytes(values: Tensor, exponent: int) -> Tensor:
    """E4M3 bytes u8 of values times 2^exponent."""
    return (values * 2.0**exponent).float().to(torch.float8_e4m3fn).view(torch.uint8)


def probe(a: Tensor, w: Tensor, interval: int, tile: int = TILE) -> Tensor:
    """Sums f32 [M, N] of E4M3 bytes a [M, K], w [N, K] as the tensor cores make them."""
    from benchmarks.gpu.kernels import fp8_sums  # triton decides when it is imported whether kernels are interpreted

    (m, k), n = a.shape, len(w)
    step = min(128, interval or 128)
    y = torch.full((m, n), torch.nan, device=a.device)
    options = {"num_warps": WARPS, "enable_fp_fusion": True}
    fp8_sums[(m // tile, n // tile)](a, w, y, m, n, k, PROMOTE=interval or 8192, BM=tile, BN=tile, BK=step, **options)
    return y


def compiled(spec: GemmSpec, a: Tensor, w: Tensor) -> Tensor:
    """The same through expanded_gemm, whose sums of values are made sums of bytes again, exactly: powers of two."""
    one, scales = torch.ones(len(a), device=a.device), torch.ones((len(w), 1), device=a.device)
    y = launch.expanded_gemm(spec, a, one, w, scales, torch.zeros_like(scales[:, 0]))
    return y * 2.0 ** (operand_of(spec.activation).shift + spec.byte_exponent)


def count(device: Device, spec: GemmSpec, granularity: Granularity, interval: int | None) -> Json:
    """Outputs that differ from the exact sum rounded to float32, for each pattern. interval None: as compiled."""
    differ, worst = {}, {}
    exponents = operand_of(spec.activation).shift, spec.byte_exponent
    for pattern in PATTERNS:
        a, w = (e4m3_bytes(x, e) for x, e in zip(operands(device, spec, pattern), exponents, strict=True))
        exact = a.view(torch.float8_e4m3fn).double() @ w.view(torch.float8_e4m3fn).double().T
        sums = compiled(spec, a, w) if interval is None else probe(a, w, interval, min(TILE, len(a)))
        differ[pattern] = int((sums != exact.float()).sum())
        worst[pattern] = float(((sums - exact).abs() / exact.abs().mean().clamp(min=1e-30)).max())
    pair = {"activation": spec.activation, "weight": WEIGHT, "k": spec.in_features, "granularity": granularity.name}
    return pair | {"interval": interval, "outputs": sums.numel(), "differ": differ, "worst_over_mean": worst}


def tasks(device: Device) -> list[Task]:
    """A row for each pair, depth and interval, those of the default recipe first."""
    if not device.has_fp8:
        row = {"skipped": f"compute capability {device.sm} has no FP8 tensor cores; sums are FP16's, exact in float32"}
        return [Task("FP8 accumulator", lambda: row)]
    counts = []
    for (activation, granularity), k in itertools.product(PAIRS, DEPTHS):
        spec = spec_of(activation, k, granularity, SIZE)
        for interval in intervals_of(spec, device.sm):
            name = f"{activation} x {WEIGHT}, {granularity.name}, K {k}, {interval_name(interval)}"
            counts.append(Task(name, partial(count, device, spec, granularity, interval)))
    return counts


def intervals_of(spec: GemmSpec, sm: int) -> tuple[int | None, ...]:
    """INTERVALS and the one that plugins/gpu/promotion.py chooses; last, as compiled."""
    chosen = promotion_of(spec, True, architecture(sm)).every
    return (*dict.fromkeys((*INTERVALS, chosen)), None)


def interval_name(interval: int | None) -> str:
    """What a row says of its promotion."""
    if interval is None:
        return "expanded_gemm as compiled"
    return f"promoted every {interval}" if interval else "never promoted"
