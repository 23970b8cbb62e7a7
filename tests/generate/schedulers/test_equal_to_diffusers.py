"""Schedulers are those of diffusers, step by step.

Two things are told apart. With PyTorch's own roots, logarithms and exponentials in the place of ours, all numbers are
equal to the last bit: the formulas are the same, in the same order. With ours, which are rounded once, each of them may
differ from PyTorch's in the last bit; what that does to a step is found by changing ours by a bit at random.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.generate.schedulers import float32
from pipeline.generate.schedulers.base import FloatArray, Scheduler
from tests.generate.schedulers.cases import (
    FUNCTIONS,
    Case,
    cases,
    equal_noise,  # noqa: F401
    model,
    numbers,
    steps,
    title,
    with_torch,
)

pytestmark = pytest.mark.torch
CASES = list(cases())
# 1000 steps: the table whole, where the steps are finite in diffusers.
ALL_STEPS = [
    Case("DDIMScheduler", {"clip_sample": False}, steps(1000)),
    Case("DDPMScheduler", {"timestep_spacing": "trailing"}, steps(1000)),
    Case("DPMSolverMultistepScheduler", {"timestep_spacing": "linspace"}, steps(999)),
    Case("EulerDiscreteScheduler", {}, steps(1000)),
    Case("EulerAncestralDiscreteScheduler", {"timestep_spacing": "leading"}, steps(1000)),
    Case("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, steps(1000)),
    Case("HeunDiscreteScheduler", {}, steps(1000)),
    Case("UniPCMultistepScheduler", {}, steps(999)),
    Case("LCMScheduler", {"original_inference_steps": 1000}, steps(1000)),
]
# Timesteps that diffusers cuts to integers without rounding: the last bit of a sigma may decide.
CUT = ("use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_karras_sigmas", "use_flow_sigmas")


def tensor(x: FloatArray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x))


def their_step(theirs: Any, case: Case, i: int, prediction: FloatArray, x: FloatArray) -> FloatArray:
    more = {"eta": case.options.eta} if case.name == "DDIMScheduler" else {}
    return np.asarray(theirs.step(tensor(prediction), theirs.timesteps[i], tensor(x), **more).prev_sample)


def their_noised(theirs: Any, x: FloatArray, noise: FloatArray, i: int) -> FloatArray:
    if hasattr(theirs, "scale_noise"):
        return np.asarray(theirs.scale_noise(tensor(x), theirs.timesteps[i : i + 1], tensor(noise)))
    return np.asarray(theirs.add_noise(tensor(x), tensor(noise), theirs.timesteps[i : i + 1]))


@pytest.mark.parametrize("case", CASES + ALL_STEPS, ids=title)
def test_with_torch_s_functions_every_bit_is_equal(
    case: Case,
    monkeypatch: pytest.MonkeyPatch,
    equal_noise: Callable[[int], None],  # noqa: F811
) -> None:
    """A whole drawing, each with its own x."""
    with_torch(monkeypatch)
    ours, theirs = case.ours(), case.theirs()
    np.testing.assert_array_equal(ours.timesteps, theirs.timesteps.numpy().astype(np.float32))
    if hasattr(ours, "sigmas"):
        np.testing.assert_array_equal(ours.sigmas, theirs.sigmas.numpy())
    assert ours.init_noise_sigma == np.float32(getattr(theirs, "init_noise_sigma", 1.0))
    x = ours.start(numbers(1), numbers(2) if case.options.strength < 1 else None)
    other = x
    if case.options.strength < 1:
        other = their_noised(theirs, numbers(2), numbers(1), ours.first)
    for i in ours.steps:
        equal_noise(i)
        assert np.isfinite(other).all()
        np.testing.assert_array_equal(x, other, err_msg=f"before step {i}")
        given = ours.scale_model_input(x, i)
        if hasattr(theirs, "scale_model_input"):
            np.testing.assert_array_equal(given, theirs.scale_model_input(tensor(x), theirs.timesteps[i]).numpy())
        prediction = model(given, float(ours.timesteps[i]), case.learned)
        x, other = (
            ours.step(prediction, x, i, lambda _, i=i: numbers(7, i)),
            their_step(theirs, case, i, prediction, other),
        )
    np.testing.assert_array_equal(x, other, err_msg="at the end")


def nudged(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Each function a bit up, a bit down or as it is, at random."""
    rng = np.random.default_rng(seed)
    for name, function in [(name, getattr(float32, name)) for name in FUNCTIONS]:

        def changed(x: Any, own: Callable[[Any], Any] = function) -> Any:
            right = own(x)
            way = rng.choice([-1, 0, 1], size=np.shape(right))
            moved = np.nextafter(right, np.where(way > 0, np.inf, -np.inf).astype(np.float32))
            return np.where((way == 0) | ~np.isfinite(right) | (right == 0), right, moved)[()]

        monkeypatch.setattr(float32, name, changed)


def results(scheduler: Scheduler, case: Case, xs: list[FloatArray]) -> list[FloatArray]:
    """What each step makes of the x that it is given."""
    predictions = [model(x, float(i), case.learned) for i, x in enumerate(xs)]
    return [
        scheduler.step(prediction, x, i, lambda _, i=i: numbers(7, i))
        for i, x, prediction in zip(scheduler.steps, xs, predictions, strict=True)
    ]


NUDGES = 8


@pytest.mark.parametrize("case", CASES, ids=title)
def test_a_step_is_equal_but_for_the_last_bits_of_its_tables(
    case: Case,
    monkeypatch: pytest.MonkeyPatch,
    equal_noise: Callable[[int], None],  # noqa: F811
) -> None:
    """Both are given the same x at each step. Tolerance: PyTorch's functions are within a bit of ours, so a step of
    diffusers is one that some choice of bits gives. Of these choices eight are tried; the farthest of so few is taken
    three times, and two roundings of the largest number are added for where none of the eight changes a thing."""
    ours, theirs = case.ours(), case.theirs()
    xs = [numbers(3, i) for i in ours.steps]
    expected = []
    for i, x in zip(ours.steps, xs, strict=True):
        equal_noise(i)
        if hasattr(theirs, "scale_model_input"):
            theirs.scale_model_input(tensor(x), theirs.timesteps[i])
        expected.append(their_step(theirs, case, i, model(x, float(i - ours.first), case.learned), x))
    plain = results(case.ours(), case, xs)
    reach = np.zeros(len(xs))
    for seed in range(NUDGES):
        with pytest.MonkeyPatch.context() as patch:
            nudged(patch, seed)
            moved = results(case.ours(), case, xs)
        reach = np.maximum(reach, [np.abs(a - b).max() for a, b in zip(moved, plain, strict=True)])
    for i, (own, other) in enumerate(zip(plain, expected, strict=True)):
        largest = max(np.abs(own).max(), np.abs(xs[i]).max())
        limit = 3 * reach[i] + 2 * np.spacing(np.float32(largest))
        assert np.abs(own - other).max() <= limit, (i, np.abs(own - other).max(), limit, largest)
    off = np.abs(ours.timesteps - theirs.timesteps.numpy().astype(np.float32))
    assert off.max() <= (1 if any(case.keys.get(key) for key in CUT) else 1e-4)
