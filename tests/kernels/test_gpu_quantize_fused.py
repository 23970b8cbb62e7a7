"""Quantizers behind LayerNorm and GELU: float32 in the kernel against float64, every code within a derived bound."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from export.dialect.reference import ABSMAX_FLOOR
from export.formats.format import decode, get_format
from export.formats.format import quantize as encode
from plugins.gpu.launch import quantize
from plugins.gpu.spec import QuantizeSpec, operand_bytes
from tests.support.gpu_quantizers import DTYPES, U, assert_equal, expected

pytest.importorskip("triton", reason="the GPU kernels need triton")
pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("interpreter")]


def assert_within(
    spec: QuantizeSpec, outputs: tuple[torch.Tensor, torch.Tensor], y: np.ndarray, error: np.ndarray
) -> float:
    """y [M, C] float64, error: bound of the kernel's y. -> share of the codes that the bound decides.

    The scale is off by the largest error of the row and one rounding of absmax and of the quotient. A quotient is off
    by its number's error and by its scale's. Codes rise with the quotient, so they lie between those of its ends.
    """
    fmt = get_format(spec.format)
    scale = np.maximum(np.abs(y).max(-1, keepdims=True), ABSMAX_FLOOR) / fmt.max_value
    worst = error.max(-1, keepdims=True) / fmt.max_value + 2 * U * scale
    assert (np.abs(outputs[1].numpy()[:, None] - scale) <= worst).all()
    moved = (error + np.abs(y) * worst / scale) / (scale - worst) + 2 * U * fmt.max_value
    of_byte = np.full(256, np.nan)
    of_byte[operand_bytes(spec.format)[encode(fmt, fmt.values)]] = decode(fmt, encode(fmt, fmt.values))
    value = of_byte[outputs[0].numpy()]
    low, high = (decode(fmt, encode(fmt, y / scale + sign * moved)) for sign in (-1, 1))
    assert ((low <= value) & (value <= high)).all()
    return float((low == high).mean())


def norm_bound(x: np.ndarray, gain: np.ndarray, shift: np.ndarray, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """(y float64, bound of its error in float32) of LayerNorm(x) * gain + shift.

    A sum of C numbers in a tree of height h is off by h U times the sum of magnitudes; h is at most 48 additions in a
    thread, 5 in a warp, 4 between warps and 1 for the tail, 64 with the roundings of the division by C. d = x - mean is
    off by the mean's error and its own rounding; mean(d^2) by 2 rms(d) rms(error of d) + 64 U mean(d^2), the deviation
    relatively by half of that and 3 roundings; the quotient, gain, product and sum add 5 roundings.
    """
    d = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((d**2).mean(-1, keepdims=True) + epsilon)
    d_error = 64 * U * np.abs(x).mean(-1, keepdims=True) + U * np.abs(d)
    rms = np.sqrt((d_error**2).mean(-1, keepdims=True))
    relative = rms / deviation + rms**2 / deviation**2 + 35 * U
    y = d / deviation * gain + shift
    error = np.abs(gain) * (d_error + np.abs(d) * (relative + 5 * U)) / deviation
    return y, error * (1 + 1e-3) + 2 * U * (np.abs(y) + np.abs(shift))


def norm_case(channels: int, dtype: str, samples: int = 2, count: int = 3, offset: float = 0.3) -> dict[str, Any]:
    rng = np.random.default_rng(channels)
    x = rng.normal(size=(samples * count, channels)) * rng.uniform(0.1, 20, (samples * count, 1)) + offset
    modulation = rng.normal(0, 0.5, (2, samples, channels))
    x, shift, scale = (torch.from_numpy(a.astype(np.float32)).to(DTYPES[dtype]) for a in (x, *modulation))
    return {"x": x, "shift": shift, "scale": scale, "tokens": count}


@pytest.mark.parametrize(
    ("name", "channels", "dtype"),
    [
        *[("E2M3", 37, "fp32"), ("E3M2", 1152, "fp16"), ("E4M3", 1408, "bf16"), ("INT8", 256, "fp32")],
        *[("E2M3", 4608, "fp16"), ("INT8", 1152, "bf16"), ("E4M3", 37, "fp16"), ("E3M2", 256, "bf16")],
    ],
)
def test_norm_modulate(name: str, channels: int, dtype: Any) -> None:
    spec = QuantizeSpec(name, channels, "norm_modulate", dtype)
    case = norm_case(channels, dtype)
    outputs = quantize(spec, **case)
    x, shift, scale = (case[key].double().numpy() for key in ("x", "shift", "scale"))
    y, error = norm_bound(x, np.repeat(1 + scale, 3, axis=0), np.repeat(shift, 3, axis=0), spec.epsilon)
    decided = assert_within(spec, outputs, y, error)
    assert decided > 0.99, "the bound leaves so few codes open that equality is what is tested"
    codes, _ = expected(spec, **case)
    assert (outputs[0].numpy() == codes).mean() >= decided


def test_norm_far_from_zero() -> None:
    """A mean of 100 deviations: the two sums in a row lose no digits that the numbers had."""
    spec = QuantizeSpec("E2M3", 300, "norm_modulate", "fp32")
    case = norm_case(300, "fp32", offset=2000.0)
    x, shift, scale = (case[key].double().numpy() for key in ("x", "shift", "scale"))
    y, error = norm_bound(x, np.repeat(1 + scale, 3, axis=0), np.repeat(shift, 3, axis=0), spec.epsilon)
    assert assert_within(spec, quantize(spec, **case), y, error) > 0.9


def test_norm_of_a_constant_row_is_the_shift() -> None:
    """Given the same float32 numbers, the quantizer behind the norm is QuantizeActivation, bit for bit."""
    spec = QuantizeSpec("E4M3", 48, "norm_modulate", "fp32")
    case = norm_case(48, "fp32")
    case["x"] = torch.zeros_like(case["x"])
    plain = QuantizeSpec("E4M3", 48, input="fp32")
    assert_equal(quantize(spec, **case), expected(plain, x=case["shift"].repeat_interleave(3, dim=0)))


def test_norm_of_broken_tokens() -> None:
    """NaN or Inf in a token breaks it, in shift or scale every token of the sample."""
    spec = QuantizeSpec("E2M3", 40, "norm_modulate", "fp32")
    case = norm_case(40, "fp32", samples=3)
    case["x"][0, 39], case["x"][1, 7] = np.inf, np.nan
    case["shift"][1, 3], case["scale"][2, 39] = np.nan, np.inf
    codes, scales = quantize(spec, **case)
    assert torch.isnan(scales).tolist() == [True, True, False] + [True] * 6
    assert not codes[torch.isnan(scales)].any() and codes[2].any()


def gelu_bound(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(y float64, bound of its error in float32) of x / (1 + 2^a), a = -2 u log2(e).

    a has 5 roundings, which the power turns into |a| ln(2) * 5 U of its size; the power itself adds 4 U (ex2.approx:
    2^-22). Of the sum that is a share of 2^a / (1 + 2^a). The sum adds U, the quotient 4 U (div.full: 2 ulp). From
    2^127 on the power is Inf and y is 0.
    """
    a = -2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3) / np.log(2)
    power = np.exp2(np.minimum(a, 1000))
    y = x / (1 + power)
    error = np.abs(y) * (power / (1 + power) * (3.5 * np.abs(a) + 4) + 6) * U
    return y, error + np.abs(x) * 2.0**-125


