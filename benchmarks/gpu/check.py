"""Is every kernel right? Compared with the NumPy references of the kernel table, before anything is timed.

A GEMM is run twice on the same codes, whose sums are exact in this GPU's accumulators whatever their order. First with
scales of one and a float32 output: the integer sums, which must be equal. Then whole, with scales, zero point, epilogue
and output type: off by one rounding to the output and those of the float32 steps before it, `allowed` below. Quantizers
must give the codes and scales of their references, but for values that a float32 norm or GELU moves over the middle
between two codes, `worst_code` in check_quantizers.py.

Each variant of a GEMM that a section of the benchmark times is run whole in its very tile, too: N and K are those of
the first such shape, with just enough tokens for a second row of tiles. So the machine code that is checked is the one
that is timed, and need not be compiled again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu import denoiser_times
from benchmarks.gpu.check_quantizers import quantizer_tasks
from benchmarks.gpu.denoiser import LINEARS, Size
from benchmarks.gpu.gemm import ACTIVATION, WEIGHT, accumulated, forms_of, rows_to_measure
from benchmarks.gpu.run import Array, Device, Task
from benchmarks.record import Json
from benchmarks.shapes import CHANNEL, EXACT_64, REAL_128, Granularity
from export.formats.format import get_format, pack
from export.formats.operands import FP32_BITS, HALF_ROUNDING, ROUNDING, exact_sum_limit
from plugins.gpu import launch, reference, tiles
from plugins.gpu.spec import Epilogue, FloatType, GemmSpec, PackSpec, operand_bytes
from plugins.gpu.table import kernel
from plugins.gpu.tile_table import Tile

GEMMS = ("packed_gemm", "expanded_gemm")
HALF_UNIT = {"fp32": ROUNDING, "fp16": HALF_ROUNDING, "bf16": 2.0**-8}
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
        what = f"{self.activation} x {self.weight} {self.m}x{self.n}x{self.k} {self.granularity.name}"
        extra = " as INT8" * self.integers + " zero point" * self.zero_point
        return f"{what}{extra}{f' {self.epilogue}' * (self.epilogue != 'none')} {self.output}"

    @property
    def tokens(self) -> int:
        """Rows that share a gate, of two samples; 0 without gates."""
        return self.m // 2 if self.spec.has_gate else 0

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
    exact, grouped = replace(case, granularity=EXACT_64), replace(case, granularity=real)
    gated = replace(case, m=2 * m, epilogue="gate_residual")
    zero_point = replace(case, activation="UE2M2", zero_point=True, output="fp16")
    odd = replace(case, m=1, n=7, k=74)
    if tiny:
        others = [replace(case, activation="INT8"), replace(case, weight="E3M0"), replace(exact, integers=True)]
        return [case, exact, grouped, gated, zero_point, odd, *others]
    return [
        *(case, exact, grouped),
        *(replace(one, integers=True) for one in (case, exact, grouped, gated)),
        *(gated, zero_point, replace(case, output="fp32")),
        *(replace(case, m=200, n=384, k=4608), replace(exact, n=3456), replace(grouped, n=384, k=4608)),
        *(replace(case, activation=activation) for activation in ("E3M2", "E4M3", "INT8", "E3M4", "UE2M2")),
        *(replace(case, weight=weight) for weight in ("E1M2", "E3M0", "INT4")),
        *(odd, replace(case, m=33, n=130, k=66, granularity=Granularity("groups", 22))),
        GemmCase("E3M2", "E3M0", 130, 1408, 1408, EXACT_64, output="fp16"),
        replace(case, m=4096, n=384, k=1408),
    ]


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
    span, bits = accumulated(spec, sm)
    if bits == FP32_BITS:
        return spec.in_features, spec.in_features
    return span, max(1, 2 ** (bits - 1) // product)


def scattered(rng: np.random.Generator, rows: int, columns: int, span: int, places: int) -> NDArray[np.bool_]:
    """Bool [rows, columns], in every row `places` of each `span` columns true; of a last, shorter one at most."""
    draw = rng.random((rows, -(-columns // span), span))
    last = np.partition(draw, places - 1)[..., places - 1 : places]
    return np.asarray((draw <= last).reshape(rows, -1)[:, :columns])


def inputs_of(case: GemmCase, sm: int = 0) -> dict[str, Array]:
    """NumPy inputs of packed_gemm by argument name; gate and residual are float32 numbers of the output type."""
    rng, spec = np.random.default_rng(0), case.spec
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


def check_gemm(device: Device, case: GemmCase) -> Json:
    """One row: for both kernels how many integer sums differ, and the worst error of an output over what is allowed."""
    arrays = inputs_of(case, sm=device.sm)
    plain = replace(case.spec, output="fp32", epilogue="none", zero_point=False)
    ones = {key: np.ones_like(arrays[key]) for key in ("a_scale", "w_scales")} | {"bias": np.zeros_like(arrays["bias"])}
    ones |= {key: arrays[key] for key in ("a", "w", "multiplier_codes") if key in arrays}
    (sums,), whole = kernel("packed_gemm").reference(plain, **ones), Whole.of(device, case, arrays)
    row: Json = {"of": sums.size, "passed": True}
    for name in GEMMS:
        differ = int((run_gemm(device, plain, ones, name, 0) != sums).sum())
        worst = whole.error_over_allowed(run_gemm(device, case.spec, arrays, name, case.tokens))
        row[name] = {"sums_differ": differ, "error_over_allowed": worst}
        row["passed"] = row["passed"] and differ == 0 and worst <= 1
    return row


@dataclass(frozen=True)
class Whole:
    """What a whole GEMM must give, and what it may be off by: [M, N]."""

    expected: Array
    limit: Array

    @classmethod
    def of(cls, device: Device, case: GemmCase, arrays: dict[str, Array]) -> Whole:
        (expected,) = kernel("packed_gemm").reference(case.spec, **arrays, tokens=case.tokens)
        return cls(expected, allowed(case, arrays, expected, cut=device.interpreted))

    def error_over_allowed(self, y: Array) -> float:
        """The largest error as a share of its limit; 1e9 where only one side is NaN (JSON has no Inf)."""
        if not (np.isnan(self.expected) == np.isnan(y)).all():
            return 1e9
        share = np.abs(y - self.expected) / np.maximum(self.limit, 1e-300)
        return float(np.nanmax(np.where(np.isnan(share), 0, share)))


def allowed(case: GemmCase, arrays: dict[str, Array], expected: Array, cut: bool) -> Array:
    """What a whole output [M, N] may be off by.

    Sums are exact. Each of the scale groups' products and additions, then two scales, zero point, bias, gate and
    residual, is a rounding to float32, in the kernel and in the reference: 2 (groups + 8) of them, relative to the sum
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
    error = 2 * (case.spec.scale_groups + 8) * ROUNDING * size
    if case.spec.has_gate:
        gate = np.abs(np.repeat(arrays["gate"], case.tokens, axis=0))
        error = error * gate + 4 * ROUNDING * (np.abs(arrays["residual"]) + gate * size)
    units = 2 if cut and case.output == "bf16" else 1
    return error + units * HALF_UNIT[case.output] * (np.abs(expected) + error) + SMALLEST[case.output]


