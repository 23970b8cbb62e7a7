"""AWQ and SVDQuant: what the search chooses, and that the branch and the rest make up the weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from export.errors import RecipeError
from pipeline.calibrate.balance import InputMap
from pipeline.calibrate.methods.rtn import quantize_linear
from pipeline.calibrate.methods.svdquant import branch
from tests.support import learned, observed

FLOATS = ("formats.weight=E2M1", "formats.activation=E2M3", "weights.granularity=group", "weights.group_size=8")
METHODS = ("awq", "svdquant")
RANK = 4  # of widths 16 and 32


def made(name: str, *settings: str) -> tuple[Any, Any, dict[str, Any]]:
    """(the method, its unit, the layers by name)."""
    rank = (f"calibrate.options.rank={RANK}",) if name == "svdquant" else ()
    method, unit = observed.make(name, *FLOATS, *rank, *settings)
    return method, unit, {layer.name: layer for layer in method.quantize(unit)}


def error(layer: Any, plan: Any, x: torch.Tensor) -> float:
    """Squared error of the layer's outputs for rows x, computed token by token in float64."""
    output = learned.expected_output(layer, x[None].numpy(), [0.0])[0]
    weight, bias = (part.double().numpy() for part in (plan.linear.module.weight, plan.linear.module.bias))
    return float(np.square(output - (x.double().numpy() @ weight.T + bias)).sum())


@pytest.mark.parametrize("name", METHODS)
def test_the_search_takes_the_candidate_of_the_least_error(name: str) -> None:
    method, unit, layers = made(name)
    for plan in unit.plans[3:]:  # layers that share their input with no other
        x = torch.cat(list(unit.observed.layer_inputs(plan.name, rows=method.rows_per_call)))
        search = method.context.recipe.weights.search
        errors = []
        for to in method.candidates(x, [plan]):
            made_of = (
                to.layer(quantize_linear(to.plan(plan), search)) if name == "awq" else method.with_branch(plan, to)
            )
            errors.append(error(made_of, plan, x))
        assert len(errors) == method.steps
        assert error(layers[plan.name], plan, x) <= min(errors) * (1 + 1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_they_are_better_than_rounding_to_nearest(name: str) -> None:
    method, unit, layers = made(name)
    nearest = {plan.name: quantize_linear(plan, method.context.recipe.weights.search) for plan in unit.plans}
    total = {}
    for kind, some in (("searched", layers), ("nearest", nearest)):
        rows = {plan.name: torch.cat(list(unit.observed.layer_inputs(plan.name, rows=16))) for plan in unit.plans}
        total[kind] = sum(error(some[plan.name], plan, rows[plan.name]) for plan in unit.plans)
    assert total["searched"] < (0.9 if name == "awq" else 0.7) * total["nearest"]


@pytest.mark.parametrize("name", METHODS)
def test_layers_that_read_the_same_tensor_share_a_balance(name: str) -> None:
    _, _, layers = made(name)
    q, k, v = (layers[f"blocks.0.{part}"].input_multiplier for part in ("to_q", "to_k", "to_v"))
    np.testing.assert_array_equal(q, k)
    np.testing.assert_array_equal(q, v)


def test_awq_balances_by_mean_magnitudes() -> None:
    method, _, _ = made("awq", "calibrate.options.steps=4")
    x = torch.tensor([[1.0, -4.0], [1.0, 4.0]])
    maps = [to.multiplier for to in method.candidates(x, [])]
    np.testing.assert_array_equal(maps[0], [1, 1])
    np.testing.assert_allclose(maps[2], [2**0.5, 2**-0.5], rtol=1e-6)  # s = (1, 2) over its geometric mean


def test_the_branch_is_what_float16_holds_and_next_to_the_best_of_its_rank() -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(12, 20)).astype(np.float32)
    multiplier = rng.uniform(0.5, 2, 20).astype(np.float32)
    down, up = branch(weight, multiplier, 3)
    assert down.shape == (3, 20) and up.shape == (12, 3)
    for part in (down, up):
        np.testing.assert_array_equal(part, part.astype(np.float16))
    u, values, vt = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    best = (u[:, :3] * values[:3]) @ vt[:3]
    np.testing.assert_allclose(up @ (down / multiplier), best, atol=2.0**-10 * np.abs(weight).max() * 3)
    assert branch(weight, multiplier, 99)[0].shape == (12, 20)  # no rank above the weight's own


def test_the_branch_and_the_rest_make_up_the_weight() -> None:
    """But for the rounding of the rest, half a step of its group."""
    method, unit, _ = made("svdquant")
    plan = unit.plans[0]
    to = InputMap(np.random.default_rng(0).uniform(0.5, 2, plan.linear.module.in_features).astype(np.float32))
    layer = method.with_branch(plan, to)
    assert layer.router is None and layer.lora_down.shape[:2] == (1, RANK)
    whole = layer.dequantized() * to.multiplier + layer.lora_up[0].astype(np.float64) @ layer.lora_down[0]
    step = layer.scales.max() * 2 * to.multiplier.max()  # E2M1's widest step is 2
    assert np.abs(whole - plan.linear.module.weight.numpy()).max() <= step
    plain = replace(layer, lora_down=None, lora_up=None)
    assert layer.size_bytes - plain.size_bytes == 2 * RANK * sum(plan.linear.module.weight.shape)


@pytest.mark.parametrize(("name", "option"), [("awq", "steps"), ("svdquant", "steps"), ("svdquant", "rank")])
def test_options_that_are_no_numbers_to_search_by(name: str, option: str) -> None:
    with pytest.raises(RecipeError, match=f"calibrate.options.{option} 0 of {name} must be positive"):
        observed.make(name, f"calibrate.options.{option}=0")
