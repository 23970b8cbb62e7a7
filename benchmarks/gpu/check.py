"""Is every kernel right? Compared with the NumPy meanings of the kernel table, before anything is timed.

A GEMM is run twice on the same codes, whose sums are exact in this GPU's accumulators whatever their order. First with
scales of one and a float32 output: the integer sums, which must be equal. Then whole, with scales, zero point, epilogue
and output type: off by one rounding to the output and those of the float32 steps before it, `allowed` below. Quantizers
must give the codes and scales of their meanings, but for values that a float32 norm or GELU moves over the middle
between two codes, `worst_code` in check_quantizers.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu.run import Device, Task
from benchmarks.gpu.weights import CHANNEL, EXACT_64, REAL_128, Granularity
from export.formats.format import get_format, pack
from export.formats.operands import exact_sum_limit
from plugins.gpu import reference
from plugins.gpu.promotion import FP32_BITS, accumulator_bits, promotion_of
from plugins.gpu.spec import Epilogue, FloatType, GemmSpec, PackSpec, operand_bytes
from plugins.gpu.table import kernel
from plugins.gpu.tile_table import Tile
from plugins.gpu.tiles import architecture, product_type

Array = NDArray[Any]
GEMMS = ("packed_gemm", "expanded_gemm")
EPS32 = 2.0**-24  # half a unit in the last place of a float32, relative
HALF_UNIT = {"fp32": EPS32, "fp16": 2.0**-11, "bf16": 2.0**-8}
SMALLEST = {"fp32": 0.0, "fp16": 2.0**-25, "bf16": 0.0}  # half of fp16's smallest step


@dataclass(frozen=True)
class GemmCase:
    """One GEMM to check: M x N x K and the spec's fields; real numbers of `Granularity` say how scales are shared."""

    activation: str
    weight: str
    m: int
    n: int
    k: int
    granularity: Granularity = CHANNEL
    zero_point: bool = False
    epilogue: Epilogue = "none"
    output: FloatType = "bf16"
    integers: bool = False

    @property
    def name(self) -> str:
        extra = (
            " as INT8" * self.integers
            + " zero point" * self.zero_point
            + f" {self.epilogue}" * (self.epilogue != "none")
        )
        return (
            f"{self.activation} x {self.weight} {self.m}x{self.n}x{self.k} {self.granularity.name}{extra} {self.output}"
        )

    @property
    def spec(self) -> GemmSpec:
        return GemmSpec(
            self.activation, self.weight, self.k, self.n, zero_point=self.zero_point, epilogue=self.epilogue,
            output=self.output, integers=self.integers, **self.granularity.spec_fields(self.weight),
        )  # fmt: skip


def gemm_cases(tiny: bool) -> list[GemmCase]:
    """The GEMMs, what the recipes use first. tiny: sizes for the interpreter."""
    m, n, k = (17, 24, 128) if tiny else (300, 1152, 1152)
    case = GemmCase("E2M3", "E2M1", m, n, k)
    real = Granularity("real groups of 64", 64, True) if tiny else REAL_128
    grouped = [replace(case, granularity=g) for g in (EXACT_64, real)]
    formats = [replace(case, activation=a) for a in ("E3M2", "E4M3", "INT8", "E3M4", "UE2M2")]
    weights = [replace(case, weight=w) for w in ("E1M2", "E3M0", "INT4")]
    gated = replace(case, m=2 * m, epilogue="gate_residual")
    zero_point = replace(case, activation="UE2M2", zero_point=True, output="fp16")
    ends = [gated, zero_point, replace(case, output="fp32")]
    odd = [replace(case, m=1, n=7, k=74), replace(case, m=33, n=130, k=66, granularity=Granularity("groups", 22))]
    integers = [replace(one, integers=True) for one in (case, *grouped, gated)]
    if tiny:
        return [case, *grouped, formats[2], weights[1], gated, zero_point, odd[0], integers[1]]
    deep = [replace(case, m=200, n=384, k=4608), replace(grouped[0], n=3456), replace(grouped[1], n=384, k=4608)]
    mixed = [GemmCase("E3M2", "E3M0", 130, 1408, 1408, EXACT_64, output="fp16"), replace(case, m=4096, n=384, k=1408)]
    return [case, *grouped, *integers, *ends, *deep, *formats, *weights, *odd, *mixed]


