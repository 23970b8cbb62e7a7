"""GPU kernels on INT8 operands under Triton's interpreter: codes, sums and outputs are the reference's, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export.errors import RecipeError
from export.formats.format import get_format
from plugins.gpu import launch
from plugins.gpu.promotion import Promotion, promotion_of
from plugins.gpu.reference import expand
from plugins.gpu.spec import GemmSpec, QuantizeSpec, operand_bytes
from plugins.gpu.table import kernel
from plugins.gpu.tile_table import Tile
from plugins.gpu.tiles import gemm_constants, gemm_tile
from tests.support.gpu_gemms import case, finite_codes, reference, run, stored, tensor

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("interpreter")]
SMALL = Tile(16, 32, 64, 4, 2)
MULTIPLIERS = (1, 2, 3, 4, 5, 6, 8, 10)
ACTIVATIONS = ("E2M1", "E2M3", "INT4", "INT6", "INT8", "UE1M3", "UE2M2", "UE1M5", "UE2M4")
WEIGHTS = ("E2M1", "E1M2", "E3M0", "INT4", "UE1M3", "UE2M2")
# Operands and weights are decoded apart from each other: every format of each is here once.
PAIRS = list(zip(ACTIVATIONS, cycle(WEIGHTS), strict=False))


def integers(activation: str = "E2M3", weight: str = "E2M1", k: int = 64, n: int = 21, *rest: Any, **named: Any) -> Any:
    return GemmSpec(activation, weight, k, n, *rest, **{"output": "fp32", "integers": True, **named})


def assert_reference(spec: GemmSpec, m: int, tile: Tile | None = None, seed: int = 0) -> None:
    """Packed, expanded, and expanded first give the reference's bits."""
    arrays = case(spec, m, seed)
    expected = stored(reference(spec, arrays), spec.output)
    for way in ({}, {"expanded": True}, {"expand_first": True}):
        np.testing.assert_array_equal(run(spec, arrays, tile, **way), expected, err_msg=str(way))


@pytest.mark.parametrize(("activation", "weight"), PAIRS)
def test_every_pair_of_codes(activation: str, weight: str) -> None:
    """One product each of every operand byte with every nibble, low and high: the values' product, exactly."""
    codes = finite_codes(activation)
    a = np.zeros((2 * len(codes), 2), np.uint8)
    a[: len(codes), 0], a[len(codes) :, 1] = codes, codes
    nibbles = np.arange(16, dtype=np.uint8)
    arrays = {"a": operand_bytes(activation, True)[a], "a_scale": np.ones(len(a), np.float32)}
    arrays |= {"w": (nibbles * 17)[:, None].copy(), "w_scales": np.ones((16, 1), np.float32)}
    arrays |= {"bias": np.zeros(16, np.float32)}
    products = run(integers(activation, weight, 2, 16), arrays, Tile(512, 16, 32, 4, 2))
    expected = get_format(activation).values[codes][:, None] * get_format(weight).values[nibbles]
    np.testing.assert_array_equal(products, np.concatenate([expected, expected]).astype(np.float32))


@pytest.mark.parametrize(("activation", "weight"), list(zip(reversed(ACTIVATIONS), cycle(WEIGHTS), strict=False)))
def test_formats(activation: str, weight: str) -> None:
    assert_reference(integers(activation, weight), 7, SMALL)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 70), st.integers(0, 10**6), st.booleans())
def test_any_shape(m: int, n: int, pairs: int, seed: int, weights_first: bool) -> None:
    tile = Tile(16, 16, 64, 4, 2, splits=1 + seed % 2, weights_first=weights_first)
    assert_reference(integers(k=2 * pairs, n=n), m, tile, seed)


@pytest.mark.parametrize(("k", "group"), [(256, 128), (128, 32), (144, 48), (132, 22), (192, 64)])
def test_multipliers_and_real_groups(k: int, group: int) -> None:
    """Groups' sums are exact either way, so what follows them in float32 is that of the FP8 operands, bit for bit."""
    assert_reference(integers("E2M3", "E2M1", k, 21, group, MULTIPLIERS), 9, SMALL)
    spec = integers("E2M3", "E2M1", k, 21, group, (1, 3), real_groups=True)
    arrays = case(spec, 9)
    floats = arrays | {"a": operand_bytes("E2M3")[arrays["codes"]]}
    for expanded in (False, True):
        result = run(spec, arrays, SMALL, expanded=expanded)
        np.testing.assert_array_equal(result, run(replace(spec, integers=False), floats, SMALL, expanded=expanded))


