"""Are the quantizers right? Tokens of all magnitudes, with zeros, NaN, Inf and outliers, against NumPy references."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from benchmarks.gpu.run import Array, Device, Task
from benchmarks.record import Json
from export.formats.operands import ROUNDING
from plugins.gpu import launch
from plugins.gpu.reference import byte_values
from plugins.gpu.spec import Before, FloatType, QuantizeSpec
from plugins.gpu.table import QUANTIZER_OF, kernel

# Roundings to float32 on the way from an element to its quotient by the scale, of the largest number in its row: the
# sums' trees (log2 of 4608 channels, twice), centring, deviation, gain and shift, or GELU's exponential; the scale.
STEPS = 64


@dataclass(frozen=True)
class QuantizerCase:
    """One quantizer to check on x [M, C]."""

    before: Before
    format: str
    m: int
    c: int
    input: FloatType
    integers: bool = False

    @property
    def name(self) -> str:
        return f"{QUANTIZER_OF[self.before]} {self.format}{' as INT8' * self.integers} {self.m}x{self.c} {self.input}"

    @property
    def spec(self) -> QuantizeSpec:
        return QuantizeSpec(self.format, self.c, self.before, self.input, integers=self.integers)


def quantizer_cases(tiny: bool) -> list[QuantizerCase]:
    """All kernels over the formats of the recipes, widths of the models and odd ones."""
    kinds: tuple[Before, ...] = ("none", "gelu", "norm_modulate")
    rows: list[tuple[Before, str, int, int, FloatType]]
    if tiny:
        rows = [(kind, "E2M3", 8, 72, "bf16") for kind in kinds]
        rows += [("none", "INT8", 8, 33, "fp32"), ("norm_modulate", "E4M3", 8, 40, "fp16")]
        return [*(QuantizerCase(*row) for row in rows), QuantizerCase("none", "E2M3", 8, 33, "bf16", integers=True)]
    rows = [(kind, "E2M3", 512, c, "bf16") for kind, c in zip(kinds, (1152, 4608, 1152), strict=True)]
    for fmt in ("E3M2", "E4M3", "INT8", "E3M4", "INT6", "UE2M2"):
        rows += [(kind, fmt, 64, 1408, "fp16") for kind in kinds]
    rows += [("none", "E2M3", 33, c, "fp32") for c in (1, 257, 6144)]
    rows += [("norm_modulate", "E2M3", 32, 1000, "fp32"), ("norm_modulate", "INT8", 4096, 1152, "bf16")]
    as_integers = [QuantizerCase(kind, "E2M3", 64, 1152, "bf16", integers=True) for kind in kinds]
    return [*(QuantizerCase(*row) for row in rows), *as_integers]


def rows_of(case: QuantizerCase) -> Array:
    """x f32 [M, C], numbers that fp16 and bf16 hold: tokens over many binades; then zeros, NaN, Inf and an outlier."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((case.m, case.c)) * np.exp2(rng.integers(-6, 5, (case.m, 1)))
    mantissa, exponent = np.frexp(x)
    x = np.ldexp(np.rint(mantissa * 128) / 128, exponent).astype(np.float32)
    x[0], x[1, 0], x[2, -1], x[3, case.c // 2] = 0, np.nan, np.inf, 300
    return x


def check_quantizer(device: Device, case: QuantizerCase) -> Json:
    """One row: codes and scales that differ, and the worst of them over what is allowed."""
    x, extra = rows_of(case), _modulation(case)
    tensors = {key: device.tensor(value).to(device.dtype(case.input)) for key, value in {"x": x, **extra}.items()}
    tokens = case.m // 2 if extra else 0
    codes, scales = (output.cpu().numpy() for output in launch.quantize(case.spec, **tensors, tokens=tokens))
    sizes = {"tokens": tokens} if extra else {}
    expected_codes, expected_scales = kernel(QUANTIZER_OF[case.before]).reference(case.spec, x, **extra, **sizes)
    worst = worst_code(case, (codes, scales), (expected_codes, expected_scales), before_scale(case, x, extra))
    codes_differ = int((codes != expected_codes).sum())
    scales_differ = int(((scales != expected_scales) & ~(np.isnan(scales) & np.isnan(expected_scales))).sum())
    return {
        "codes_differ": codes_differ,
        "scales_differ": scales_differ,
        "of": x.size,
        "worst_over_allowed": worst,
        "passed": codes_differ == scales_differ == 0 if case.before == "none" else worst <= 1,
    }


def _modulation(case: QuantizerCase) -> dict[str, Array]:
    """shift and scale [2, C] for norm_modulate, nothing for the others."""
    if case.before != "norm_modulate":
        return {}
    rng = np.random.default_rng(2)
    draw = [np.rint(rng.standard_normal((2, case.c)) * 64) / 128 for _ in range(2)]
    return {"shift": draw[0].astype(np.float32), "scale": draw[1].astype(np.float32)}


def before_scale(case: QuantizerCase, x: Array, extra: dict[str, Array]) -> Array:
    """What is quantized, float64 [M, C]; NaN where a token has NaN or Inf."""
    wide = np.where(np.isfinite(x).all(1, keepdims=True), x, np.nan).astype(np.float64)
    if case.before == "none":
        return wide
    if case.before == "gelu":
        with np.errstate(over="ignore"):
            return wide / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)))
    centred = wide - wide.mean(1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(1, keepdims=True) + case.spec.epsilon)
    gain, shift = (
        np.repeat(part, case.m // 2, axis=0) for part in (1 + extra["scale"].astype(np.float64), extra["shift"])
    )
    return np.asarray(normal * gain + shift)


def worst_code(case: QuantizerCase, ours: tuple[Array, Array], expected: tuple[Array, Array], y: Array) -> float:
    """How far a code's value lies beyond the nearest code's from the true quotient, over what roundings may do.

    The nearest code is at a distance d from y / scale; one chosen from a quotient that is off by e is at most
    d + 2 e away. e is STEPS roundings of the row's largest number.
    """
    values = byte_values(case.format, case.integers)
    healthy = np.isfinite(expected[1])
    if not (np.isfinite(ours[1]) == healthy).all() or ours[0][~healthy].any():
        return 1e9
    scale = expected[1][healthy, None].astype(np.float64)
    q = y[healthy] / scale
    far = [np.abs(values[codes[healthy]] - q) for codes in (ours[0], expected[0])]
    limit = 2 * STEPS * ROUNDING * np.abs(q).max(1, keepdims=True).clip(1e-3)
    off = np.abs(ours[1][healthy] / expected[1][healthy] - 1) / (STEPS * ROUNDING)
    worst = max(float(((far[0] - far[1]) / limit).max()), float(off.max()), 0.0)
    return worst if np.isfinite(worst) else 1e9


def quantizer_tasks(device: Device) -> list[Task]:
    """One task for each case."""
    return [Task(case.name, partial(check_quantizer, device, case)) for case in quantizer_cases(device.tiny)]
