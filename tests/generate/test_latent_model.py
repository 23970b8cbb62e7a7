"""Whole pipelines drawn in NumPy: latents and pictures of the diffusers pipeline, bit by bit, from the same noise.

Both call the same torch modules sample by sample, and the schedulers PyTorch's own roots and logarithms (what ours make
of those is tests/generate/schedulers), so that no rounding is left to differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.generate.latent_model import LatentModel
from pipeline.text_to_image import Pipeline
from tests.generate.schedulers.cases import with_torch
from tests.support import pipelines, tiny
from tests.support.torch_parts import equal_noise, numbers, source_of, split_parts

pytestmark = pytest.mark.torch
PROMPTS = ["A red circle on the white ", "the cat"]
SHAPE = (4, 8, 8)
SCHEDULERS: dict[str, dict[str, Any]] = {
    "DPMSolverMultistepScheduler": {"use_karras_sigmas": True},
    "DDIMScheduler": {"clip_sample": False},
    "DDPMScheduler": {"clip_sample": False},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "UniPCMultistepScheduler": {},
    "LCMScheduler": {},
    "FlowMatchEulerDiscreteScheduler": {},
}
CALLS: dict[str, dict[str, Any]] = {
    "two prompts": {"prompt": PROMPTS},
    "two pictures, without something": {"prompt": "dog", "num_images_per_prompt": 2, "negative_prompt": "Blue ring"},
    "unguided": {"prompt": PROMPTS, "guidance_scale": 1.0},
    "two of two": {"prompt": PROMPTS, "num_images_per_prompt": 2, "negative_prompt": ["ring", ""]},
}


def scheduler(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)(**SCHEDULERS[name])


def make(name: str) -> Any:
    """The tiny diffusers pipeline of a family; what it draws is of the size that its transformer is made for."""
    row = pipelines.ROWS[name]
    config = row.config | ({"sample_size": 8, "use_additional_conditions": False} if name == "sigma" else {})
    return split_parts(row.pipeline(tiny.random_module(row.class_name, config)))


def both(pipe: Any, folder: Path, patch: pytest.MonkeyPatch, **call: Any) -> tuple[Any, Any]:
    """Latents and pictures: (ours, theirs)."""
    with_torch(patch)
    texts = call["prompt"] if isinstance(call["prompt"], list) else [call["prompt"]]
    count = len(texts) * call.get("num_images_per_prompt", 1)
    call |= {"num_inference_steps": 4, "latents": numbers((count, *SHAPE), 99)}
    theirs_call = call | {"latents": torch.from_numpy(call["latents"]), "use_resolution_binning": False}
    own, theirs = [], []
    for kind in ("latent", "np"):
        equal_noise(patch, count)
        own.append(Pipeline(LatentModel(source_of(pipe, folder)))(**call, output_type=kind).images)
        images = pipe(**theirs_call, output_type=kind).images
        theirs.append(images.numpy() if isinstance(images, torch.Tensor) else images)
    return own, theirs


@pytest.mark.parametrize("call", CALLS)
def test_pixart_alpha_draws_what_diffusers_draws(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, theirs = both(make("alpha"), tmp_path, monkeypatch, **CALLS[call])
    np.testing.assert_array_equal(own[0], theirs[0])
    np.testing.assert_array_equal(own[1], theirs[1])
    assert own[1].shape[1:] == (64, 64, 3) and np.ptp(own[1]) > 0.1
