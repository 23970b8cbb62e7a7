"""PixArt-alpha and PixArt-Sigma in their own pipelines: built, calibrated on their trajectories, drawn with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from export.errors import RecipeError
from pipeline.generate.__main__ import main as generate
from tests.support import pipelines
from tests.support.pipelines import Built, decibels, latents

pytestmark = pytest.mark.torch

TWO = {"prompt": ["a red circle on the white", "the cat"]}
# The engines draw 64 x 64. Sigma's model is one for 1024, alpha's is for 64 itself.
SIZE = {"height": 64, "width": 64, "use_resolution_binning": False}
METHODS = {"alpha": ("fp4dit", "calibrate.options={iterations = 4}"), "sigma": ("qdit",)}
SIZES = {"alpha": (), "sigma": ("sampling.height=64", "sampling.width=64")}


@pytest.fixture(scope="module", params=METHODS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    name = request.param
    return pipelines.build(name, tmp_path_factory.mktemp(name), *METHODS[name], *SIZES[name])


CALLS: dict[str, dict[str, Any]] = {
    "two prompts": {},
    "pictures of a prompt, without something": {"num_images_per_prompt": 2, "negative_prompt": "blue ring"},
    "unguided": {"prompt": "dog", "guidance_scale": 1.0},
    "short prompts": {"max_sequence_length": 7},
    "long prompts": {"max_sequence_length": 300},
}


@pytest.mark.parametrize("call", CALLS)
def test_pictures_are_those_of_the_quantized_model(built: Built, call: str) -> None:
    built.refuse_wrong_picture(**TWO | SIZE | CALLS[call])


def test_the_engine_s_size_is_the_pipeline_s(built: Built) -> None:
    assert built.engine.transformer.config.sample_size == 8
    (picture,) = built.engine("a", num_inference_steps=2, use_resolution_binning=False, output_type="np").images
    assert picture.shape == (64, 64, 3)


def test_masks_of_bools_and_texts_encoded_before(built: Built) -> None:
    texts, mask, plain, plain_mask = built.float.encode_prompt(TWO["prompt"], device="cpu")
    call = {"prompt_embeds": texts, "negative_prompt_embeds": plain, "negative_prompt": None, **SIZE}
    expected = latents(
        built.engine, **call, prompt_attention_mask=mask.float(), negative_prompt_attention_mask=plain_mask.float()
    )
    drawn = latents(
        built.engine, **call, prompt_attention_mask=mask.bool(), negative_prompt_attention_mask=plain_mask.bool()
    )
    np.testing.assert_array_equal(drawn, expected)


def test_latents_of_float64_stay_so_and_callbacks_see_them(built: Built) -> None:
    noise, seen = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), []
    call = TWO | SIZE | {"num_inference_steps": 3, "output_type": "latent"}
    single = built.engine(**call, latents=noise).images
    double = built.engine(**call, latents=noise.double(), callback=lambda *step: seen.append(step)).images
    assert double.dtype == torch.float64 and [int(step[0]) for step in seen] == [0, 1, 2]
    assert all(step[2].dtype == torch.float64 for step in seen)
    # The same denoiser's calls; what lies between them rounds in another type, and a flip may follow from that.
    assert min(decibels(single.double().numpy(), double.numpy())) > built.bundle.recipe.budgets.final_psnr_fp_db


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_pipeline_s_type_is_the_caller_s(built: Built, dtype: torch.dtype) -> None:
    """With texts and latents in another type the engine still draws what the float pipeline draws in that type."""
    drawn, expected = (
        latents(copy.deepcopy(pipe).to(dtype), **TWO | SIZE | {"guidance_scale": 2.0})
        for pipe in (built.engine, built.float)
    )
    # bfloat16 rounds the latents of the float pipeline to 8 bits at every step: 6 dB a bit, half a bit of it lost
    budget = min(built.bundle.recipe.budgets.final_psnr_fp_db, 6.0 * 4)
    assert min(decibels(expected, drawn)) > budget
    assert built.engine.transformer.dtype == torch.float32, "the copy was moved, not the engine's first stand-in"


def test_offloading_leaves_the_picture(built: Built) -> None:
    pipelines.refuse_change_by_offloading(built, **TWO | SIZE)


def test_it_is_saved_without_its_engine_only(built: Built, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"save_pretrained: an engine is not saved .* load\(BUNDLE\).as_diffusers"):
        built.engine.save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused" / "model_index.json").exists(), "what cannot be loaded is no pipeline"
    built.float.save_pretrained(tmp_path / "float")
    again = Built(tmp_path / "float", built.bundle, built.model, built.layers).pipeline(built.engine.transformer)
    np.testing.assert_array_equal(latents(again, **TWO | SIZE), latents(built.engine, **TWO | SIZE))


def test_generate_draws_with_it(built: Built, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    flags = ["--n-steps", "2", "--num-images", "2", "--scale", "1", "--target", "cpu"]
    assert generate([str(built.bundle.path), "--prompt", "a red circle", "-o", str(out), *flags]) == 0
    assert Image.open(out).size == (2 * 64 + 1, 64)


def test_generate_refuses_another_family_s_pipeline(
    built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text('{"transformer": ["diffusers", "HunyuanDiT2DModel"]}')
    flags = ["--prompt", "a", "--pipeline", str(other), "-o", str(tmp_path / "out.png")]
    assert generate([str(built.bundle.path), *flags]) == 2
    assert "its transformer is HunyuanDiT2DModel" in capsys.readouterr().err
