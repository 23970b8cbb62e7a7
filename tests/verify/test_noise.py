"""The table of noise of jittered runs."""

from __future__ import annotations

import pytest
import torch

from pipeline.verify.reference_hooks import NUMBERS, Noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (NUMBERS + 1,)])
def test_numbers_move_by_up_to_the_factor(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    value = torch.full(shape, 3.0, dtype=dtype)
    moved = Noise(0).moved(value, torch.full(shape, 2.0, dtype=dtype), 0.25)
    assert moved.shape == value.shape and moved.dtype == dtype
    assert bool(((moved - value).abs() <= 0.5).all())


def test_noise_is_uniform_and_another_each_time() -> None:
    table, zero, one = Noise(1), torch.zeros(20000), torch.ones(20000)
    first, second = (table.moved(zero, one, 1.0) for _ in range(2))
    for noise in (first, second):  # mean and variance of a uniform number in [-1, 1), within 6 standard errors
        assert abs(float(noise.mean())) < 6 * (1 / 3 / 20000) ** 0.5
        assert abs(float(noise.square().mean()) - 1 / 3) < 6 * (4 / 45 / 20000) ** 0.5
    assert abs(float((first * second).mean())) < 6 / 3 / 20000**0.5


def test_a_seed_gives_the_same_noise() -> None:
    zero, one = torch.zeros(7), torch.ones(7)
    assert torch.equal(Noise(5).moved(zero, one, 1.0), Noise(5).moved(zero, one, 1.0))
    assert not torch.equal(Noise(5).moved(zero, one, 1.0), Noise(6).moved(zero, one, 1.0))
