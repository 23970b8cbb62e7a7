"""Quantizers of the GPU target, interpreted on the CPU, against their NumPy meanings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from export.errors import ContractError, EnvironmentLacksError
from export.formats import Format, decode, get_format
from export.formats import quantize as encode
from export.op_meanings import ABSMAX_FLOOR
from plugins.gpu import launch_quantize, row_tiles
from plugins.gpu.launch_quantize import quantize
from plugins.gpu.operands import operand_bytes
from plugins.gpu.row_tiles import RowTile
from plugins.gpu.specs import QuantizeSpec
from plugins.gpu.table import kernel

pytest.importorskip("triton", reason="the GPU kernels need triton")
pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    # A maximum that ignores NaN, as the hardware's, has none left in a row of NaN.
    pytest.mark.filterwarnings("ignore:All-NaN slice"),
]
U = 2.0**-24  # largest relative error of one float32 rounding
NAMED = ("E2M3", "E3M2", "E4M3", "INT8", "INT6", "E3M4", "E5M2", "E2M1", "E3M0", "UE2M2", "UE1M5", "UE4M4")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
KERNEL_OF = {"none": "quantize", "gelu": "gelu_quantize", "norm_modulate": "norm_modulate_quantize"}


def expected(spec: QuantizeSpec, **inputs: Any) -> tuple[np.ndarray, np.ndarray]:
    """The meaning's (operand bytes, scales) of torch tensors."""
    arrays = {name: x.float().numpy() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    codes, scales = kernel(KERNEL_OF[spec.before]).reference(spec, **arrays)
    return codes, scales


def assert_equal(found: tuple[torch.Tensor, torch.Tensor], wanted: tuple[np.ndarray, np.ndarray]) -> None:
    np.testing.assert_array_equal(found[1].numpy(), wanted[1], err_msg="scales")
    np.testing.assert_array_equal(found[0].numpy(), wanted[0], err_msg="codes")


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


@pytest.mark.parametrize("channels", [1, 2, 37, 128, 1152])
@pytest.mark.parametrize("name", NAMED)
def test_equals_the_meaning(name: str, channels: int) -> None:
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
    monkeypatch.setattr(launch_quantize, "compute_capability", lambda _: 89)
    spec = QuantizeSpec(name, 130, input="fp32")
    x = torch.from_numpy(tokens(get_format(name), 130))
    assert_equal(quantize(spec, x), expected(spec, x=x))


@pytest.mark.parametrize("channels", [4608, 4607, 5632])
@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_rows_and_every_input_type(dtype: Any, channels: int) -> None:
    spec = QuantizeSpec("E2M3", channels, input=dtype)
    x = torch.randn(2, channels, generator=torch.Generator().manual_seed(0)).mul(3).to(DTYPES[dtype])
    assert_equal(quantize(spec, x), expected(spec, x=x))


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
    for found, before in zip((codes, scales), healthy, strict=True):
        assert (found[[0, 2]] == before[[0, 2]]).all()


def test_results_go_where_the_caller_says() -> None:
    """Same storage in every run, as a CUDA graph needs it; no rows are no work."""
    spec = QuantizeSpec("INT8", 20, input="fp32")
    x = torch.randn(3, 20)
    codes, scales = torch.full((3, 20), 255, dtype=torch.uint8), torch.zeros(3)
    found = quantize(spec, x, codes=codes, scales=scales)
    assert found[0] is codes and found[1] is scales
    assert_equal(found, expected(spec, x=x))
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


# --- what comes before: LayerNorm and GELU in float32 against float64 ----------------------------------------------


def assert_within(
    spec: QuantizeSpec, found: tuple[torch.Tensor, torch.Tensor], y: np.ndarray, error: np.ndarray
) -> float:
    """y [M, C] float64, error: bound of the kernel's y. -> share of the codes that the bound decides.

    The scale is off by the largest error of the row and one rounding of absmax and of the quotient. A quotient is off
    by its number's error and by its scale's. Codes rise with the quotient, so they lie between those of its ends.
    """
    fmt = get_format(spec.format)
    scale = np.maximum(np.abs(y).max(-1, keepdims=True), ABSMAX_FLOOR) / fmt.max_value
    worst = error.max(-1, keepdims=True) / fmt.max_value + 2 * U * scale
    assert (np.abs(found[1].numpy()[:, None] - scale) <= worst).all()
    moved = (error + np.abs(y) * worst / scale) / (scale - worst) + 2 * U * fmt.max_value
    of_byte = np.full(256, np.nan)
    of_byte[operand_bytes(spec.format)[encode(fmt, fmt.values)]] = decode(fmt, encode(fmt, fmt.values))
    value = of_byte[found[0].numpy()]
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
    ("channels", "dtype"), [(37, "fp32"), (1152, "fp16"), (1408, "bf16"), (256, "fp32"), (4608, "fp16")]
)
@pytest.mark.parametrize("name", ["E2M3", "E3M2", "E4M3", "INT8"])
def test_norm_modulate(name: str, channels: int, dtype: Any) -> None:
    spec = QuantizeSpec(name, channels, "norm_modulate", dtype)
    case = norm_case(channels, dtype)
    found = quantize(spec, **case)
    x, shift, scale = (case[key].double().numpy() for key in ("x", "shift", "scale"))
    y, error = norm_bound(x, np.repeat(1 + scale, 3, axis=0), np.repeat(shift, 3, axis=0), spec.epsilon)
    decided = assert_within(spec, found, y, error)
    assert decided > 0.99, "the bound leaves so few codes open that equality is what is tested"
    codes, _ = expected(spec, **case)
    assert (found[0].numpy() == codes).mean() >= decided


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


