"""Quantizers of the GPU target, interpreted on the CPU, against their NumPy references."""

from __future__ import annotations

from itertools import cycle, product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from export.errors import ContractError, EnvironmentLacksError
from export.formats.format import Format, get_format
from plugins.gpu import launch, tiles
from plugins.gpu.launch import quantize
from plugins.gpu.spec import QuantizeSpec
from plugins.gpu.tiles import RowTile
from tests.support.gpu_quantizers import DTYPES, assert_equal, expected

pytest.importorskip("triton", reason="the GPU kernels need triton")
pytestmark = [
    pytest.mark.kernels,
    pytest.mark.usefixtures("interpreter"),
    # A maximum that ignores NaN, as the hardware's, has none left in a row of NaN.
    pytest.mark.filterwarnings("ignore:All-NaN slice"),
]


NAMED = ("E2M3", "E3M2", "E4M3", "INT8", "INT6", "E3M4", "E5M2", "E2M1", "E3M0", "UE2M2", "UE1M5", "UE4M4")


def tokens(fmt: Format, channels: int) -> np.ndarray:
    """[10, C]: normal, +0, -0, huge, at the floor, subnormal, an outlier, all ties, a NaN, an Inf."""
    rng = np.random.default_rng(channels)
    x = rng.normal(size=(10, channels)).astype(np.float32)
    x[1], x[2] = 0.0, -0.0
    x[3] *= np.float32(3e37)
    x[4] *= np.float32(1e-31)
    x[5] *= np.float32(1e-41)
    x[6, channels // 2] = 1e4
    grid = fmt.values[: fmt.max_code + 1]
    ties = np.concatenate([[fmt.max_value], (grid[1:] + grid[:-1]) / 2])
    x[7] = np.resize(ties, channels) * np.resize([1, 1, -1], channels)  # the first makes the scale exactly 1
    x[8, channels - 1] = np.nan
    x[9, 0] = -np.inf
    return x


# --- quantize ------------------------------------------------------------------------------------------------------


WIDTHS = (1, 2, 37, 128, 1152)


@pytest.mark.parametrize(
    ("name", "channels"), list(dict.fromkeys([*zip(NAMED, cycle(WIDTHS), strict=False), *product(["E2M3"], WIDTHS)]))
)
def test_equals_the_reference(name: str, channels: int) -> None:
    """Every code and every scale, bit for bit."""
    spec = QuantizeSpec(name, channels, input="fp32")
    x = torch.from_numpy(tokens(get_format(name), channels))
    codes, scales = quantize(spec, x)
    assert_equal((codes, scales), expected(spec, x=x))
    assert torch.isnan(scales[8:]).all() and not torch.isnan(scales[:8]).any()
    assert not codes[[1, 2, 5, 8, 9]].any(), "rows of zeros, below the floor, and broken ones have codes 0"


@pytest.mark.parametrize("name", ["E2M3", "E3M2", "E4M3", "E2M1"])
def test_the_hardware_conversion_gives_the_same_bytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From SM89 on bytes come out of a conversion instruction, which the interpreter has, too."""
    monkeypatch.setattr(launch, "sm_of", lambda _: 89)
    spec = QuantizeSpec(name, 130, input="fp32")
    x = torch.from_numpy(tokens(get_format(name), 130))
    assert_equal(quantize(spec, x), expected(spec, x=x))


@pytest.mark.parametrize("channels", [4608, 4607, 5632])
@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_rows_and_every_input_type(dtype: Any, channels: int) -> None:
    spec = QuantizeSpec("E2M3", channels, input=dtype)
    x = torch.randn(2, channels, generator=torch.Generator().manual_seed(0)).mul(3).to(DTYPES[dtype])
    assert_equal(quantize(spec, x), expected(spec, x=x))


@pytest.mark.fast
@pytest.mark.parametrize("tile", [RowTile(64, 0, 1), RowTile(32, 16, 2), RowTile(32, 32, 1), RowTile(128, 0, 4)])
def test_the_tile_changes_no_bit(tile: RowTile) -> None:
    spec = QuantizeSpec("E2M3", 45, input="fp32")
    x = torch.from_numpy(tokens(get_format("E2M3"), 45))
    assert_equal(quantize(spec, x, tile=tile), expected(spec, x=x))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 31, 32, 36])
def test_a_broken_token_stays_broken_and_alone(bad: float, position: int) -> None:
    spec = QuantizeSpec("E2M3", 37, input="fp32")
    x = torch.from_numpy(np.random.default_rng(2).normal(size=(3, 37)).astype(np.float32))
    healthy = quantize(spec, x)
    x[1, position] = bad
    codes, scales = quantize(spec, x)
    assert torch.isnan(scales[1]) and not codes[1].any()
    for after, before in zip((codes, scales), healthy, strict=True):
        assert (after[[0, 2]] == before[[0, 2]]).all()


def test_results_go_where_the_caller_says() -> None:
    """Same storage in every run, as a CUDA graph needs it; no rows are no work."""
    spec = QuantizeSpec("INT8", 20, input="fp32")
    x = torch.randn(3, 20)
    codes, scales = torch.full((3, 20), 255, dtype=torch.uint8), torch.zeros(3)
    outputs = quantize(spec, x, codes=codes, scales=scales)
    assert outputs[0] is codes and outputs[1] is scales
    assert_equal(outputs, expected(spec, x=x))
    assert [tuple(t.shape) for t in quantize(spec, x[:0])] == [(0, 20), (0,)]


ROWS = st.lists(st.floats(-1e4, 1e4, width=32), min_size=21, max_size=21).map(lambda v: np.array([v], np.float32))
FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FEW
@given(ROWS, st.sampled_from(NAMED))
def test_any_row(x: np.ndarray, name: str) -> None:
    spec = QuantizeSpec(name, 21, input="fp32")
    assert_equal(quantize(spec, torch.from_numpy(x)), expected(spec, x=x))


@FEW
@given(ROWS, st.integers(-60, 60))
def test_powers_of_two_move_the_scale_only(x: np.ndarray, exponent: int) -> None:
    """Exact as long as neither row reaches the floor or the subnormals."""
    x[np.abs(x) < 1e-6] = 0.0
    x[0, 0] = 1.0
    spec = QuantizeSpec("E2M3", 21, input="fp32")
    codes, scales = quantize(spec, torch.from_numpy(x))
    moved_codes, moved_scales = quantize(spec, torch.from_numpy(np.ldexp(x, exponent).astype(np.float32)))
    assert (codes == moved_codes).all() and (moved_scales == scales * 2.0**exponent).all()


@FEW
@given(ROWS)
def test_the_sign_moves_the_sign_bit_only(x: np.ndarray) -> None:
    spec = QuantizeSpec("E3M2", 21, input="fp32")
    codes, scales = quantize(spec, torch.from_numpy(x))
    opposite, same = quantize(spec, torch.from_numpy(-x))
    assert (scales == same).all() and (opposite == torch.where(codes > 0, codes ^ 0x80, codes)).all()


# --- what is refused -----------------------------------------------------------------------------------------------

SPEC = QuantizeSpec("E2M3", 8, input="fp32")
NORM = QuantizeSpec("E2M3", 8, "norm_modulate", "fp32")
GOOD = torch.zeros(6, 8)
REFUSED = [
    (SPEC, {"x": torch.zeros(6, 9)}, r"x is float32 \[6, 9\]; quantize takes float32 \[6, 8\]"),
    (SPEC, {"x": torch.zeros(8)}, r"x is float32 \[8\]; quantize takes float32 \[8, 8\]"),
    (SPEC, {"x": GOOD.half()}, "x is float16"),
    (SPEC, {"x": torch.zeros(8, 6).T}, r"x is float32 \[6, 8\], not contiguous; quantize takes"),
    (SPEC, {"x": GOOD, "shift": GOOD}, "quantize takes x in this order, .*: shift by name"),
    (SPEC, {"x": GOOD, "codes": torch.zeros(6, 8)}, "codes is float32"),
    (SPEC, {"x": GOOD, "scales": torch.zeros(5)}, r"scales is float32 \[5\]"),
    (SPEC, {"x": GOOD, "tile": RowTile(4, 2, 1)}, "a tile of 4 \\+ 2 columns is narrower than 8 channels"),
    (NORM, {"x": GOOD, "scale": GOOD[:1], "tokens": 6}, "shift is missing; norm_modulate_quantize needs it"),
    (
        NORM,
        {"x": GOOD, "shift": GOOD[:1], "scale": GOOD[:1]},
        "tokens 0: the rows that share a row of shift and scale must divide the 6 rows",
    ),
    (NORM, {"x": GOOD, "shift": GOOD[:1], "scale": GOOD[:1], "tokens": 4}, "tokens 4: the rows that share a row of"),
    (NORM, {"x": GOOD, "shift": GOOD[:2], "scale": GOOD[:1], "tokens": 3}, r"scale is float32 \[1, 8\]"),
]


@pytest.mark.parametrize(("spec", "arguments", "message"), REFUSED)
def test_refused(spec: QuantizeSpec, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        quantize(spec, **arguments)


def test_rows_that_no_program_holds_are_refused() -> None:
    spec = QuantizeSpec("E2M3", tiles.MAX_CHANNELS + 1, input="fp32")
    with pytest.raises(ContractError, match="16385 channels; a program's registers hold a row of at most 16384"):
        quantize(spec, torch.zeros(1, spec.channels))


@pytest.mark.parametrize("broken", [{"block": 12}, {"tail": 3}, {"num_warps": 0}])
def test_tiles_are_powers_of_two(broken: dict[str, int]) -> None:
    with pytest.raises(ContractError, match=r"of a tile must be a power of two"):
        RowTile(**{"block": 8, "tail": 0, "num_warps": 1} | broken)


def test_without_gpu_and_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(EnvironmentLacksError, match="TRITON_INTERPRET=1"):
        quantize(SPEC, GOOD)
