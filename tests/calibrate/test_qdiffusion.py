"""Q-Diffusion: static activation scales learned on the block's output."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline import methods
from pipeline.backends.reference import FakeQuantLinear
from pipeline.calibrate.blocks import run_block, with_parts
from pipeline.calibrate.learn.reconstruct import block_loss
from pipeline.calibrate.method import Unit
from pipeline.calibrate.methods.qdiffusion import StaticLinear, learn_steps
from pipeline.calibrate.methods.rtn import quantize_linear
from tests.calibrate.test_reconstruct import context, observed_block, plans_of


def static_layers(observed, fmt: str, scale: float, zero: float | None):
    nearest = [quantize_linear(plan, "mse") for plan in plans_of(observed, "INT6", "per_channel")]
    array = lambda value: None if value is None else np.array([value], np.float32)  # noqa: E731
    return [
        replace(
            layer,
            activation_format=fmt,
            activation_scaling="per_tensor",
            activation_scale=array(scale),
            activation_zero=array(zero),
        )
        for layer in nearest
    ]


def loss_of(observed, layers) -> float:
    parts = {observed.names[layer.name]: FakeQuantLinear(layer, torch.float32) for layer in layers}
    block = with_parts(observed.block, parts)
    outputs, targets = (
        (torch.cat([stream for (stream,) in streams]),)
        for streams in (run_block(block, observed.noisy), observed.outputs)
    )
    return float(block_loss(outputs, targets, observed.streams))


@pytest.mark.parametrize(("fmt", "zero"), [("INT4", None), ("E2M1", None), ("UE1M3", -0.75)])
def test_static_linear_is_the_reference(fmt, zero):
    observed = observed_block()
    for layer in static_layers(observed, fmt, 0.3, zero):
        x = torch.from_numpy(np.random.default_rng(0).normal(size=(7, layer.in_features)).astype(np.float32))
        assert torch.allclose(StaticLinear(layer)(x), FakeQuantLinear(layer, torch.float32)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize(("fmt", "zero"), [("INT4", None), ("UE1M3", -0.75)])
def test_learned_scales_lower_the_loss_and_keep_zero_exact(fmt, zero):
    observed = observed_block()
    layers = static_layers(observed, fmt, 0.6, zero)  # too wide
    learned = learn_steps(observed, layers, 80, 1e-2, "block", 0)
    assert loss_of(observed, learned) < 0.9 * loss_of(observed, layers)
    for layer, before in zip(learned, layers, strict=True):
        assert np.array_equal(layer.codes, before.codes)
        assert layer.activation_scale.dtype == np.float32
        if zero is not None:
            assert -layer.activation_zero / layer.activation_scale == pytest.approx(1.25, rel=1e-6)


def test_scales_that_do_not_help_are_not_used():
    observed = observed_block()
    layers = static_layers(observed, "INT8", 0.03, None)
    assert learn_steps(observed, layers, 1, 5.0, "block", 0) is layers


@pytest.mark.torch
def test_the_method_gives_static_asymmetric_activations_and_beats_least_squared_error():
    observed = observed_block()
    plans = [replace(plan, activation_format="INT4") for plan in plans_of(observed, "INT4", "group")]
    options = {"iterations": 60, "step_iterations": 80}
    method_class = methods.METHODS["qdiffusion"].load()
    plain = method_class(context("qdiffusion", **options | {"step_iterations": 0}))
    both = [
        method.quantize(Unit("block", method.plan(plans), observed))
        for method in (plain, method_class(context("qdiffusion", **options)))
    ]
    assert loss_of(observed, both[1]) < loss_of(observed, both[0])
    for layer in both[1]:
        assert (layer.granularity, layer.activation_scaling, layer.activation_format) == (
            "per_channel",
            "per_tensor",
            "UE1M3",
        )
