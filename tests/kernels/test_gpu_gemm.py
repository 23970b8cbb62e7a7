"""GPU GEMM kernels under Triton's interpreter: sums are exact, outputs the reference's, or off by derived roundings.

Where the sum is exact in float32 and the epilogue multiplies and adds in the reference's order, the kernel's bits are
the reference's. (On a GPU a product and a sum may become one operation, with one rounding less.)
"""

from __future__ import annotations

from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export.formats.format import get_format, pack
from plugins.gpu import launch
from plugins.gpu.promotion import promotion_of
from plugins.gpu.spec import GemmSpec, operand_bytes
from plugins.gpu.table import kernel
from plugins.gpu.tile_table import Tile
from plugins.gpu.tiles import ReduceTile, packed_constants
from tests.support.gpu_gemms import EPS, case, exact, finite_codes, reference, run, stored, tensor

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("interpreter")]
SMALL = Tile(16, 32, 64, 4, 2)
FP16, FP8 = 80, 90  # compute capabilities without and with FP8 tensor cores
MULTIPLIERS = (1, 2, 3, 4, 5, 6, 8, 10)
ACTIVATIONS = ("E2M1", "E2M3", "E3M2", "E3M4", "E4M3", "E5M2", "INT4", "INT6", "INT8", "UE2M2", "UE2M4", "UE3M5")
WEIGHTS = ("E2M1", "E1M2", "E3M0", "INT4", "UE2M2")
# Operands and weights are decoded apart from each other: every format of each is here once, on both tensor cores.
PAIRS = list(zip(ACTIVATIONS, cycle(WEIGHTS), strict=False))
OPERANDS = ("E2M1", "E2M3", "E3M2", "INT6", "INT8", "UE2M2", "E3M4")
# (tensor cores, weights expanded before): decoding and multiplying know nothing of each other, so that a case takes two
# of the four, in turn with the next.
Ways = tuple[tuple[int, bool], ...]
WAYS: tuple[Ways, ...] = (((FP16, False), (FP8, True)), ((FP16, True), (FP8, False)))


def assert_bits(result: np.ndarray, expected: np.ndarray, output: str = "fp32") -> None:
    np.testing.assert_array_equal(result, stored(expected, output))


# --- codes and formats -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sm", [FP16, FP8])
@pytest.mark.parametrize(("activation", "weight"), PAIRS)
def test_every_pair_of_codes(activation: str, weight: str, sm: int) -> None:
    """One product each of every operand byte with every nibble, low and high: the values' product, exactly."""
    codes = finite_codes(activation)
    a = np.zeros((2 * len(codes), 2), np.uint8)
    a[: len(codes), 0], a[len(codes) :, 1] = codes, codes
    nibbles = np.arange(16, dtype=np.uint8)
    spec = GemmSpec(activation, weight, 2, 16, output="fp32")
    ones, bias = np.ones((16, 1), np.float32), np.zeros(16, np.float32)
    arrays = {"a": operand_bytes(activation)[a], "a_scale": np.ones(len(a), np.float32), "w": nibbles * 17}
    arrays = {**arrays, "w": arrays["w"][:, None].copy(), "w_scales": ones, "bias": bias}
    products = run(spec, arrays, Tile(512, 16, 32, 4, 2), sm)
    expected = get_format(activation).values[codes][:, None] * get_format(weight).values[nibbles]
    assert_bits(products, np.concatenate([expected, expected]).astype(np.float32))


@pytest.mark.parametrize(
    ("activation", "weight", "ways"),
    list(zip(OPERANDS, cycle(reversed(WEIGHTS)), cycle(WAYS), strict=False)),
)
def test_formats(activation: str, weight: str, ways: Ways) -> None:
    """Sums stay below 2^24 units here, so they are exact whatever they are added up in."""
    spec = GemmSpec(activation, weight, 64, 21, output="fp32")
    assert promotion_of(spec, fp8=False, architecture=80).holds == "exact"
    arrays = case(spec, 7)
    expected = reference(spec, arrays)
    y, size = exact(spec, arrays)
    assert (np.abs(expected - y) <= 4 * EPS * size).all(), "scale twice, the sum's own rounding, bias"
    for sm, expanded in ways:
        assert_bits(run(spec, arrays, SMALL, sm, expanded=expanded), expected)


