"""fpq.GeluQuantize: its function body in onnxruntime and onnx.reference against GELU in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from export.dialect.ops import OPS
from export.dialect.reference import ABSMAX_FLOOR
from export.formats.format import decode, get_format, quantize
from tests.support.op_models import F32_EPS, run_everywhere


@pytest.mark.parametrize("name", ["E2M3", "E4M3", "INT8"])
@pytest.mark.parametrize("shape", [(7,), (3, 37), (2, 4, 130)])
def test_gelu_quantize(name: str, shape: tuple[int, ...]) -> None:
    """The exponent a has 5 roundings, which exp turns into 5 |a| of its own size and adds 6; of the sum 1 + e^a that is
    a share of e^a / (1 + e^a); the sum and the quotient add 4 at most. The scale has the error of the row's largest; a
    code may differ only where the quotient lies so near to a midpoint.
    """
    fmt = get_format(name)
    x = (np.random.default_rng(3).normal(size=shape) * 2).astype(np.float32)
    codes, scale = run_everywhere("GeluQuantize", x, exact=False, format=name)
    wide = x.astype(np.float64)
    u = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    y, power = wide / 2 * (1 + np.tanh(u)), np.exp(-2 * u)
    error = np.abs(y) * (power / (1 + power) * (10 * np.abs(u) + 6) + 4) * F32_EPS
    exact_scale = np.abs(y).max(axis=-1, keepdims=True) / fmt.max_value
    scale_error = error.max(axis=-1, keepdims=True) / fmt.max_value + 2 * F32_EPS * exact_scale
    assert (np.abs(scale - exact_scale) <= scale_error).all()
    moved = (error + np.abs(y) * scale_error / exact_scale) / (exact_scale - scale_error)
    low, high = (decode(fmt, quantize(fmt, y / exact_scale + sign * moved)) for sign in (-1, 1))
    assert ((low <= decode(fmt, codes)) & (decode(fmt, codes) <= high)).all()
    assert (low == high).mean() > 0.99


def test_the_reference_is_the_quantizer_of_gelu() -> None:
    """Exact where GELU is: zeros, and large numbers, which it leaves alone or takes to zero."""
    x = np.array([[0.0, -0.0, 100.0, -100.0, 50.0]], np.float32)
    codes, scale = OPS["GeluQuantize"].numpy(x, format="E2M3")
    assert decode(get_format("E2M3"), codes).tolist() == [[0.0, 0.0, 7.5, 0.0, 3.75]]
    assert scale == np.float32(100) / np.float32(7.5)


def test_negative_tokens_keep_their_digits() -> None:
    """At -7, 1 + tanh is some 1e-15: float64 would keep one digit of it."""
    codes, scale = OPS["GeluQuantize"].numpy(np.array([[-7.0, -6.9]], np.float32), format="E4M3")
    u = [math.sqrt(2 / math.pi) * (x + 0.044715 * x**3) for x in (7.0, float(np.float32(6.9)))]
    y = [-x / (1 + math.exp(2 * v)) for x, v in zip((7.0, float(np.float32(6.9))), u, strict=True)]
    assert abs(scale[0, 0] * 448 / -y[1] - 1) < 1e-6
    assert decode(get_format("E4M3"), codes)[0, 1] == -448


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_broken_tokens(bad: float) -> None:
    x = np.array([[1.0, bad], [1.0, 2.0]], np.float32)
    codes, scale = OPS["GeluQuantize"].numpy(x, format="E2M3")
    assert np.isnan(scale[0]) and not codes[0].any()
    assert np.isfinite(scale[1]) and codes[1].all()


def test_zero_tokens() -> None:
    codes, scale = OPS["GeluQuantize"].numpy(np.zeros((2, 5), np.float32), format="INT8")
    assert not codes.any() and (scale == np.float32(ABSMAX_FLOOR) / np.float32(127)).all()
