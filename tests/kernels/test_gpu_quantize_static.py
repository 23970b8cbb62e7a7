"""Quantizers with a scale and a zero that are given, interpreted on the CPU, against their NumPy references."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from export.errors import ContractError
from export.formats.format import Format, decode, get_format
from export.formats.format import quantize as encode
from plugins.gpu import launch
from plugins.gpu.launch import quantize
from plugins.gpu.spec import QuantizeSpec, operand_bytes
from plugins.gpu.table import kernel
from plugins.gpu.tiles import RowTile
from tests.kernels.test_gpu_quantize_fused import gelu_bound
from tests.support.gpu_quantizers import DTYPES, U

pytest.importorskip("triton", reason="the GPU kernels need triton")
pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("interpreter")]
NAMED = ("E2M3", "E3M2", "E4M3", "INT8", "INT6", "E3M4", "E5M2", "E2M1", "UE2M2", "UE1M5")
SCALES = ((0.037, 0.11), (2.0**-30, -3.0), (3e20, 0.0))


def tokens(fmt: Format, channels: int, scale: float, zero: float) -> np.ndarray:
    """[7, C]: of the scale's size, huge, zeros, subnormal, all ties, NaN, and both Inf."""
    rng = np.random.default_rng(channels)
    x = rng.normal(size=(7, channels)) * fmt.max_value * scale + zero
    x[1], x[2], x[3] = rng.choice([-3e38, 3e38], channels), -0.0, 1e-41
    grid = fmt.values[: fmt.max_code + 1]
    ties = np.concatenate([(grid[1:] + grid[:-1]) / 2, [fmt.max_value]])
    x[4] = np.resize(ties, channels) * np.resize([1, -1, 1], channels) * scale + zero
    x[5, ::2], x[6, ::2], x[6, 1::2] = np.nan, np.inf, -np.inf
    return x.astype(np.float32)


def static(scale: float, zero: float) -> dict[str, torch.Tensor]:
    return {"static_scale": torch.tensor([scale]), "static_zero": torch.tensor([zero])}


def quantize_static(spec: QuantizeSpec, x: torch.Tensor, **arguments: Any) -> torch.Tensor:
    (codes,) = quantize(spec, x, **arguments)
    return codes


def reference(spec: QuantizeSpec, x: torch.Tensor, grid: dict[str, torch.Tensor]) -> np.ndarray:
    arrays = {name: tensor.numpy() for name, tensor in grid.items()}
    return kernel("quantize").reference(spec, x.float().numpy(), **arrays)[0]


@pytest.mark.parametrize("channels", [1, 37])
@pytest.mark.parametrize("name", NAMED)
def test_equals_the_reference(name: str, channels: int) -> None:
    """Every code, bit for bit: NaN has the code 0, what is out of range saturates, Inf among it."""
    spec = QuantizeSpec(name, channels, input="fp32", static=True)
    for scale, zero in SCALES:
        x, grid = torch.from_numpy(tokens(get_format(name), channels, scale, zero)), static(scale, zero)
        np.testing.assert_array_equal(quantize_static(spec, x, **grid), reference(spec, x, grid), err_msg=f"{scale}")


@pytest.mark.parametrize("name", ["E2M3", "E4M3"])
def test_the_hardware_conversion_gives_the_same_bytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "sm_of", lambda _: 89)
    spec, grid = QuantizeSpec(name, 130, input="fp32", static=True), static(0.037, 0.11)
    x = torch.from_numpy(tokens(get_format(name), 130, 0.037, 0.11))
    np.testing.assert_array_equal(quantize_static(spec, x, **grid), reference(spec, x, grid))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_input_type_images_and_tiles(dtype: Any) -> None:
    spec, grid = QuantizeSpec("E2M3", 72, input=dtype, integers=True, static=True), static(0.5, 0.25)
    x = torch.randn(3, 72, generator=torch.Generator().manual_seed(0)).mul(3).to(DTYPES[dtype])
    for tile in (None, RowTile(64, 16, 1), RowTile(128, 0, 2)):
        np.testing.assert_array_equal(quantize_static(spec, x, **grid, tile=tile), reference(spec, x, grid))


@pytest.mark.parametrize("name", ["E2M3", "E4M3", "INT8", "UE2M2"])
def test_gelu(name: str) -> None:
    """Each code lies between those of the ends of GELU's error, which leaves hardly any open."""
    spec, fmt = QuantizeSpec(name, 300, "gelu", "fp32", static=True), get_format(name)
    x = (np.random.default_rng(1).normal(size=(5, 300)) * [[1], [0.01], [8], [300], [0]]).astype(np.float32)
    scale, zero = np.float32(0.02), np.float32(-0.043)
    codes = quantize_static(spec, torch.from_numpy(x), **static(float(scale), float(zero)))
    y, error = gelu_bound(x.astype(np.float64))
    # Beside GELU's error one rounding of the difference and one of the quotient.
    error = error + 2 * U * np.abs(y - zero)
    low, high = (decode(fmt, encode(fmt, (y - zero + sign * error) / scale)) for sign in (-1, 1))
    of_byte = np.full(256, np.nan)
    of_byte[operand_bytes(name)[encode(fmt, fmt.values)]] = decode(fmt, encode(fmt, fmt.values))
    value = of_byte[codes.numpy()]
    assert ((low <= value) & (value <= high)).all() and (low == high).mean() > 0.99


def test_what_does_not_fit_is_refused() -> None:
    spec, x, grid = QuantizeSpec("E2M3", 8, input="fp32", static=True), torch.zeros(2, 8), static(1.0, 0.0)
    with pytest.raises(ContractError, match="a quantizer behind a norm has a scale per token"):
        QuantizeSpec("E2M3", 8, "norm_modulate", static=True)
    with pytest.raises(ContractError, match=r"static_scale is float32 \[2\]; quantize takes float32 \[1\]"):
        quantize_static(spec, x, **grid | {"static_scale": torch.ones(2)})
    with pytest.raises(
        ContractError, match="static_scale, static_zero given, which quantize does not take for QuantizeSpec"
    ):
        quantize_static(QuantizeSpec("E2M3", 8, input="fp32"), x, **grid)
