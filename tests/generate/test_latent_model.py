"""Whole pipelines drawn in NumPy: latents and pictures of the diffusers pipeline, bit by bit, from the same noise.

Both call the same torch modules sample by sample, and the schedulers PyTorch's own roots and logarithms (what ours make
of those is tests/generate/schedulers), so that no rounding is left to differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from export.models.rotary import centred_region
from pipeline.generate import pipeline_classes
from pipeline.generate.latent_model import LatentModel
from pipeline.text_to_image import Pipeline
from tests.generate.schedulers.cases import with_torch
from tests.support import pipelines, tiny
from tests.support.torch_parts import Loads, equal_noise, numbers, source_of, split_parts

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
}
CALLS: dict[str, dict[str, Any]] = {
    "two prompts": {"prompt": PROMPTS},
    "two pictures, without something": {"prompt": "dog", "num_images_per_prompt": 2, "negative_prompt": "Blue ring"},
    "unguided": {"prompt": PROMPTS, "guidance_scale": 1.0},
    "two of two": {"prompt": PROMPTS, "num_images_per_prompt": 2, "negative_prompt": ["ring", ""]},
}


def make(name: str, scheduler: str | None = None) -> Any:
    """The tiny diffusers pipeline of a family; what it draws is of the size that its transformer is made for."""
    row = pipelines.ROWS[name]
    config = row.config | ({"sample_size": 8} if name == "sigma" else {})
    pipe = row.pipeline(tiny.random_module(row.class_name, config))
    if scheduler is not None:
        pipe.scheduler = getattr(diffusers, scheduler)(**SCHEDULERS[scheduler])
    return split_parts(pipe)


def both(pipe: Any, folder: Path, patch: pytest.MonkeyPatch, **call: Any) -> None:
    """Assert that latents and pictures are equal."""
    with_torch(patch)
    texts = call["prompt"] if isinstance(call["prompt"], list) else [call["prompt"]]
    count = len(texts) * call.get("num_images_per_prompt", 1)
    call |= {"num_inference_steps": 4, "latents": numbers((count, *SHAPE), 99)}
    theirs_call = call | {"latents": torch.from_numpy(call["latents"]), "use_resolution_binning": False}
    for kind in ("latent", "np"):
        equal_noise(patch, count)
        own = Pipeline(LatentModel(source_of(pipe, folder)))(**call, output_type=kind).images
        np.testing.assert_array_equal(own, np.asarray(pipe(**theirs_call, output_type=kind).images), err_msg=kind)
    assert own.shape == (count, 64, 64, 3) and np.ptp(own) > 0.1 and np.isfinite(own).all()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["alpha", "sigma"])
def test_pixart_draws_what_diffusers_draws(
    name: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both(make(name), tmp_path, monkeypatch, **CALLS[call])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_draws_what_diffusers_draws(
    scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both(make("alpha", scheduler), tmp_path, monkeypatch, **CALLS["two prompts"])


@pytest.mark.parametrize("call", [name for name in CALLS if name != "two of two"])
@pytest.mark.parametrize("name", ["hunyuan11", "hunyuan12"])
def test_hunyuan_draws_what_diffusers_draws(
    name: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With diffusers' own rotary tables: how far ours are from them is tests/export/test_rotary.py."""
    monkeypatch.setattr(pipeline_classes, "rotary_tables", rotary_of_diffusers)
    named = dict(CALLS[call])
    both(make(name), tmp_path, monkeypatch, **named)


def rotary_of_diffusers(head_dim: int, grid: tuple[int, int], base: int) -> Any:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    tables = get_2d_rotary_pos_embed(head_dim, centred_region(grid, base), grid, output_type="pt")
    return tuple(table.numpy() for table in tables)


def test_pictures_of_several_prompts_of_hunyuan_have_their_own_masks(tmp_path: Path) -> None:
    """Where diffusers mixes them up: two pictures of each are what each prompt draws alone."""
    model = LatentModel(source_of(make("hunyuan12"), tmp_path, Loads(keep=True)), keep_loaded=True)
    pipeline, call = Pipeline(model), {"num_inference_steps": 2, "output_type": "latent"}
    together = pipeline(PROMPTS, num_images_per_prompt=2, **call).images
    alone = [pipeline(prompt, num_images_per_prompt=2, **call).images for prompt in PROMPTS]
    np.testing.assert_array_equal(together, np.concatenate(alone))


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("scale", [4.0, 1.0])
def test_dit_draws_what_diffusers_draws(
    scheduler: str, scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scaling factor of a half: diffusers multiplies with its reciprocal, which then is the same."""
    pipe = make("dit", scheduler)
    pipe.vae.register_to_config(scaling_factor=0.5)
    pipe.register_to_config(id2label={int(key): value for key, value in pipelines.LABELS.items()})
    with_torch(monkeypatch)
    noise, call = numbers((2, *SHAPE), 99), {"num_inference_steps": 4, "guidance_scale": scale, "output_type": "np"}
    equal_noise(monkeypatch, 2)
    begin = "diffusers.pipelines.dit.pipeline_dit.randn_tensor"
    monkeypatch.setattr(begin, lambda **_: torch.from_numpy(noise))
    own = Pipeline(LatentModel(source_of(pipe, tmp_path)))(["nought", "999"], latents=noise, **call).images
    np.testing.assert_array_equal(own, pipe(class_labels=[0, 999], **call).images)
    assert own.shape == (2, 64, 64, 3) and np.ptp(own) > 0.1


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_a_picture_is_begun_with_as_diffusers_does(
    scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PixArt has no such pipeline there: Stable Diffusion's way with steps and noise, and the loop of PixArt's."""
    from diffusers import StableDiffusionImg2ImgPipeline

    with_torch(monkeypatch)
    pipe, image = make("alpha", scheduler), np.random.default_rng(0).random((64, 64, 3)).astype(np.float32)
    noise = numbers((1, *SHAPE), 99)
    own = Pipeline(LatentModel(source_of(pipe, tmp_path, encoder=True)))(
        "dog", image=image, strength=0.6, latents=noise, num_inference_steps=5, guidance_scale=1.0, output_type="latent"
    ).images
    with torch.no_grad():
        states, mask, _, _ = pipe.encode_prompt("dog", False, device="cpu")
        pixels = torch.from_numpy(image * np.float32(2) - np.float32(1)).permute(2, 0, 1)[None].contiguous()
        x = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
        pipe.scheduler.set_timesteps(5)
        times, _ = StableDiffusionImg2ImgPipeline.get_timesteps(pipe, 5, 0.6, "cpu")
        x = pipe.scheduler.add_noise(x, torch.from_numpy(noise), times[:1])
        for time in times:
            given = pipe.scheduler.scale_model_input(x, time)
            sizes = {"resolution": None, "aspect_ratio": None}
            predicted = pipe.transformer(given, states, time[None], added_cond_kwargs=sizes,
                                         encoder_attention_mask=mask).sample[:, :4]  # fmt: skip
            x = pipe.scheduler.step(predicted, time, x).prev_sample
    np.testing.assert_array_equal(own, x.numpy())