@pytest.mark.parametrize(
    ("name", "channels", "dtype"),
    [
        ("E2M3", 37, "fp32"),
        ("E3M2", 1152, "fp16"),
        ("E4M3", 4608, "bf16"),
        ("INT8", 37, "fp32"),
        ("E2M3", 4608, "fp16"),
    ],
)
def test_gelu(name: str, channels: int, dtype: Any) -> None:
    spec = QuantizeSpec(name, channels, "gelu", dtype)
    rng = np.random.default_rng(channels)
    x = torch.from_numpy((rng.normal(size=(5, channels)) * [[1], [0.01], [8], [300], [0]]).astype(np.float32))
    x = x.to(DTYPES[dtype])
    outputs = quantize(spec, x)
    decided = assert_within(spec, outputs, *gelu_bound(x.double().numpy()))
    assert decided > 0.99
    assert (outputs[0].numpy() == expected(spec, x=x)[0]).mean() >= decided
    assert outputs[1][4] == np.float32(ABSMAX_FLOOR) / np.float32(get_format(name).max_value)


def test_gelu_of_negative_rows() -> None:
    """Where 1 + tanh loses all digits: the codes are still GELU's own, not zeros."""
    spec = QuantizeSpec("E2M3", 16, "gelu", "fp32")
    x = -torch.linspace(5.5, 7.5, 16)[None]
    outputs = quantize(spec, x)
    assert_within(spec, outputs, *gelu_bound(x.double().numpy()))
    assert outputs[0].any()
