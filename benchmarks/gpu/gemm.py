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

import torch
from torch import Tensor

from benchmarks.gpu.run import Device, Task, failed_of
from benchmarks.gpu.targets import LARGE
from benchmarks.gpu.timing import Call, contest, flusher, rates, sets_for
from benchmarks.gpu.weights import Packed, dequantized, quantize_weight, relative_error
from benchmarks.record import Json
from benchmarks.shapes import CHANNEL, EXACT_64, REAL_128, Granularity, Shape, gemm_shapes
from plugins.gpu import launch
from plugins.gpu.promotion import accumulator_bits, promotion_of
from plugins.gpu.spec import GemmSpec, QuantizeSpec, operand_of
from plugins.gpu.tiles import architecture, expands_first, gemm_tile, product_type


@dataclass(frozen=True)
class Form:
    """A contestant of ours: a kernel of the table, its operands FP8 or INT8, and which way packed_gemm is to go."""

    kernel: str
    integers: bool = False
    expand_first: bool | None = None


ACTIVATION, WEIGHT = "E2M3", "E2M1"
OURS = {
    "packed_gemm": Form("packed_gemm"),
    "expanded_gemm": Form("expanded_gemm"),
    "packed_gemm_int8": Form("packed_gemm", integers=True),
    "expanded_gemm_int8": Form("expanded_gemm", integers=True),
}
# The two ways of packed_gemm, which chooses between them: what the choice is to be tuned by.
WAYS = {
    "packed_in_registers": Form("packed_gemm", expand_first=False),
    "packed_expanded_first": Form("packed_gemm", expand_first=True),
}
FORMS = OURS | WAYS
FP8 = ("fp8_rowwise", "fp8_tensorwise")
SECONDS = 0.5  # of timing, for each row
INSTRUCTION = 32  # products that one step of an FP8 tensor core adds to its running sum
HALF_UNIT_BF16 = 2.0**-8


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
    packed = contestant in FORMS and FORMS[contestant].kernel == "packed_gemm"
    multipliers = n * -(-groups // 2) if packed and groups > 1 and not granularity.real else 0
    weight = n * k // 2 if packed else n * k
    return m * k + weight + 2 * m * n + scales.get(contestant, ours + multipliers)


def least_read(shape: Shape, granularity: Granularity) -> int:
    """Bytes of inputs that the contestant of the smallest ones, packed_gemm, reads in a call."""
    return moved_bytes(shape, granularity, "packed_gemm") - 2 * shape.m * shape.n


def our_caller(form: Form, spec: GemmSpec, inputs: Operands) -> Callable[[], Tensor]:
    """A call of one of our kernels on one set of inputs."""
    spec, packed = replace(spec, integers=form.integers), inputs.packed
    a = inputs.a_int8 if form.integers else inputs.a
    named = {"a_scale": inputs.a_scale, "w_scales": packed.scales, "bias": inputs.bias}
    if form.kernel == "expanded_gemm":
        w = inputs.expanded_int8 if form.integers else inputs.expanded
        return partial(launch.expanded_gemm, spec, a=a, w=w, **named)
    codes = {"w": packed.codes, "multiplier_codes": packed.multiplier_codes}
    return partial(launch.packed_gemm, spec, a=a, **codes, **named, expand_first=form.expand_first)


def caller(name: str, spec: GemmSpec, inputs: Operands) -> Callable[[], Tensor]:
    """A call of contestant `name` on one set of inputs."""
    if name in FORMS:
        return our_caller(FORMS[name], spec, inputs)
    one = torch.ones((), device=inputs.a.device)
    a, w = (x.view(torch.float8_e4m3fn) for x in (inputs.a, inputs.expanded))
    unit = 2.0 ** -(spec.byte_exponent + spec.operand.shift)
    a_scale, w_scale = inputs.a_scale[:, None], (inputs.packed.scales[:, :1] * unit).t().contiguous()

    calls: dict[str, Callable[[], Tensor]] = {
        "fp8_rowwise": lambda: scaled_mm(a, w, a_scale, w_scale),
        "fp8_tensorwise": lambda: scaled_mm(a, w, one, one),
        "bf16": lambda: torch.mm(inputs.a_wide, inputs.w_wide.t()),
    }
    return calls[name]


def scaled_mm(a: Tensor, w: Tensor, a_scale: Tensor, w_scale: Tensor) -> Tensor:
    """torch's FP8 GEMM of a [M, K] and w [N, K] to bf16, its quick accumulation on."""
    y: Tensor = torch._scaled_mm(a, w.t(), a_scale, w_scale, out_dtype=torch.bfloat16, use_fast_accum=True)
    return y


def contestants_of(device: Device, shape: Shape) -> tuple[str, ...]:
    """Who runs on this GPU at this shape. FP8 needs compute capability 89; the smaller shapes of HunyuanDiT do without
    the forms that only tell how to choose, since each is a kernel to compile."""
    few = shape.m < LARGE and shape.users[0].startswith("hunyuan")
    ours = [name for name, form in FORMS.items() if not few or form == Form(form.kernel)]
    return (*ours, *(FP8 if device.has_fp8 else ()), "bf16")


def forms_of(device: Device, shape: Shape) -> dict[str, Form]:
    """Ours among the contestants."""
    return {name: FORMS[name] for name in contestants_of(device, shape) if name in FORMS}


def measure(device: Device, shape: Shape, granularity: Granularity, flush: Call) -> Json:
    """One row: times and rates of all contestants, and their ratios."""
    spec, names = spec_of(shape, granularity), contestants_of(device, shape)
    count = sets_for(least_read(shape, granularity), device.l2_bytes)
    sets = [operands(device, shape, granularity) for _ in range(count)]
    calls = {name: [caller(name, spec, inputs) for inputs in sets] for name in names}
    rows, refused = contest(
        calls, flush, SECONDS, lambda name, ms: rates(ms, shape.flops, moved_bytes(shape, granularity, name))
    )
    errors = errors_of({name: calls[name][0] for name in rows}, spec, sets[0])
    wrong = wrong_of(errors, spec, device.sm)
    specs = {name: replace(spec, integers=form.integers) for name, form in OURS.items()}
    return {
        "m": shape.m,
        "n": shape.n,
        "k": shape.k,
        "pixels": shape.pixels,
        "users": list(shape.users),
        "granularity": granularity.name,
        "contestants": rows,
        "refused": refused,
        "ratios": ratios(rows),
        "tiles": {
            name: str(gemm_tile(OURS[name].kernel, specs[name], shape.m, device.sm, may_split=True)) for name in OURS
        },
        "expands_first": {
            name: expands_first(specs[name], shape.m, device.sm)
            for name, form in OURS.items()
            if form.kernel == "packed_gemm"
        },
        "error": errors,
        "wrong": wrong,
        "passed": not wrong,
        "input_sets": count,
        **failed_of(refused, OURS),
    }


def ratios(rows: Json) -> dict[str, dict[str, float]]:
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
    """How far the output of each that computes the same as ours is from the exact one, as a share of its norm."""
    same = [name for name in calls if name in FORMS or (name == "fp8_rowwise" and not spec.real_groups)]
    # What codes and scales stand for, multiplied in float64; without bias, which is zero.
    values = inputs.a.view(torch.float8_e4m3fn).double() * 2.0 ** -operand_of(spec.activation).shift
    exact = (values * inputs.a_scale[:, None].double()) @ dequantized(inputs.packed).double().t()
    return {name: relative_error(calls[name](), exact) for name in same}


def wrong_of(errors: dict[str, float], spec: GemmSpec, sm: int) -> dict[str, str]:
    """Which of ours are further off than rounding explains, and how far. NaN is."""
    limits = {name: limit(replace(spec, integers=FORMS[name].integers), sm) for name in errors if name in FORMS}
    return {
        name: f"error {errors[name]:.4f}, limit {most:.4f}" for name, most in limits.items() if not errors[name] <= most
    }


def limit(spec: GemmSpec, sm: int) -> float:
    """What the error of a right kernel with a bf16 output stays below.

    Rounding to bf16 moves each output by at most half a unit, 2^-8 of it (under the interpreter, which cuts off, by a
    whole one), hence the norm by no more. Besides, an accumulator of b bits may round the running sum by 2^(1-b) of it
    in every step (plugins/gpu/promotion.py); products are independent here, so the running sums' norm is at most the
    whole sums'. Integer sums are exact. A tile left out shows: it moves the norm by the root of its share.
    """
    rounding = (2 if sm == 0 else 1) * HALF_UNIT_BF16
    span, bits = accumulated(spec, sm)
    return rounding if spec.multiplies_integers else rounding + span / INSTRUCTION * 2.0 ** (1 - bits)


def accumulated(spec: GemmSpec, sm: int) -> tuple[int, int]:
    """(products that a tensor core adds up before a float32 addition, bits that its accumulator is said to have)."""
    fp8, known = product_type(spec, sm) == "fp8", architecture(sm)
    whole = spec.group_size if spec.real_groups else spec.in_features
    return promotion_of(spec, fp8, known, by_group=spec.real_groups).every or whole, accumulator_bits(fp8, known)


def rows_to_measure() -> list[tuple[Shape, Granularity]]:
    """Every shape per channel; the groups at PixArt's linears of 1024 pixels and at one of 256."""
    shapes = gemm_shapes()
    few = [s for s in shapes if (s.users[0].startswith("pixart") and s.m == 4096) or s.name == "256x4608x1152"]
    return [(s, CHANNEL) for s in shapes] + [(s, g) for g in (EXACT_64, REAL_128) for s in few]


def compile_ours(device: Device, shape: Shape, granularity: Granularity) -> Json:
    """Run each of our kernels once, so that they are in Triton's cache."""
    spec, inputs = spec_of(shape, granularity), operands(device, shape, granularity)
    for form in forms_of(device, shape).values():
        our_caller(form, spec, inputs)()
    return {}


def compiling(device: Device) -> list[Task]:
    """What `tasks` will compile."""
    return [Task(f"{row[0].name} {row[1].name}", partial(compile_ours, device, *row)) for row in rows_to_measure()]


def tasks(device: Device) -> list[Task]:
    """PixArt at 1024 pixels first, then its groups, then the rest."""
    flush = flusher(device.l2_bytes)
    rows = rows_to_measure()
    rows.sort(key=lambda row: row[1] != CHANNEL and row[0].m != 4096)
    return [
        Task(f"{shape.name} {granularity.name}", partial(measure, device, shape, granularity, flush), 4.0)
        for shape, granularity in rows
    ]