def test_sums_that_no_float32_holds_are_rounded_once() -> None:
    """127 * 120 * 2304 is beyond 2^24: the exact sum of all products, and then its float32."""
    spec = integers("INT8", "E2M1", 2304, 5, 256, MULTIPLIERS)
    arrays = case(spec, 3, seed=1)
    arrays["a"][0], arrays["w"][0] = operand_bytes("INT8")[127], 0x77
    arrays["multiplier_codes"][0, :-1], arrays["multiplier_codes"][0, -1] = 0x77, 0x00
    arrays["w"][0, -1] = 0x71  # one odd product, 127 * 1
    (w,) = expand(spec, arrays["w"], arrays["multiplier_codes"])
    image, unit = w.view(np.int8).astype(np.int64), np.float32(0.5)
    sums = arrays["a"].view(np.int8).astype(np.int64) @ image.T
    assert abs(sums[0, 0]) > 2**24 and sums[0, 0] != np.float32(sums[0, 0])
    expected = sums.astype(np.float32) * unit * arrays["w_scales"][:, 0] * arrays["a_scale"][:, None] + arrays["bias"]
    for expanded in (False, True):
        np.testing.assert_array_equal(run(spec, arrays, SMALL, expanded=expanded), expected)


@pytest.mark.parametrize("output", ["fp16", "bf16", "fp32"])
def test_zero_point_gate_and_residual(output: Any) -> None:
    spec = integers("UE2M4", "E2M1", 96, 35, zero_point=True, epilogue="gate_residual", output=output)
    arrays = case(spec, 6, tokens=2)
    plain = run(replace(spec, integers=False), arrays | {"a": operand_bytes("UE2M4")[arrays["codes"]]}, tokens=2)
    np.testing.assert_array_equal(run(spec, arrays, tokens=2), plain)


def test_integer_formats_take_int8_tensor_cores_by_themselves() -> None:
    for activation, weight in (("INT8", "INT4"), ("INT6", "E2M1"), ("INT4", "E3M0")):
        spec = GemmSpec(activation, weight, 1152, 64)
        assert (
            spec.multiplies_integers
            and gemm_constants(spec, gemm_tile("packed_gemm", spec, 64, 90), 90)["OPERANDS"].TYPE == "int8"
        )
        assert promotion_of(spec, fp8=False, architecture=90) == Promotion(0, "exact")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("E3M2", "E2M1"), r"E3M2 does not embed in INT8 \(its largest integer is 448\); use FP8 operands"),
        (("E2M3", "UE3M1"), "weights in UE3M1 times 1, 64 input channels: INT8 operands take integers up to 127"),
        (("E2M3", "E3M0", 64, 8, 16, (1, 2)), "weights in E3M0 times 2, 64 input channels"),
        (("INT8", "E3M0", 2**19, 8), r"524288 input channels: .* sums below 2\^31; use FP8 operands"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        integers(*arguments)


@pytest.mark.parametrize("before", ["none", "gelu", "norm_modulate"])
@pytest.mark.parametrize("name", ["E2M1", "E2M3", "INT6", "UE2M4"])
def test_quantizers_write_images(name: str, before: Any) -> None:
    spec = QuantizeSpec(name, 72, before, "fp32", integers=True)
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((6, 72)) * np.logspace(-3, 3, 6)[:, None]).astype(np.float32)
    extra = {"shift": x[:2] / 3, "scale": x[2:4] / 7} if before == "norm_modulate" else {}
    modulation = {key: tensor(value.copy()) for key, value in extra.items()}
    sizes = {"tokens": 3} if extra else {}
    codes, scales = launch.quantize(spec, tensor(x), **modulation, **sizes)
    floats, float_scales = launch.quantize(replace(spec, integers=False), tensor(x), **modulation, **sizes)
    image_of = dict(zip(operand_bytes(name).tolist(), operand_bytes(name, True).view(np.int8).tolist(), strict=True))
    assert codes.view(torch.int8).tolist() == [[image_of[byte] for byte in row] for row in floats.tolist()]
    assert torch.equal(scales, float_scales)
    if before == "none":
        expected, expected_scale = kernel("quantize").reference(spec, x)
        np.testing.assert_array_equal(codes.numpy(), expected)
        np.testing.assert_array_equal(scales.numpy(), expected_scale)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_expanded_bytes_are_images(weight: str) -> None:
    multipliers = MULTIPLIERS if weight == "E2M1" else (1,)
    spec = integers("E2M3", weight, 96, 7, 48, multipliers)
    arrays = case(spec, 1)
    codes = arrays.get("multiplier_codes")
    images = launch.expand(spec, tensor(arrays["w"]), multiplier_codes=None if codes is None else tensor(codes))
    np.testing.assert_array_equal(images.numpy(), expand(spec, arrays["w"], codes)[0])
    assert spec.multiplies_integers and images.view(torch.int8).abs().max() <= 120
