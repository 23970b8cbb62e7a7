"""The fused quantizers against the same operation without quantizing, and against copying as many bytes.

The operation alone is a Triton kernel of the same form (benchmarks/gpu/kernels.py) and what torch.compile makes of it,
both to bf16; the quicker one is the baseline. The copy moves the bytes that the fused kernel must.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.run import Device, Task, failed_of
from benchmarks.gpu.timing import Call, contest, flusher, rates, sets_for
from benchmarks.gpu.weights import relative_error
from benchmarks.record import Json
from plugins.gpu import launch
from plugins.gpu.spec import QuantizeSpec
from plugins.gpu.table import launch_options
from plugins.gpu.tiles import row_tile

FORMAT, EPSILON = "E2M3", 1e-6
FUSED, ALONE = "fused", ("triton_alone", "compiled_alone")
SECONDS = 0.5


@dataclass(frozen=True)
class FusedCase:
    """x [M, C] bf16, M = batch * tokens."""

    kind: Literal["norm_modulate", "gelu"]
    batch: int
    tokens: int
    channels: int

    @property
    def m(self) -> int:
        return self.batch * self.tokens

    @property
    def name(self) -> str:
        return f"{self.kind}_quantize {self.m}x{self.channels}"

    @property
    def spec(self) -> QuantizeSpec:
        return QuantizeSpec(FORMAT, self.channels, self.kind, "bf16", EPSILON)

    def moved_bytes(self, quantized: bool) -> int:
        """Read once and written once: x, shift and scale, and codes with their scales or a bf16 output.

        >>> FusedCase("norm_modulate", 1, 4, 8).moved_bytes(True), FusedCase("gelu", 1, 4, 8).moved_bytes(False)
        (144, 128)
        """
        written = self.m * self.channels + 4 * self.m if quantized else 2 * self.m * self.channels
        return self.read_bytes + written

    @property
    def read_bytes(self) -> int:
        """x, shift and scale."""
        return 2 * self.m * self.channels + (4 * self.batch * self.channels if self.kind == "norm_modulate" else 0)


CASES = (
    FusedCase("norm_modulate", 1, 4096, 1152),
    FusedCase("norm_modulate", 2, 4096, 1152),
    FusedCase("gelu", 1, 4096, 4608),
    FusedCase("norm_modulate", 1, 4096, 1408),
    FusedCase("norm_modulate", 1, 1024, 1152),
    FusedCase("norm_modulate", 1, 256, 1152),
    FusedCase("gelu", 2, 4096, 4608),
    FusedCase("gelu", 1, 1024, 4608),
    FusedCase("gelu", 1, 256, 4608),
    FusedCase("gelu", 1, 4096, 6144),
)


def inputs_of(device: Device, case: FusedCase) -> dict[str, Tensor]:
    """x, and for the norm shift and scale, in bf16."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device.type).to(torch.bfloat16)

    inputs = {"x": draw(case.m, case.channels)}
    if case.kind == "norm_modulate":
        inputs |= {"shift": draw(case.batch, case.channels), "scale": draw(case.batch, case.channels)}
    return inputs


def fused(case: FusedCase, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Operand bytes u8 [M, C] and scales f32 [M]."""
    tokens = case.tokens if case.kind == "norm_modulate" else 0
    codes, scales = launch.quantize(case.spec, **inputs, tokens=tokens)
    return codes, scales


def triton_alone(case: FusedCase, inputs: dict[str, Tensor], sm: int) -> Tensor:
    """bf16 [M, C] by a Triton kernel in the same tile as the quantizer's."""
    from benchmarks.gpu import kernels  # triton decides when it is imported whether kernels are interpreted

    tile, y = row_tile(case.spec, case.m, sm), torch.empty_like(inputs["x"])
    blocks = {"C": case.channels, "BLOCK": tile.block, "TAIL": tile.tail, **launch_options(tile)}
    if case.kind == "gelu":
        kernels.gelu[(case.m,)](inputs["x"], y, **blocks)
    else:
        kernel = kernels.norm_modulate[(case.m,)]
        kernel(inputs["x"], inputs["shift"], inputs["scale"], case.tokens, y, EPSILON=EPSILON, **blocks)
    return y


def plain(case: FusedCase, inputs: dict[str, Tensor]) -> Tensor:
    """bf16 [M, C] in plain torch: what torch.compile is given, and what the Triton kernel is checked with."""
    x = inputs["x"]
    if case.kind == "gelu":
        return functional.gelu(x, approximate="tanh")
    normal = functional.layer_norm(x.view(case.batch, case.tokens, case.channels), (case.channels,), eps=EPSILON)
    return (normal * (1 + inputs["scale"][:, None]) + inputs["shift"][:, None]).view(case.m, case.channels)


def copier(device: Device, size_bytes: int) -> Callable[[], Tensor]:
    """A copy that reads and writes `size_bytes` together."""
    one, two = (torch.empty(size_bytes // 2, dtype=torch.uint8, device=device.type) for _ in range(2))
    return lambda: two.copy_(one)


def measure(device: Device, case: FusedCase, flush: Call) -> Json:
    """One row: times and rates of all contestants, the fused kernel against the baseline and against copying."""
    torch._dynamo.reset()  # it keeps eight shapes
    compiled = torch.compile(lambda inputs: plain(case, inputs), dynamic=False, fullgraph=True)
    size = case.moved_bytes(True)
    count = sets_for(min(case.read_bytes, size // 2), device.l2_bytes)  # the copy reads half of what it moves
    sets = [inputs_of(device, case) for _ in range(count)]
    calls: dict[str, list[Call]] = {
        FUSED: [partial(fused, case, inputs) for inputs in sets],
        "triton_alone": [partial(triton_alone, case, inputs, device.sm) for inputs in sets],
        "compiled_alone": [partial(compiled, inputs) for inputs in sets],
        "copy": [copier(device, size) for _ in sets],
    }
    moved = dict.fromkeys(calls, case.moved_bytes(False)) | {FUSED: size, "copy": size // 2 * 2}
    rows, refused = contest(calls, flush, SECONDS, lambda name, ms: rates(ms, 0, moved[name]))
    return {
        "kind": case.kind,
        "m": case.m,
        "channels": case.channels,
        "contestants": rows,
        "refused": refused,
        "ratios": ratios(rows),
        "alone_differs": relative_error(triton_alone(case, sets[0], device.sm), plain(case, sets[0])),
        "input_sets": count,
        **failed_of(refused, (FUSED,)),
    }


def ratios(rows: Json) -> dict[str, float]:
    """ "over_alone": time over the quicker of ALONE; "of_copy": bandwidth over that of the copy.

    >>> row = lambda ms, rate: {"latency_ms": ms, "gb_per_s": rate}
    >>> ratios({"fused": row(3.0, 80.0), "triton_alone": row(2.0, 1.0), "copy": row(1.0, 100.0)})
    {'over_alone': 1.5, 'of_copy': 0.8}
    """
    quotients = {}
    alone = [rows[name]["latency_ms"] for name in ALONE if name in rows]
    if FUSED in rows and alone:
        quotients["over_alone"] = rows[FUSED]["latency_ms"] / min(alone)
    if FUSED in rows and "copy" in rows:
        quotients["of_copy"] = rows[FUSED]["gb_per_s"] / rows["copy"]["gb_per_s"]
    return quotients


def tasks(device: Device) -> list[Task]:
    """A row for each of CASES."""
    flush = flusher(device.l2_bytes)
    return [Task(case.name, partial(measure, device, case, flush), 6.0) for case in CASES]