@pytest.mark.parametrize(("channels", "dtype"), [(37, "fp32"), (1152, "fp16"), (4608, "bf16")])
@pytest.mark.parametrize("name", ["E2M3", "E3M2", "E4M3", "INT8"])
def test_gelu(name: str, channels: int, dtype: Any) -> None:
    spec = QuantizeSpec(name, channels, "gelu", dtype)
    rng = np.random.default_rng(channels)
    x = torch.from_numpy((rng.normal(size=(5, channels)) * [[1], [0.01], [8], [300], [0]]).astype(np.float32))
    x = x.to(DTYPES[dtype])
    found = quantize(spec, x)
    decided = assert_within(spec, found, *gelu_bound(x.double().numpy()))
    assert decided > 0.99
    assert (found[0].numpy() == expected(spec, x=x)[0]).mean() >= decided
    assert found[1][4] == np.float32(ABSMAX_FLOOR) / np.float32(get_format(name).max_value)


def test_gelu_of_negative_rows() -> None:
    """Where 1 + tanh loses all digits: the codes are still GELU's own, not zeros."""
    spec = QuantizeSpec("E2M3", 16, "gelu", "fp32")
    x = -torch.linspace(5.5, 7.5, 16)[None]
    found = quantize(spec, x)
    assert_within(spec, found, *gelu_bound(x.double().numpy()))
    assert found[0].any()


# --- what is refused -----------------------------------------------------------------------------------------------

SPEC = QuantizeSpec("E2M3", 8, input="fp32")
NORM = QuantizeSpec("E2M3", 8, "norm_modulate", "fp32")
GOOD = torch.zeros(6, 8)
REFUSED = [
    (SPEC, {"x": torch.zeros(6, 9)}, r"x is torch.float32 \[6, 9\]; the kernel takes torch.float32 \[6, 8\]"),
    (SPEC, {"x": torch.zeros(8)}, r"x is torch.float32 \[8\]; the kernel takes torch.float32 \['M', 8\]"),
    (SPEC, {"x": GOOD.half()}, "x is torch.float16"),
    (SPEC, {"x": torch.zeros(8, 6).T}, r"x with strides \(1, 6\) is not contiguous; call .contiguous\(\) first"),
    (SPEC, {"x": GOOD, "shift": GOOD}, "shift and scale belong to norm_modulate; this quantizer's before is 'none'"),
    (SPEC, {"x": GOOD, "codes": torch.zeros(6, 8)}, "codes is torch.float32"),
    (SPEC, {"x": GOOD, "scales": torch.zeros(5)}, r"scales is torch.float32 \[5\]"),
    (SPEC, {"x": GOOD, "tile": RowTile(4, 2, 1)}, "a tile of 4 \\+ 2 columns is narrower than 8 channels"),
    (NORM, {"x": GOOD}, "norm_modulate needs shift and scale"),
    (NORM, {"x": GOOD, "shift": GOOD[:1], "scale": GOOD[:1]}, "tokens 0 does not divide the 6 rows"),
    (NORM, {"x": GOOD, "shift": GOOD[:1], "scale": GOOD[:1], "tokens": 4}, "tokens 4 does not divide the 6 rows"),
    (NORM, {"x": GOOD, "shift": GOOD[:2], "scale": GOOD[:1], "tokens": 3}, r"scale is torch.float32 \[1, 8\]"),
]


@pytest.mark.parametrize(("spec", "arguments", "message"), REFUSED)
def test_refused(spec: QuantizeSpec, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        quantize(spec, **arguments)


def test_rows_that_no_program_holds_are_refused() -> None:
    spec = QuantizeSpec("E2M3", row_tiles.MAX_CHANNELS + 1, input="fp32")
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
