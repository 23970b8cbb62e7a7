"""GEMMs at the shapes of the models: ours with 4-bit weights against FP8 and bf16 of PyTorch (cuBLASLt, CUTLASS).

Ours multiply E4M3 bytes, or with "_int8" INT8 integers of the same codes. All read cold operands
(benchmarks/gpu/timing.py) and write bf16. The FP8 contestants get the very bytes that ours multiply, so the row-wise
one gives the same outputs up to its accumulation. Bias is left out of theirs. The row says how far each output is from
the exact one ("error"), and which of ours are further off than rounding explains ("wrong").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.gpu import agreement
from benchmarks.gpu.run import Device, Task, failed_of
from benchmarks.gpu.targets import LARGE
from benchmarks.gpu.timing import Flush, contest, rates, sets_for
from benchmarks.gpu.weights import CHANNEL, EXACT_64, REAL_128, Granularity, Packed, quantize_weight
from benchmarks.shapes import Shape, gemm_shapes
from plugins.gpu.spec import GemmSpec, QuantizeSpec
from plugins.gpu.tile_table import Tile
from plugins.gpu.tiles import expands_first

if TYPE_CHECKING:
    from torch import Tensor

ACTIVATION, WEIGHT = "E2M3", "E2M1"
INT8 = "_int8"
OURS = ("packed_gemm", "expanded_gemm", "packed_gemm_int8", "expanded_gemm_int8")
# The two ways of packed_gemm, which chooses between them: what the choice is to be tuned by.
WAYS = {"packed_in_registers": False, "packed_expanded_first": True}
FP8 = ("fp8_rowwise", "fp8_tensorwise")
SECONDS = 0.5  # of timing, for each row


@dataclass(frozen=True)
class Operands:
    """One set of inputs. a u8 [M, K], a_scale f32 [M]; w as packed; expanded u8 [N, K]; a_wide, w_wide bf16; bias.

    a_int8, expanded_int8: a and expanded for INT8 tensor cores.
    """

    a: Tensor
    a_int8: Tensor
    a_scale: Tensor
    packed: Packed
    expanded: Tensor
    expanded_int8: Tensor
    a_wide: Tensor
    w_wide: Tensor
    bias: Tensor


def spec_of(shape: Shape, granularity: Granularity, integers: bool = False) -> GemmSpec:
    """E2M3 x E2M1 to bf16 at `shape`."""
    fields = granularity.spec_fields(WEIGHT)
    return GemmSpec(ACTIVATION, WEIGHT, shape.k, shape.n, output="bf16", integers=integers, **fields)


def operands(device: Device, shape: Shape, granularity: Granularity) -> Operands:
    """Normal activations and weights, quantized. The bf16 contestant takes them as they were before."""
    import torch

    from plugins.gpu import launch

    a = torch.randn((shape.m, shape.k), device=device.type, dtype=torch.bfloat16)
    w = torch.randn((shape.n, shape.k), device=device.type, dtype=torch.bfloat16) / shape.k**0.5
    packed = quantize_weight(w, WEIGHT, granularity)
    forms = []
    for integers in (False, True):
        codes, scale = launch.quantize(QuantizeSpec(ACTIVATION, shape.k, input="bf16", integers=integers), a)
        spec = spec_of(shape, granularity, integers)
        forms.append((codes, launch.expand(spec, packed.codes, multiplier_codes=packed.multiplier_codes)))
    (codes, expanded), (a_int8, expanded_int8) = forms
    bias = torch.zeros(shape.n, device=device.type)
    return Operands(codes, a_int8, scale, packed, expanded, expanded_int8, a, w, bias)


def moved_bytes(shape: Shape, granularity: Granularity, contestant: str) -> int:
    """Bytes that a call must read and write once: operands, scales, bias and the bf16 output.

    >>> shape = Shape(2, 4, 8, 256, ())
    >>> moved_bytes(shape, CHANNEL, "bf16"), moved_bytes(shape, CHANNEL, "packed_gemm")
    (112, 88)
    """
    m, n, k = shape.m, shape.n, shape.k
    if contestant == "bf16":
        return 2 * (m * k + n * k + m * n)
    groups = k // granularity.group_size if granularity.group_size else 1
    scales = {"fp8_tensorwise": 8, "fp8_rowwise": 4 * (m + n)}
    ours = 4 * (m + n * (groups if granularity.real else 1)) + 4 * n
    packed = contestant.startswith("packed")
    multipliers = n * -(-groups // 2) if packed and groups > 1 and not granularity.real else 0
    weight = n * k // 2 if packed else n * k
    return m * k + weight + 2 * m * n + scales.get(contestant, ours + multipliers)


def least_read(shape: Shape, granularity: Granularity) -> int:
    """Bytes of inputs that the contestant of the smallest ones, packed_gemm, reads in a call."""
    return moved_bytes(shape, granularity, "packed_gemm") - 2 * shape.m * shape.n


def our_caller(name: str, spec: GemmSpec, inputs: Operands) -> Callable[[], Tensor]:
    """A call of one of our kernels on one set of inputs, `spec` being of the operands that it multiplies."""
    from plugins.gpu import launch

    a, rest = inputs.a_int8 if spec.integers else inputs.a, (inputs.packed.scales, inputs.bias)
    if name.startswith("expanded"):
        w = inputs.expanded_int8 if spec.integers else inputs.expanded
        return partial(launch.expanded_gemm, spec, a, inputs.a_scale, w, *rest)
    codes = inputs.packed.multiplier_codes
    packed = partial(launch.packed_gemm, spec, a, inputs.a_scale, inputs.packed.codes, *rest, multiplier_codes=codes)
    return partial(packed, expand_first=WAYS.get(name))


def caller(name: str, spec: GemmSpec, inputs: Operands) -> Callable[[], Tensor]:
    """A call of contestant `name` on one set of inputs."""
    import torch

    if is_ours(name):
        return our_caller(name, replace(spec, integers=name.endswith(INT8)), inputs)
    one = torch.ones((), device=inputs.a.device)
    a, w = (x.view(torch.float8_e4m3fn) for x in (inputs.a, inputs.expanded))
    unit = 2.0 ** -(spec.weight_exponent + spec.operand.shift)
    a_scale, w_scale = inputs.a_scale[:, None], (inputs.packed.scales[:, :1] * unit).t().contiguous()

    calls: dict[str, Callable[[], Tensor]] = {
        "fp8_rowwise": lambda: scaled_mm(a, w, a_scale, w_scale),
        "fp8_tensorwise": lambda: scaled_mm(a, w, one, one),
        "bf16": lambda: torch.mm(inputs.a_wide, inputs.w_wide.t()),
    }
    return calls[name]


def scaled_mm(a: Tensor, w: Tensor, a_scale: Tensor, w_scale: Tensor) -> Tensor:
    """torch's FP8 GEMM of a [M, K] and w [N, K] to bf16, its quick accumulation on."""
    import torch

    y: Tensor = torch._scaled_mm(a, w.t(), a_scale, w_scale, out_dtype=torch.bfloat16, use_fast_accum=True)
    return y