def codes_for(case: GemmCase, rng: np.random.Generator, sm: int) -> Array:
    """Operand bytes [M, K]: of all codes where every sum of K products is exact in float32, else of small values; and
    zeros but in a few places where compute capability `sm` adds them in an accumulator shorter than float32."""
    fmt, weight = get_format(case.activation), get_format(case.weight)
    values = fmt.values[: 2**fmt.bits]
    usable = np.isfinite(values) & (np.abs(values) <= fmt.max_value)
    most, largest = max(case.spec.multipliers) * weight.kmax, fmt.kmax
    if case.k > exact_sum_limit(fmt.kmax, most):
        # Multiples of a larger unit, so that the sums have fewer bits: still exact, whatever the order.
        unit = 2.0 ** np.floor(np.log2(fmt.max_value)) / 8
        usable &= (np.abs(values) <= fmt.max_value / 2) & (values / unit == np.rint(values / unit))
        largest = int(np.abs(values[usable]).max() / unit)
    codes = rng.choice(np.flatnonzero(usable), (case.m, case.k))
    span, places = places_of_a_sum(case.spec, largest * most, sm)
    if places < span:
        codes[~scattered(rng, case.m, case.k, span, places)] = 0
    codes[case.m // 2] = 0  # a token of zeros
    return operand_bytes(case.activation, case.integers)[codes]


def places_of_a_sum(spec: GemmSpec, product: int, sm: int) -> tuple[int, int]:
    """(products that a tensor core adds up, how many of them may differ from zero for that sum to be exact).

    One bit less than the accumulator is said to have; a single product is always exact: two significands of 4 bits.
    """
    fp8, known = product_type(spec, sm) == "fp8", architecture(sm)
    bits = accumulator_bits(fp8, known)
    if bits == FP32_BITS:
        return spec.in_features, spec.in_features
    span = spec.group_size if spec.real_groups else spec.in_features
    span = promotion_of(spec, fp8, known, by_group=spec.real_groups).every or span
    return span, max(1, 2 ** (bits - 1) // product)


def scattered(rng: np.random.Generator, rows: int, columns: int, span: int, places: int) -> NDArray[np.bool_]:
    """Bool [rows, columns], in every row `places` of each `span` columns true; of a last, shorter one at most."""
    draw = rng.random((rows, -(-columns // span), span))
    last = np.partition(draw, places - 1)[..., places - 1 : places]
    return np.asarray((draw <= last).reshape(rows, -1)[:, :columns])


def inputs_of(case: GemmCase, seed: int = 0, sm: int = 0) -> dict[str, Array]:
    """NumPy inputs of packed_gemm by argument name; gate and residual are float32 numbers of the output type."""
    rng, spec = np.random.default_rng(seed), case.spec
    table = len(spec.multipliers)
    arrays: dict[str, Array] = {
        "a": codes_for(case, rng, sm),
        "a_scale": rng.uniform(0.01, 0.1, case.m).astype(np.float32),
        "w": pack(rng.integers(0, 16, (case.n, case.k)).astype(np.uint8), 4),
        "w_scales": rng.uniform(0.001, 0.01, (case.n, spec.scale_groups)).astype(np.float32),
        "bias": rng.standard_normal(case.n).astype(np.float32),
    }
    arrays["a_scale"][: case.m > 1] = np.nan  # what the quantizers give a token with NaN or Inf
    if spec.has_multipliers:
        arrays["multiplier_codes"] = pack(rng.integers(0, table, (case.n, spec.groups)).astype(np.uint8), 4)
    if case.zero_point:
        arrays["a_zero"] = rng.uniform(-1, 0, case.m).astype(np.float32)
        arrays["w_sums"] = rng.standard_normal(case.n).astype(np.float32)
    if spec.has_gate:
        arrays["gate"] = _halves(rng.standard_normal((2, case.n)))
        arrays["residual"] = _halves(rng.standard_normal((case.m, case.n)))
    return arrays


def _halves(x: Array) -> Array:
    """Numbers that fp16 and bf16 both hold: 8 bits of significand."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.rint(mantissa * 256) / 256, exponent).astype(np.float32)


def check_gemm(device: Device, case: GemmCase) -> dict[str, Any]:
    """One row: for both kernels how many integer sums differ, and the worst error of an output over what is allowed."""
    arrays, tokens = inputs_of(case, sm=device.sm), case.m // 2 if case.spec.has_gate else 0
    plain = replace(case.spec, output="fp32", epilogue="none", zero_point=False)
    ones = {key: np.ones_like(arrays[key]) for key in ("a_scale", "w_scales")} | {"bias": np.zeros_like(arrays["bias"])}
    ones |= {key: arrays[key] for key in ("a", "w", "multiplier_codes") if key in arrays}
    packed = kernel("packed_gemm").reference
    (sums,), (expected,) = packed(plain, **ones), packed(case.spec, **arrays, tokens=tokens)
    limit = allowed(case, arrays, expected, tokens, cut=device.interpreted)
    row: dict[str, Any] = {"of": sums.size, "passed": True}
    for name in GEMMS:
        differ = int((run_gemm(device, plain, ones, name, 0) != sums).sum())
        y = run_gemm(device, case.spec, arrays, name, tokens)
        worst = over(y - expected, limit, np.isnan(expected) == np.isnan(y))
        row[name] = {"sums_differ": differ, "error_over_allowed": worst}
        row["passed"] = row["passed"] and differ == 0 and worst <= 1
    return row


def over(error: Array, limit: Array, same_nans: Array) -> float:
    """The largest error as a share of its limit; 1e9 where only one side is NaN (JSON has no Inf)."""
    if not same_nans.all():
        return 1e9
    share = np.abs(error) / np.maximum(limit, 1e-300)
    return float(np.nanmax(np.where(np.isnan(share), 0, share)))


def allowed(case: GemmCase, arrays: dict[str, Array], expected: Array, tokens: int, cut: bool) -> Array:
    """What a whole output [M, N] may be off by.

    Sums are exact. Each of the scale groups' products and additions, then two scales, zero point, bias, gate and
    residual, is a rounding to float32, in the kernel and in the meaning: 2 (groups + 8) of them, relative to the sum
    of what is added. Then one rounding to the output; `cut`: to bf16 the interpreter does not round to nearest but cuts
    off, a whole unit.
    """
    values = np.abs(reference.byte_values(case.activation, case.integers)[arrays["a"]])
    (w,) = reference.expand(case.spec, arrays["w"], arrays.get("multiplier_codes"))
    weights = (
        np.abs(reference.expanded_values(case.spec, w)).reshape(case.n, case.spec.scale_groups, -1)
        * arrays["w_scales"][..., None]
    )
    size = (values @ weights.reshape(case.n, -1).T) * arrays["a_scale"][:, None] + np.abs(arrays["bias"])
    if case.zero_point:
        size = size + np.abs(arrays["a_zero"][:, None] * arrays["w_sums"])
    error = 2 * (case.spec.scale_groups + 8) * EPS32 * size
    if case.spec.has_gate:
        gate = np.abs(np.repeat(arrays["gate"], tokens, axis=0))
        error = error * gate + 4 * EPS32 * (np.abs(arrays["residual"]) + gate * size)
    units = 2 if cut and case.output == "bf16" else 1
    return error + units * HALF_UNIT[case.output] * (np.abs(expected) + error) + SMALLEST[case.output]


def run_gemm(
    device: Device, spec: GemmSpec, arrays: dict[str, Array], name: str, tokens: int, tile: Tile | None = None
) -> Array:
    """The kernel `name` on NumPy inputs -> float32 [M, N]. tile: instead of the heuristics' choice."""
    from plugins.gpu import launch

    tensors = {key: device.tensor(value) for key, value in arrays.items()}
    for key in ("gate", "residual"):
        if key in tensors:
            tensors[key] = tensors[key].to(device.dtype(spec.output))
    if name == "expanded_gemm":
        codes = tensors.pop("multiplier_codes", None)
        tensors["w"] = launch.expand(spec, tensors["w"], multiplier_codes=codes)
        y = launch.expanded_gemm(spec, tokens=tokens, tile=tile, **tensors)
    else:
        y = launch.packed_gemm(spec, tokens=tokens, tile=tile, **tensors)
    return np.asarray(y.float().cpu().numpy())


def check_repack(device: Device, case: GemmCase) -> dict[str, Any]:
    """pack and expand: bytes that differ from the meanings'."""
    from plugins.gpu import launch

    arrays = inputs_of(case)
    codes = np.random.default_rng(1).integers(0, 16, (case.n, case.k)).astype(np.uint8)
    packed = launch.pack(device.tensor(codes)).cpu().numpy()
    weight = {key: device.tensor(arrays[key]) for key in ("w", "multiplier_codes") if key in arrays}
    expanded = launch.expand(case.spec, **weight).cpu().numpy()
    (expected,) = reference.expand(case.spec, arrays["w"], arrays.get("multiplier_codes"))
    differ = int((packed != reference.pack(PackSpec(case.k), codes)[0]).sum()), int((expanded != expected).sum())
    return {"pack_differ": differ[0], "expand_differ": differ[1], "passed": differ == (0, 0)}


def tasks(device: Device) -> list[Task]:
    """The GEMMs that are timed first, then quantizers, pack and expand, and GEMMs of all formats."""
    from benchmarks.gpu.check_quantizers import quantizer_tasks
    from benchmarks.gpu.check_timed import timed_tasks

    cases = gemm_cases(device.tiny)
    checks = timed_tasks(device) + quantizer_tasks(device)
    repacked = [case for case in cases if case.granularity in (CHANNEL, EXACT_64)]
    repacked = list({(case.weight, case.granularity, case.k, case.integers): case for case in repacked}.values())
    checks += [Task(f"pack, expand {case.name}", partial(check_repack, device, case)) for case in repacked]
    return checks + [Task(f"{' and '.join(GEMMS)} {case.name}", partial(check_gemm, device, case)) for case in cases]
