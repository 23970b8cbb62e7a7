"""The oracle of a layer's activation codes: right by definition, and no wider than float32 roundings make it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from export.checkpoint import QuantizedLinear
from export.formats.format import get_format, quantize, to_integers
from pipeline.verify.oracle import LinearProbe, activation_oracle, check_linear
from tests.support import learned
from tests.support.portable import random_linear

CASES: dict[str, Any] = {
    "token": lambda one: one,
    "per_tensor": lambda one: learned.with_scaling(one, "per_tensor"),
    "zero": lambda one: learned.with_scaling(one, "zero"),
    "token_group": lambda one: learned.with_scaling(one, "token_group", 16),
    "balance": learned.with_balance,
    "balanced groups": lambda one: learned.with_balance(learned.with_scaling(one, "token_group", 16)),
    "balanced zero": lambda one: learned.with_balance(learned.with_scaling(one, "zero")),
}


def inputs(rows: int = 40) -> Any:
    return np.random.default_rng(0).normal(size=(rows, 64)).astype(np.float32)


def slow_images(layer: QuantizedLinear, x: Any) -> tuple[Any, Any]:
    """(images, scales [M, groups]) token by token and group by group in float64."""
    fmt, group = get_format(layer.activation_format), layer.activation_group or layer.in_features
    zero = 0.0 if layer.activation_zero is None else float(layer.activation_zero[0])
    images, scales = np.zeros(x.shape, int), np.zeros((len(x), layer.activation_groups))
    for m, token in enumerate(x.astype(np.float64)):
        balanced = token if layer.input_multiplier is None else token * layer.input_multiplier.astype(np.float64)
        balanced = balanced if layer.input_offset is None else balanced + layer.input_offset.astype(np.float64)
        for g in range(layer.activation_groups):
            part = slice(g * group, (g + 1) * group)
            static = layer.activation_scale
            scale = np.abs(balanced[part]).max() / fmt.max_value if static is None else float(static[0])
            u = (balanced[part] - zero) / scale
            images[m, part], scales[m, g] = (
                to_integers(fmt, quantize(fmt, u if fmt.sign_bits else np.maximum(u, 0))),
                scale,
            )
    return images, scales


@pytest.mark.parametrize("what", CASES)
def test_images_and_scales_are_those_of_the_definition(what: str) -> None:
    layer, x = CASES[what](random_linear()), inputs()
    oracle = activation_oracle(x, layer)
    images, scales = slow_images(layer, x)
    np.testing.assert_array_equal(oracle.integers, images)
    np.testing.assert_allclose(oracle.scale, scales, rtol=1e-15)
    assert oracle.integers.shape == x.shape == oracle.lowest.shape and oracle.scale.shape == scales.shape
    assert ((oracle.lowest <= oracle.integers) & (oracle.integers <= oracle.highest)).all()
    assert oracle.ambiguous <= 2  # of 2560 codes: a quotient within some 2^-22 of a midpoint is rare


@pytest.mark.parametrize("what", CASES)
def test_float32_codes_lie_within_it(what: str) -> None:
    """Two float32 forms: with a division, and with a multiplication by the inverse."""
    layer, x = CASES[what](random_linear()), inputs(400)
    fmt, oracle = get_format(layer.activation_format), activation_oracle(x, layer)
    y = x if layer.input_multiplier is None else x * layer.input_multiplier
    y = y if layer.input_offset is None else y + layer.input_offset
    rows = y.reshape(len(x) * layer.activation_groups, -1)
    scale = np.abs(rows).max(1, keepdims=True) / np.float32(fmt.max_value)
    if layer.activation_scale is not None:
        rows, scale = rows - (layer.activation_zero or np.float32([0])), layer.activation_scale[None]
    for quotient in (rows / scale, rows * (np.float32(1) / scale)):
        assert quotient.dtype == np.float32
        images = to_integers(fmt, quantize(fmt, quotient if fmt.sign_bits else np.maximum(quotient, 0))).reshape(
            x.shape
        )
        assert ((oracle.lowest <= images) & (images <= oracle.highest)).all()


WRONG: dict[str, dict[str, Any]] = {
    "per_tensor": {"activation_scale": np.float32([0.4004])},
    "zero": {"activation_zero": np.float32([-0.201])},
    "token_group": {"activation_group": 32},
    "balance": {"input_offset": np.zeros(64, np.float32)},
}


@pytest.mark.parametrize("what", WRONG)
def test_slightly_wrong_parameters_give_inadmissible_codes(what: str) -> None:
    layer, x = CASES[what](random_linear()), inputs(400)
    wrong = activation_oracle(x, replace(layer, **WRONG[what]))
    right = activation_oracle(x, layer)
    product = np.zeros((len(x), 16))
    probe = LinearProbe(x, wrong.integers, None, product, output=product, exact=False)
    assert check_linear(layer, probe, right).codes_inadmissible > 0
    assert check_linear(layer, replace(probe, integers=right.integers), right).codes_inadmissible == 0