def contestants_of(device: Device, shape: Shape) -> tuple[str, ...]:
    """Who runs on this GPU at this shape. FP8 needs compute capability 89; the smaller shapes of HunyuanDiT do without
    the forms that only tell how to choose, since each is a kernel to compile."""
    ours = OURS[:2] if shape.m < LARGE and shape.users[0].startswith("hunyuan") else (*OURS, *WAYS)
    return (*ours, *(FP8 if device.has_fp8 else ()), "bf16")


def is_ours(name: str) -> bool:
    """Whether a contestant runs our kernels."""
    return name in OURS or name in WAYS


def measure(device: Device, shape: Shape, granularity: Granularity, flush: Flush) -> dict[str, Any]:
    """One row: times and rates of all contestants, and their ratios."""
    spec, names = spec_of(shape, granularity), contestants_of(device, shape)
    count = sets_for(least_read(shape, granularity), device.l2_bytes)
    sets = [operands(device, shape, granularity) for _ in range(count)]
    calls = {name: [caller(name, spec, inputs) for inputs in sets] for name in names}
    times, refused = contest(calls, flush, SECONDS)
    rows = {
        name: time.to_row() | rates(time.median, shape.flops, moved_bytes(shape, granularity, name))
        for name, time in times.items()
    }
    errors = errors_of({name: calls[name][0] for name in times}, spec, sets[0])
    wrong = wrong_of(errors, spec, device.sm)
    tiles = {name: str(_tile(name, spec, shape.m, device.sm)) for name in OURS}
    place = {"m": shape.m, "n": shape.n, "k": shape.k, "pixels": shape.pixels, "users": list(shape.users)}
    return {**place, "granularity": granularity.name, "contestants": rows, "refused": refused} | {
        "ratios": ratios(rows),
        "tiles": tiles,
        "expands_first": {
            name: expands_first(replace(spec, integers=name.endswith(INT8)), shape.m, device.sm)
            for name in OURS
            if name.startswith("packed")
        },
        "error": errors,
        "wrong": wrong,
        "passed": not wrong,
        "input_sets": count,
        **failed_of(refused, OURS),
    }


