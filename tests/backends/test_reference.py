"""The quantized model in PyTorch: what its float64 linears compute."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.backends.reference import FakeQuantLinear
from tests.support.portable import make_linear


def quantized(activation_format: str, multipliers: bool, balanced: bool) -> FakeQuantLinear:
    rng = np.random.default_rng(0)
    n, k, group = 24, 128, 32
    layer = make_linear(
        rng.integers(0, 16, (n, k)).astype(np.uint8),
        weight_format="E2M1",
        name="blocks.0.fc1",
        kind="linear",
        granularity="exact_group" if multipliers else "per_channel",
        group_size=group if multipliers else 0,
        scales=rng.uniform(0.01, 0.1, (n, 1)).astype(np.float32),
        multipliers=rng.integers(1, 8, (n, k // group)).astype(np.uint8) if multipliers else None,
        bias=rng.standard_normal(n).astype(np.float32),
        activation_format=activation_format,
        input_multiplier=rng.uniform(0.5, 2, k).astype(np.float32) if balanced else None,
    )
    return FakeQuantLinear(layer, torch.float64)


@pytest.mark.parametrize("activation_format", ["E2M3", "E2M1", "INT8"])
@pytest.mark.parametrize(("multipliers", "balanced"), [(False, False), (True, False), (True, True)])
def test_sums_of_integers_are_the_product_of_the_dequantized_numbers(
    activation_format: str, multipliers: bool, balanced: bool
) -> None:
    linear = quantized(activation_format, multipliers, balanced)
    x = torch.randn(3, 7, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert linear.sums_integers
    expected, result = linear.product(x), linear(x)
    # 2^-53 for each of K products and their sum, of magnitudes that are some ten times the result's.
    assert torch.allclose(result, expected, rtol=0, atol=float(128 * 2.0**-53 * 16 * expected.abs().max()))
    assert not torch.equal(result, linear.product(x.float().double() * (1 + 2**-20)))


def test_long_sums_are_added_up_in_parts() -> None:
    k = 4096
    layer = make_linear(
        np.full((3, k), 7, np.uint8), weight_format="E2M1", activation_format="INT8", name="wo", kind="linear",
        granularity="exact_group", group_size=64, scales=np.ones((3, 1), np.float32),
        multipliers=np.full((3, k // 64), 9, np.uint8),
    )  # fmt: skip
    linear, x = FakeQuantLinear(layer, torch.float64), torch.arange(1.0, k + 1, dtype=torch.float64)[None]
    assert linear.sums_integers and k * 127 * 108 > 2**24
    torch.testing.assert_close(linear(x), linear.product(x), rtol=1e-14, atol=0)


def test_sums_beyond_float32_are_left_to_float64() -> None:
    assert not quantized("E4M3", multipliers=True, balanced=False).sums_integers


def test_one_nan_spoils_its_token_alone() -> None:
    linear = quantized("E2M3", multipliers=True, balanced=False)
    x = torch.ones(2, 3, 128, dtype=torch.float64)
    x[1, 2, 5] = torch.nan
    spoilt = torch.isnan(linear(x)).all(dim=-1)
    assert spoilt.nonzero().tolist() == [[1, 2]]
    assert int(torch.isnan(linear(x)).sum()) == linear.out_features
