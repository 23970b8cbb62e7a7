"""Straight-through fake quantizers: forward the codec's values, backward the clamp's and LSQ's gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export.errors import ContractError
from export.formats.format import FORMATS, decode, get_format, quantize
from pipeline.backends.reference import fake_quantize as reference_fake_quantize
from pipeline.calibrate.learn import ste

SIGNED = [name for name, fmt in FORMATS.items() if fmt.sign_bits]
UNSIGNED = [name for name, fmt in FORMATS.items() if not fmt.sign_bits]


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 2, shape)).requires_grad_()


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_is_the_codecs(name):
    fmt = get_format(name)
    u = some(400).detach() * fmt.max_value / 3
    u[:3] = torch.tensor([0.0, -0.0, 10 * fmt.max_value])
    rounded = ste.round_straight_through(fmt, u)
    assert np.array_equal(rounded.numpy(), decode(fmt, quantize(fmt, u.numpy())))


@pytest.mark.parametrize("name", FORMATS)
def test_gradient_of_rounding_is_one_inside_and_zero_outside(name):
    fmt = get_format(name)
    u = (some(400).detach() * fmt.max_value).requires_grad_()
    ste.round_straight_through(fmt, u).sum().backward()
    low = -fmt.max_value if fmt.sign_bits else 0.0
    inside = ((u >= low) & (u <= fmt.max_value)).double()
    assert torch.equal(u.grad, inside)
    assert 0 < inside.sum() < 400


@pytest.mark.parametrize("name", SIGNED)
def test_per_token_is_the_reference_and_its_gradient_the_identity(name):
    x = some(3, 5, 16)
    rounded = ste.per_token(get_format(name), x)
    assert torch.equal(rounded, reference_fake_quantize(get_format(name), x.detach()))
    weight = torch.arange(240.0).reshape(3, 5, 16).double()
    (rounded * weight).sum().backward()
    assert torch.equal(x.grad, weight)


@pytest.mark.parametrize("name", UNSIGNED)
def test_unsigned_with_a_zero(name):
    fmt, x = get_format(name), some(300)
    scale, zero = torch.tensor([2.5 / fmt.max_value]).double(), torch.tensor([-0.25]).double()
    rounded = ste.per_tensor(fmt, x, scale, zero).detach()
    codes = quantize(fmt, (x.detach().numpy() + 0.25) / scale.numpy())
    assert np.array_equal(rounded.numpy(), decode(fmt, codes) * scale.numpy() - 0.25)
    assert rounded.min() == -0.25


def test_gradients_of_scale_and_zero_are_lsqs():
    fmt = get_format("UE2M2")
    x, scale = some(50), torch.tensor([0.4], dtype=torch.float64, requires_grad=True)
    zero = torch.tensor([-0.3], dtype=torch.float64, requires_grad=True)
    ste.per_tensor(fmt, x, scale, zero).sum().backward()
    expected_scale = expected_zero = 0.0
    for value in x.detach().numpy():
        u = (value + 0.3) / 0.4
        rounded = decode(fmt, quantize(fmt, u))
        inside = 0 <= u <= fmt.max_value
        expected_scale += rounded - u if inside else rounded
        expected_zero += 0 if inside else 1
    assert scale.grad.item() == pytest.approx(expected_scale, rel=1e-12)
    assert zero.grad.item() == pytest.approx(expected_zero, rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(SIGNED), st.integers(0, 2**31), st.floats(1e-20, 1e20))
def test_quantizing_twice_is_quantizing_once(name, seed, size):
    fmt, x = get_format(name), some(4, 16, seed=seed).detach() * size
    once = ste.per_token(fmt, x)
    # The scale of the result is that of x but for a rounding of max_value * scale, so values agree but for two.
    assert torch.allclose(ste.per_token(fmt, once), once, rtol=2**-50, atol=0)


def test_zero_rows_stay_zero_and_have_a_gradient():
    x = torch.zeros(2, 8, requires_grad=True)
    rounded = ste.per_token(get_format("E2M3"), x)
    rounded.sum().backward()
    assert not rounded.any()
    assert torch.equal(x.grad, torch.ones(2, 8))


def test_no_zero_needs_a_signed_format():
    with pytest.raises(ContractError, match="UE2M2 does not go with no zero"):
        ste.per_token(get_format("UE2M2"), torch.ones(2, 8))


def test_a_zero_needs_an_unsigned_format():
    with pytest.raises(ContractError, match="E2M1 does not go with a zero; use an unsigned"):
        ste.per_tensor(get_format("E2M1"), torch.ones(3), torch.ones(1), torch.zeros(1))
