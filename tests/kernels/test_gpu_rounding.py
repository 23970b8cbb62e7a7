"""Division and rounding of the GPU quantizers, interpreted, against NumPy: bit for bit, at every place where it can go
wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from export.formats.format import FORMATS, Format, get_format, quantize
from plugins.gpu.spec import operand_bytes
from plugins.gpu.tiles import rounding_grid

triton = pytest.importorskip("triton", reason="the GPU kernels need triton")
tl = triton.language

from plugins.gpu.quantize import grid_to_byte, quotient, reciprocal_parts, round_to_grid  # noqa: E402

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("interpreter")]
INTERPRETED, CONVERTED = 0, 90  # with bit operations; with the hardware's conversion to E4M3 where there is one


def divide(y, s, out, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, COUNT)
    up, divisor, high, low = reciprocal_parts(tl.load(s + at))
    tl.store(out + at, quotient(tl.load(y + at), up, divisor, high, low))


def to_bytes(q, out, COUNT: tl.constexpr, GRID: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, COUNT)
    tl.store(out + at, grid_to_byte(round_to_grid(tl.load(q + at), GRID), GRID))


def run(function: Callable[..., None], inputs: list[np.ndarray], dtype: torch.dtype, **constants: Any) -> np.ndarray:
    """One program over all numbers, padded to a power of two with ones."""
    from triton.runtime.interpreter import InterpretedFunction

    count = len(inputs[0])
    padded = 1 << (count - 1).bit_length()
    tensors = [torch.from_numpy(np.pad(x, (0, padded - count), constant_values=1)) for x in inputs]
    out = torch.empty(padded, dtype=dtype)
    InterpretedFunction(function)[(1,)](*tensors, out, COUNT=padded, **constants)
    return out.numpy()[:count]


def midpoints(fmt: Format) -> np.ndarray:
    grid = np.unique(np.abs(fmt.values[np.isfinite(fmt.values)]))
    return ((grid[1:] + grid[:-1]) / 2).astype(np.float32)


def neighbours(x: np.ndarray, reach: int) -> np.ndarray:
    """Every float32 up to `reach` steps away from the numbers of x, and their opposites."""
    bits = x.astype(np.float32).view(np.int32)
    near = (bits[:, None] + np.arange(-reach, reach + 1)).clip(0).astype(np.int32).view(np.float32).ravel()
    return np.concatenate([near, -near])


def test_quotients_of_any_numbers() -> None:
    """All binades of a scale that a float32 absmax can give; y up to 2^9 scales."""
    rng = np.random.default_rng(0)
    count = 1 << 17
    s = np.ldexp(rng.uniform(1, 2, count), rng.integers(-109, 126, count)).astype(np.float32)
    y = (s.astype(np.float64) * rng.uniform(-1, 1, count) * 2.0 ** rng.integers(-20, 9, count)).clip(-3e38, 3e38)
    y = y.astype(np.float32)
    np.testing.assert_array_equal(run(divide, [y, s], torch.float32), y / s)


def test_quotients_next_to_every_midpoint() -> None:
    """The float32 quotient decides a tie, so its last bit counts there: y = midpoint * scale and its neighbours."""
    rng = np.random.default_rng(1)
    ties = np.unique(np.concatenate([midpoints(get_format(name)) for name in FORMATS]))
    scales = np.ldexp(rng.uniform(1, 2, 40), rng.integers(-100, 110, 40)).astype(np.float32)
    near = np.concatenate([neighbours(np.abs(ties * s), 3) for s in scales])
    s = np.repeat(scales, len(near) // len(scales))
    np.testing.assert_array_equal(run(divide, [near, s], torch.float32), near / s)


def test_quotients_by_the_hardest_divisors() -> None:
    """Significands of all zeros and all ones and next to them, where reciprocals round worst."""
    fields = np.array([0, 1, 2, 3, 2**23 - 1, 2**23 - 2, 2**23 - 3, 2**22, 2**22 - 1, 2**22 + 1], np.int32)
    s = (fields + (127 << 23)).astype(np.int32).view(np.float32)
    y, s = (axis.ravel() for axis in np.meshgrid(neighbours(s * 3, 50), s))
    np.testing.assert_array_equal(run(divide, [y, s], torch.float32), y / s)


@pytest.mark.parametrize("sm", [INTERPRETED, CONVERTED])
@pytest.mark.parametrize("name", FORMATS)
def test_every_grid_point_midpoint_and_neighbour(name: str, sm: int) -> None:
    """Exhaustive where rounding changes, random elsewhere, both signs, both zeros, up to the largest quotient."""
    fmt = get_format(name)
    grid = np.abs(fmt.values[np.isfinite(fmt.values)]).astype(np.float32)
    rng = np.random.default_rng(2)
    spread = np.ldexp(rng.uniform(1, 2, 4000), rng.integers(-40, 9, 4000)).astype(np.float32)
    q = np.concatenate([neighbours(midpoints(fmt), 4), neighbours(grid, 4), spread, -spread, np.float32([0.0, -0.0])])
    q = q[np.abs(q) <= fmt.max_value * (1 + 2.0**-22)]
    result = run(to_bytes, [q], torch.uint8, GRID=rounding_grid(name, sm))
    np.testing.assert_array_equal(result, operand_bytes(name)[quantize(fmt, q)])