@pytest.mark.parametrize(
    ("activation", "weight", "k"), [("E3M4", "E2M1", 1152), ("E4M3", "E2M1", 96), ("E4M3", "E3M0", 96)]
)
def test_sums_that_no_float32_holds(activation: str, weight: str, k: int) -> None:
    """Beyond 2^24 units each of K additions may round, by EPS of a partial sum that the magnitudes' sum bounds."""
    spec = GemmSpec(activation, weight, k, 5, output="fp32")
    arrays = case(spec, 3)
    y, size = exact(spec, arrays)
    for sm in (FP16, FP8):
        assert (np.abs(run(spec, arrays, SMALL, sm) - y) <= (k + 4) * EPS * size).all()


# --- shapes ----------------------------------------------------------------------------------------------------------

SHAPES = [(1, 1, 2), (3, 17, 66), (33, 35, 130), (16, 32, 64), (17, 33, 192), (2, 5, 100)]


@pytest.mark.parametrize(
    ("shape", "weights_first", "ways"),
    list(zip(SHAPES, cycle([False, True]), cycle([*WAYS, *WAYS[::-1]]), strict=False)),
)
def test_shapes(shape: tuple[int, int, int], weights_first: bool, ways: Ways) -> None:
    m, n, k = shape
    spec = GemmSpec("E2M3", "E2M1", k, n, output="fp32")
    arrays = case(spec, m, seed=k)
    tile = Tile(16, 16, 64, 4, 2, band=2, weights_first=weights_first)
    for sm, expanded in ways:
        assert_bits(run(spec, arrays, tile, sm, expanded=expanded), reference(spec, arrays))


@pytest.mark.parametrize("splits", [2, 3, 8])
@pytest.mark.parametrize("expanded", [False, True])
def test_splits_change_nothing(splits: int, expanded: bool) -> None:
    """Parts of an exact sum are exact, and so is their sum. More splits than steps leave some without any."""
    spec = GemmSpec("E2M3", "E2M1", 320, 35, output="fp32")
    arrays = case(spec, 19)
    once = run(spec, arrays, SMALL, expanded=expanded)
    assert_bits(run(spec, arrays, Tile(16, 32, 64, 4, 2, splits=splits), expanded=expanded), once)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 70), st.integers(0, 10**6), st.booleans())
def test_any_shape(m: int, n: int, pairs: int, seed: int, weights_first: bool) -> None:
    spec = GemmSpec("E2M3", "E1M2", 2 * pairs, n, output="fp32")
    arrays = case(spec, m, seed)
    tile = Tile(16, 16, 64, 4, 2, splits=1 + seed % 2, weights_first=weights_first)
    assert_bits(run(spec, arrays, tile), reference(spec, arrays))


def test_the_chosen_tile() -> None:
    spec = GemmSpec("E2M3", "E2M1", 1152, 130, 64, MULTIPLIERS, output="fp32")
    arrays = case(spec, 20)
    for expanded in (False, True):
        assert_bits(run(spec, arrays, expanded=expanded), reference(spec, arrays))


@pytest.mark.parametrize("multipliers", [(1,), MULTIPLIERS])
@pytest.mark.parametrize("real_groups", [False, True])
def test_expanding_first_changes_nothing(multipliers: tuple[int, ...], real_groups: bool) -> None:
    spec = GemmSpec("E2M3", "E2M1", 128, 35, 64, multipliers, real_groups=real_groups, output="fp32")
    arrays = case(spec, 19)
    for sm in (FP16, FP8):
        assert_bits(run(spec, arrays, sm=sm, expand_first=True), run(spec, arrays, sm=sm, expand_first=False))