def run_gemm(
    device: Device, spec: GemmSpec, arrays: dict[str, Array], name: str, tokens: int, tile: Tile | None = None
) -> Array:
    """The kernel `name` on NumPy inputs -> float32 [M, N]. tile: instead of the heuristics' choice."""
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


def check_repack(device: Device, case: GemmCase) -> Json:
    """pack and expand: bytes that differ from the references'."""
    arrays = inputs_of(case)
    codes = np.random.default_rng(1).integers(0, 16, (case.n, case.k)).astype(np.uint8)
    packed = launch.pack(device.tensor(codes)).cpu().numpy()
    weight = {key: device.tensor(arrays[key]) for key in ("w", "multiplier_codes") if key in arrays}
    expanded = launch.expand(case.spec, **weight).cpu().numpy()
    (expected,) = reference.expand(case.spec, arrays["w"], arrays.get("multiplier_codes"))
    differ = int((packed != reference.pack(PackSpec(case.k), codes)[0]).sum()), int((expanded != expected).sum())
    return {"pack_differ": differ[0], "expand_differ": differ[1], "passed": differ == (0, 0)}


# --- GEMMs in the tiles that they are timed in ------------------------------------------------------------------------

LEAST_ROWS, MORE_ROWS = 64, 32  # multiples of 16 even when halved (two gates): Triton compiles for such alike


