"""Balancing: exact before quantization, one map for all readers of a tensor, statistics of layer inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export.errors import ContractError, RecipeError
from export.models.families import LAYER_KINDS
from export.models.load import LinearRef
from pipeline.calibrate import balance
from pipeline.calibrate.balance import InputMap
from pipeline.calibrate.plan import LayerPlan
from tests.support import observed
from tests.support.portable import make_linear

UNIT_ROUNDOFF = 2.0**-24  # largest relative error of one float32 operation


def plan_of(n=5, k=8, bias=True, seed=0):
    torch.manual_seed(seed)
    linear = LinearRef("block.up", "ff.in", torch.nn.Linear(k, n, bias).requires_grad_(False))
    return LayerPlan(linear, "INT4", "INT8", "per_channel", 0, (1,))


def product(plan, x):
    """x W^T + bias in float64."""
    module = plan.linear.module
    bias = 0.0 if module.bias is None else module.bias.double()
    return x.double() @ module.weight.double().T + bias


@settings(max_examples=50, deadline=None)
@given(
    balance_of=st.lists(st.floats(1e-3, 1e3), min_size=8, max_size=8),
    offset=st.lists(st.floats(-5, 5, width=32), min_size=8, max_size=8),
    bias=st.booleans(),
    shifted=st.booleans(),
)
def test_a_map_changes_the_product_by_rounding_only(balance_of, offset, bias, shifted):
    input_map = InputMap.of_balance(np.array(balance_of))
    input_map = InputMap(input_map.multiplier, np.array(offset, np.float32) if shifted else None)
    plan, x = plan_of(bias=bias), torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    before, after = product(plan, x), product(input_map.plan(plan), input_map.rows(x))
    # Rounded: x * m, + offset, the weight W / m; the bias, which is a sum of K products W' * offset. Each term of the
    # product moves by the roundoff of what was rounded, times what it meets.
    weight, moved = input_map.plan(plan).linear.module.weight.double().abs(), input_map.rows(x).double().abs()
    through = 0.0 if input_map.offset is None else torch.from_numpy(input_map.offset).double().abs()
    terms = (3 * moved + 2 * through) @ weight.T + before.abs()
    assert ((after - before).abs() <= 2 * UNIT_ROUNDOFF * terms + 1e-30).all()


def test_the_layer_says_what_was_done_to_its_input():
    codes, scales = np.zeros((5, 8), np.uint8), np.ones((5, 1), np.float32)
    base = make_linear(
        codes,
        weight_format="INT4",
        name="up",
        kind="ff.in",
        activation_format="INT8",
        granularity="per_channel",
        group_size=0,
        scales=scales,
    )
    input_map = InputMap(np.full(8, 2.0, np.float32), np.full(8, -1.0, np.float32))
    layer = input_map.layer(base)
    assert layer.input_multiplier is input_map.multiplier and layer.input_offset is input_map.offset


def test_balanced_channels_reach_the_same_on_both_sides():
    rng = np.random.default_rng(0)
    x, w = np.abs(rng.standard_normal((2, 50))) + 0.1
    b = balance.salience_balance(x, w)
    np.testing.assert_allclose(x / b, w * b, rtol=1e-12)
    np.testing.assert_allclose(x / b, np.sqrt(x * w), rtol=1e-12)
    np.testing.assert_allclose(
        balance.salience_balance(x, w, 0.3), [a**0.3 / c**0.7 for a, c in zip(x, w, strict=True)]
    )


def test_dead_channels_are_left_alone():
    b = balance.salience_balance(np.array([0.0, 4.0, 0.0, 9.0]), np.array([1.0, 0.0, 0.0, 1.0]))
    assert b.tolist() == [1, 1, 1, 3]


@pytest.mark.torch
def test_statistics_are_those_of_every_call():
    _, unit = observed.make("ptq4dit")
    peaks = balance.input_statistics(unit.observed, balance.channel_peaks)
    for plan in unit.plans:
        inputs = unit.observed.layer_inputs(plan.name)
        expected = [[max(abs(float(v)) for v in x[:, c]) for c in range(x.shape[1])] for x in inputs]
        np.testing.assert_array_equal(peaks[plan.name], expected)
    weights = [plan.linear.module.weight.numpy() for plan in unit.plans[:3]]
    expected = [max(abs(float(v)) for w in weights for v in w[:, c]) for c in range(observed.WIDTH)]
    np.testing.assert_array_equal(balance.weight_peaks(unit.plans[:3]), expected)


@pytest.mark.torch
def test_layers_that_read_the_same_tensor_are_found():
    _, unit = observed.make("ptq4dit")
    groups = balance.readers(unit.observed, unit.plans, 3)
    assert [[plan.name.removeprefix("blocks.0.") for plan in group] for group in groups] == [
        ["to_q", "to_k", "to_v"],
        ["to_out"],
        ["up"],
        ["down"],
    ]


def test_kinds_are_read_from_text():
    assert balance.kinds("attn.qkv, ff.in") == ("attn.qkv", "ff.in")
    assert balance.kinds("all") == LAYER_KINDS and balance.kinds("") == ()
    with pytest.raises(RecipeError, match=r"layer kind 'attn' is unknown; use attn.qkv, attn.out"):
        balance.kinds("attn")


def test_refusals():
    with pytest.raises(ContractError, match="input multiplier of channel 1 is 0"):
        InputMap(np.array([1, 0, 2], np.float32))
    with pytest.raises(ContractError, match="input multiplier must be finite float32"):
        InputMap(np.array([1, np.inf], np.float32))
    with pytest.raises(ContractError, match="input offset must be finite float32, found float64"):
        InputMap(np.ones(2, np.float32), np.ones(2))
    with pytest.raises(ContractError, match=r"block.up: balance of 3 channels, K=8"):
        InputMap(np.ones(3, np.float32)).plan(plan_of())