def test_many_tokens_expand_the_weight_first(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = GemmSpec("E2M3", "E2M1", 64, 16, 64, MULTIPLIERS, output="fp32")
    arrays, calls = case(spec, 3), []
    monkeypatch.setattr(launch.tiles, "expands_first", lambda *call: calls.append(call) or True)
    monkeypatch.setattr(
        launch, "expand", lambda *call, of=launch.expand, **named: calls.append(call) or of(*call, **named)
    )
    assert_bits(run(spec, arrays), reference(spec, arrays))
    assert calls[0] == (spec, 3, 0) and calls[1][0] is spec
    del calls[:]
    run(spec, arrays, SMALL)
    assert not calls, "a given tile is one of the kernel that decodes in registers"


def test_no_rows() -> None:
    spec = GemmSpec("E2M3", "E2M1", 64, 8)
    arrays = {name: value[:0] if name in ("a", "a_scale") else value for name, value in case(spec, 2).items()}
    assert run(spec, arrays).shape == (0, 8)


# --- groups ----------------------------------------------------------------------------------------------------------

# (K, group, step): whole steps in a group, whole groups in a step, neither, groups of 2 mod 4, an odd number of groups
GROUPS = [(256, 128, 64), (128, 32, 64), (144, 48, 64), (96, 16, 32), (132, 22, 32), (192, 64, 64), (120, 24, 64)]
MULTIPLIED = [("E2M1", MULTIPLIERS), ("E1M2", (1, 2, 4)), ("E3M0", (1, 3, 7, 15)), ("INT4", (1, 2))]


@pytest.mark.parametrize(("groups", "weights", "ways"), list(zip(GROUPS, cycle(MULTIPLIED), cycle(WAYS), strict=False)))
def test_multipliers(groups: tuple[int, int, int], weights: tuple[str, tuple[int, ...]], ways: Ways) -> None:
    (k, group, step), (weight, multipliers) = groups, weights
    spec = GemmSpec("E2M3", weight, k, 9, group, multipliers, output="fp32")
    arrays = case(spec, 5, seed=group)
    expected = reference(spec, arrays)
    tile = Tile(16, 16, step, 4, 2, weights_first=group % 3 == 0)
    for sm, expanded in ways:
        assert_bits(run(spec, arrays, tile, sm, expanded=expanded), expected)
        factor = packed_constants(spec, tile, sm)["OPERANDS"].FACTOR
        assert factor == ("multiplier" if sm == FP8 and group % step == 0 else "none")


def test_sixteen_multipliers() -> None:
    """Indices above 7 come from the second half of the table."""
    table = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 1, 2, 3, 4)
    spec = GemmSpec("E2M1", "E2M1", 128, 33, 16, table, output="fp32")
    arrays = case(spec, 4)
    assert_bits(run(spec, arrays, SMALL), reference(spec, arrays))