def _tile(name: str, spec: GemmSpec, m: int, sm: int) -> Tile:
    from plugins.gpu import launch

    choose = launch.HEURISTICS[name.removesuffix(INT8)]
    return choose(replace(spec, integers=name.endswith(INT8)), m, sm, may_split=True)


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """How many times as fast ours are as the quickest FP8 contestant ("fp8") and as bf16.

    >>> ratios({"packed_gemm": {"latency_ms": 2.0}, "fp8_rowwise": {"latency_ms": 1.5}, "bf16": {"latency_ms": 3.0}})
    {'packed_gemm': {'fp8': 0.75, 'bf16': 1.5}}
    """
    speedups: dict[str, dict[str, float]] = {}
    for name in (name for name in OURS if name in rows):
        own = rows[name]["latency_ms"]
        peers = {"fp8": [rows[peer]["latency_ms"] for peer in FP8 if peer in rows]}
        peers["bf16"] = [rows["bf16"]["latency_ms"]] if "bf16" in rows else []
        speedups[name] = {peer: min(times) / own for peer, times in peers.items() if times}
    return speedups


def errors_of(calls: dict[str, Callable[[], Tensor]], spec: GemmSpec, inputs: Operands) -> dict[str, float]:
    """Error of the output of each that computes the same as ours, as `agreement` has it."""
    same = [name for name in calls if is_ours(name) or (name == "fp8_rowwise" and not spec.real_groups)]
    exact = agreement.exact(spec, inputs.a, inputs.a_scale, inputs.packed)
    return {name: agreement.error(calls[name](), exact) for name in same}


def wrong_of(errors: dict[str, float], spec: GemmSpec, sm: int) -> dict[str, str]:
    """Which of ours are further off than rounding explains, and how far. NaN is."""
    limits = {name: agreement.limit(replace(spec, integers=name.endswith(INT8)), sm) for name in errors}
    ours = {name: (error, limits[name]) for name, error in errors.items() if is_ours(name)}
    return {name: f"error {error:.4f}, limit {most:.4f}" for name, (error, most) in ours.items() if not error <= most}


def rows_to_measure() -> list[tuple[Shape, Granularity]]:
    """Every shape per channel; the groups at PixArt's linears of 1024 pixels and at one of 256."""
    shapes = gemm_shapes()
    few = [s for s in shapes if (s.users[0].startswith("pixart") and s.m == 4096) or s.name == "256x4608x1152"]
    return [(s, CHANNEL) for s in shapes] + [(s, g) for g in (EXACT_64, REAL_128) for s in few]


def compile_ours(device: Device, shape: Shape, granularity: Granularity) -> dict[str, Any]:
    """Run each of our kernels once, so that they are in Triton's cache."""
    inputs = operands(device, shape, granularity)
    for name in filter(is_ours, contestants_of(device, shape)):
        caller(name, spec_of(shape, granularity), inputs)()
    return {}


def compiling(device: Device) -> list[Task]:
    """What `tasks` will compile."""
    return [Task(f"{row[0].name} {row[1].name}", partial(compile_ours, device, *row)) for row in rows_to_measure()]


def tasks(device: Device) -> list[Task]:
    """PixArt at 1024 pixels first, then its groups, then the rest."""
    flush = Flush(device.l2_bytes)
    rows = rows_to_measure()
    rows.sort(key=lambda row: row[1] != CHANNEL and row[0].m != 4096)
    return [
        Task(f"{shape.name} {granularity.name}", partial(measure, device, shape, granularity, flush), 4.0)
        for shape, granularity in rows
    ]