@dataclass(frozen=True)
class TimedGemm:
    """A launch of `kernel`. case.m is the number of tokens it is timed at."""

    kernel: str
    case: GemmCase
    tile: Tile

    @property
    def variant(self) -> tuple[object, ...]:
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
    return TimedGemm(name, case, tiles.gemm_tile(name, case.spec, case.m, sm, may_split=True))


def of_gemm_section(device: Device) -> Iterator[TimedGemm]:
    """What benchmarks/gpu/gemm.py launches."""
    for shape, granularity in rows_to_measure():
        case = GemmCase(ACTIVATION, WEIGHT, shape.m, shape.n, shape.k, granularity)
        for form in forms_of(device, shape).values():
            yield launched(form.kernel, replace(case, integers=form.integers), device.sm, form.expand_first)


def of_denoiser_section(device: Device) -> Iterator[TimedGemm]:
    """What benchmarks/gpu/denoiser_times.py launches."""
    size = Size()
    for pixels, batch in denoiser_times.SIZES:
        for linear_name, linear in LINEARS.items():
            rows = size.caption if linear_name == "cross_kv" else denoiser_times.grid(size, pixels) ** 2
            n, k = linear.outputs * size.width, linear.inputs * size.width
            case = GemmCase(ACTIVATION, WEIGHT, batch * rows, n, k, EXACT_64, epilogue=linear.epilogue)
            for form in denoiser_times.FORMS.values():
                yield launched(form.kernel, replace(case, integers=form.integers), device.sm)


def timed_gemms(device: Device) -> list[TimedGemm]:
    """One for each variant, the first that is timed."""
    by_variant: dict[tuple[object, ...], TimedGemm] = {}
    for one in (*of_gemm_section(device), *of_denoiser_section(device)):
        by_variant.setdefault(one.variant, one)
    return list(by_variant.values())


def check_timed(device: Device, timed: TimedGemm) -> Json:
    """One row: the worst error of an output over what is allowed."""
    case = timed.small
    arrays = inputs_of(case, sm=device.sm)
    y = run_gemm(device, case.spec, arrays, timed.kernel, case.tokens, timed.tile)
    worst = Whole.of(device, case, arrays).error_over_allowed(y)
    return {"tile": str(timed.tile), "error_over_allowed": worst, "of": y.size, "passed": worst <= 1}


def tasks(device: Device) -> list[Task]:
    """The GEMMs that are timed first, then quantizers, pack and expand, and GEMMs of all formats."""
    cases = gemm_cases(device.tiny)
    timed = [] if device.interpreted else timed_gemms(device)  # the interpreter times nothing
    checks = [Task(one.name, partial(check_timed, device, one)) for one in timed] + quantizer_tasks(device)
    repacked = [case for case in cases if case.granularity in (CHANNEL, EXACT_64)]
    repacked = list({(case.weight, case.granularity, case.k, case.integers): case for case in repacked}.values())
    checks += [Task(f"pack, expand {case.name}", partial(check_repack, device, case)) for case in repacked]
    return checks + [Task(f"{' and '.join(GEMMS)} {case.name}", partial(check_gemm, device, case)) for case in cases]
