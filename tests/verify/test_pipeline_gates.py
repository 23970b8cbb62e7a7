"""What both sides of a picture's gate draw is the same noise, and what runs of our own are moved by is small."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor

from pipeline.generate.schedulers.base import SeededNoise
from pipeline.verify.pipeline_gates import ROUNDING, SCHEDULER_ULPS, _mover, _noise_of, _prompts, _worst_db

pytestmark = [pytest.mark.torch, pytest.mark.fast]


def test_what_a_scheduler_draws_is_our_noise_and_afterwards_its_own_again() -> None:
    import diffusers.schedulers.scheduling_ddpm as theirs

    scheduler = DDPMScheduler()
    scheduler.set_timesteps(4)
    sample, output = torch.ones(1, 2, 4, 4), torch.zeros(1, 2, 4, 4)
    with _noise_of(scheduler, SeededNoise([7]), sample, DDIMScheduler()):
        drawn = scheduler.step(output, 750, sample).prev_sample
    assert theirs.randn_tensor is randn_tensor
    torch.manual_seed(0)
    mean_and_theirs = scheduler.step(output, 750, sample).prev_sample
    torch.manual_seed(0)
    mean, scale = _mean_and_scale(scheduler, mean_and_theirs, torch.randn(1, 2, 4, 4), output, sample)
    expected = mean + scale * torch.from_numpy(SeededNoise([7])((1, 2, 4, 4)))
    torch.testing.assert_close(drawn, expected, rtol=1e-5, atol=1e-5)


def _mean_and_scale(
    scheduler: DDPMScheduler, moved: torch.Tensor, noise: torch.Tensor, output: torch.Tensor, sample: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """What a step gives without its noise, and how much of it is added."""
    torch.manual_seed(1)
    other = scheduler.step(output, 750, sample).prev_sample
    torch.manual_seed(1)
    scale = float(((other - moved) / (torch.randn(1, 2, 4, 4) - noise)).median())
    return moved - scale * noise, scale


def test_latents_are_moved_by_roundings_and_nothing_else_is() -> None:
    latents, states = np.full((1, 4, 8, 8), -3, np.float32), np.ones((1, 2, 3), np.float32)
    moved = _mover(0)({"hidden_states": latents, "encoder_hidden_states": states})
    by = np.abs(moved["hidden_states"].astype(np.float64) - latents)
    assert moved["encoder_hidden_states"] is states and moved["hidden_states"].dtype == np.float32
    assert 0 < by.max() <= 3 * (SCHEDULER_ULPS + 2) * ROUNDING, "and one rounding of the product to float32"
    assert not np.array_equal(_mover(1)({"hidden_states": latents})["hidden_states"], moved["hidden_states"])


def test_the_worst_picture_counts() -> None:
    right = np.zeros((2, 3, 3, 3), np.float32)
    wrong = right.copy()
    wrong[1] += np.float32(0.1)
    assert _worst_db(right, wrong) == pytest.approx(20, abs=1e-4)


def test_pictures_are_of_prompts_that_the_bundle_holds() -> None:
    """So a moved bundle is verified with the same ones, whatever its model's folder has by then."""
    texts: Any = SimpleNamespace(class_name="PixArtAlphaPipeline", prompts=("a ring", "a cat"))
    classes: Any = SimpleNamespace(class_name="DiTPipeline", prompts=texts.prompts)
    assert sorted(_prompts(texts)) == ["a cat", "a ring"] and _prompts(classes) == ["0", "1"]