@pytest.mark.parametrize(
    ("groups", "multipliers", "ways"),
    list(zip(GROUPS, cycle([(1,), (1, 3)]), cycle([*WAYS, *WAYS[::-1]]), strict=False)),
)
def test_real_groups(groups: tuple[int, int, int], multipliers: tuple[int, ...], ways: Ways) -> None:
    """Each step is scaled (a rounding) and added (another); then the token's scale, and the bias."""
    k, group, step = groups
    spec = GemmSpec("E2M3", "E2M1", k, 9, group, multipliers, real_groups=True, output="fp32")
    arrays = case(spec, 5, seed=group)
    y, size = exact(spec, arrays)
    for sm, expanded in ways:
        tile = Tile(16, 16, step, 4, 2, weights_first=not expanded)
        result = run(spec, arrays, tile, sm, expanded=expanded)
        steps = spec.groups * -(-group // step)
        assert (np.abs(result - y) <= (2 * steps + 2) * EPS * size).all()


# --- epilogues and outputs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("epilogue", ["none", "gate_residual"])
@pytest.mark.parametrize("zero_point", [False, True])
def test_epilogues_round_as_their_reference(output: Any, epilogue: Any, zero_point: bool) -> None:
    activation = "UE2M2" if zero_point else "E2M3"
    spec = GemmSpec(activation, "E2M1", 64, 37, zero_point=zero_point, epilogue=epilogue, output=output)
    arrays = case(spec, 18, tokens=6)
    expected = reference(spec, arrays, tokens=6)
    with np.errstate(over="ignore"):  # the token and the channel with large scales pass fp16's range
        for splits in (1, 2):
            assert_bits(run(spec, arrays, Tile(16, 32, 32, 4, 2, splits=splits), tokens=6), expected, output)


@pytest.mark.fast
def test_one_gate_for_many_tokens() -> None:
    """Rows of one sample, of several, and a tile that spans samples."""
    for tokens in (1, 3, 24):
        spec = GemmSpec("E2M3", "E2M1", 32, 8, epilogue="gate_residual", output="fp32")
        arrays = case(spec, 24, tokens=tokens)
        tile = Tile(16, 16, 32, 4, 2)
        assert_bits(run(spec, arrays, tile, tokens=tokens), reference(spec, arrays, tokens=tokens))


@pytest.mark.parametrize("groups", [0, 32])
def test_parts_of_a_sum_are_added_in_their_order(groups: int) -> None:
    """Any float32 parts, then scales, zero point, gate and residual: the reference's float32 steps, bit for bit."""
    spec = GemmSpec(
        *("UE2M4", "E2M1", 64, 35, groups), real_groups=groups > 0, zero_point=True, epilogue="gate_residual",
        output="fp32",
    )  # fmt: skip
    row, arrays = kernel("reduce_splits"), case(spec, 20, tokens=2)
    parts = np.random.default_rng(0).standard_normal((3, 20, 35)).astype(np.float32) ** 5
    names = [argument.name for argument in row.arguments_of(spec) if argument.role == "input"]
    inputs = {name: parts if name == "parts" else arrays[name] for name in names}
    y, sizes = torch.empty(20, 35), {"M": 20, "tokens": 2}
    tensors = {name: tensor(array) for name, array in inputs.items()}
    launch.run(row, spec, ReduceTile(3), 20, 0, {**tensors, **sizes, "y": y})
    assert_bits(y.numpy(), row.reference(spec, **inputs, **sizes)[0])


# --- broken and empty tokens -----------------------------------------------------------------------------------------


def test_a_token_of_zeros_gives_the_bias_and_a_broken_one_stays_alone() -> None:
    spec = GemmSpec("E2M3", "E2M1", 96, 12, output="fp32")
    arrays = case(spec, 9)
    healthy = run(spec, arrays, SMALL)
    assert_bits(healthy[4], arrays["bias"])
    arrays["a_scale"][2], arrays["a"][2] = np.nan, 0
    broken = run(spec, arrays, SMALL)
    assert np.isnan(broken[2]).all()
    assert_bits(np.delete(broken, 2, axis=0), np.delete(healthy, 2, axis=0))


def test_an_outlier_keeps_its_value() -> None:
    """A single largest number among zeros, times every weight: nothing else may show."""
    spec = GemmSpec("E2M3", "E2M1", 128, 16, output="fp32")
    arrays = case(spec, 3)
    top = get_format("E2M3").max_code
    arrays["codes"][:] = 0
    arrays["codes"][0, 77] = top
    arrays["a"] = operand_bytes("E2M3")[arrays["codes"]]
    assert_bits(run(spec, arrays, SMALL), reference(spec, arrays))
    weights = np.arange(16, dtype=np.uint8)[:, None].repeat(128, axis=1)
    arrays |= {"w": pack(weights, 4), "bias": np.zeros(16, np.float32)}
    y = run(spec, arrays, SMALL)
    values = get_format("E2M1").values * 7.5
    assert_bits(y[0], (values.astype(np.float32) * arrays["w_scales"][:, 0]) * arrays["a_scale"][0])


# --- promotion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("activation", "multipliers"), [("E3M2", (1,)), ("E2M3", MULTIPLIERS), ("E4M3", (1,))])
def test_promoted_sums(activation: str, multipliers: tuple[int, ...]) -> None:
    spec = GemmSpec(activation, "E2M1", 256, 17, 16 if len(multipliers) > 1 else 0, multipliers, output="fp32")
    tile = Tile(16, 32, 64, 4, 2)
    assert packed_constants(spec, tile, FP8)["OPERANDS"].PROMOTE > 0
    arrays = case(spec, 6)
    y, size = exact(spec, arrays)
    result = run(spec, arrays, tile, FP8)
    if activation == "E4M3":
        assert (np.abs(result - y) <= (256 + 4) * EPS * size).all()
    else:
        assert_bits(result, reference(spec, arrays))
