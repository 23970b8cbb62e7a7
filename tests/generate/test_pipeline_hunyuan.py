"""HunyuanDiT 1.1 (style and size conditions) and 1.2 (without) in their own pipeline: built, measured, drawn with."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from export.errors import RecipeError
from pipeline.bench import measure as bench
from pipeline.generate.__main__ import main as generate
from tests.support import pipelines
from tests.support.pipelines import Built, decibels, latents

pytestmark = [pytest.mark.slow, pytest.mark.torch]

TWO = {"prompt": ["a red circle on the white", "the cat"]}
SIZE = {"height": 64, "width": 64, "use_resolution_binning": False}
# Activations of 8 bits instead of the recipe's 6: in random weights, quantized adaLN shifts and long skips amplify a
# flipped code until float32 runs of one model are as far apart as quantization itself; flips of 8 bits are a quarter.
EIGHT_BITS = "formats.activation=INT8"
METHODS = {"hunyuan11": "vidit_q", "hunyuan12": "qdit"}


@pytest.fixture(scope="module", params=METHODS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    name = request.param
    return pipelines.build(name, tmp_path_factory.mktemp(name), METHODS[name], EIGHT_BITS)


CALLS: dict[str, dict[str, Any]] = {
    "two prompts, other sizes told": {"original_size": (512, 768), "crops_coords_top_left": (3, 4)},
    "pictures of a prompt, without something": {
        "prompt": "a red circle", "num_images_per_prompt": 2, "negative_prompt": "blue ring"
    },
    "unguided": {"prompt": "dog", "guidance_scale": 1.0},
    "rescaled guidance": {"guidance_rescale": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_pictures_are_those_of_the_quantized_model(built: Built, call: str) -> None:
    built.refuse_wrong_picture(**TWO | SIZE | CALLS[call])


def test_callbacks_change_latents_and_texts(built: Built) -> None:
    def halve(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {name: 0.5 * tensor for name, tensor in tensors.items()}

    names = ["latents", "prompt_embeds"]
    call = {"callback_on_step_end": halve, "callback_on_step_end_tensor_inputs": names}
    built.refuse_wrong_picture(**TWO | SIZE, **call)


def test_masks_of_bools_and_latents_of_float64(built: Built) -> None:
    encoded = [built.float.encode_prompt(TWO["prompt"], device="cpu", text_encoder_index=index) for index in (0, 1)]
    call: dict[str, Any] = dict(SIZE)
    for suffix, (texts, plain, mask, plain_mask) in zip(("", "_2"), encoded, strict=True):
        call |= {f"prompt_embeds{suffix}": texts, f"negative_prompt_embeds{suffix}": plain}
        call |= {f"prompt_attention_mask{suffix}": mask, f"negative_prompt_attention_mask{suffix}": plain_mask}
    bools = {name: value.bool() if "mask" in name else value for name, value in call.items() if name not in SIZE}
    expected = latents(built.engine, **call)
    np.testing.assert_array_equal(latents(built.engine, **call | bools), expected)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = built.engine(**call, latents=noise, num_inference_steps=2, output_type="latent").images
    assert drawn.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_pipeline_s_type_is_the_caller_s(built: Built, dtype: torch.dtype) -> None:
    drawn, expected = (
        latents(copy.deepcopy(pipe).to(dtype), **TWO | SIZE | {"guidance_scale": 2.0})
        for pipe in (built.engine, built.float)
    )
    # bfloat16 rounds the latents of the float pipeline to 8 bits at every step: 6 dB a bit, half of the bits lost
    assert min(decibels(expected, drawn)) > min(built.bundle.recipe.budgets.final_psnr_fp_db, 6.0 * 4)


def test_offloading_leaves_the_picture(built: Built) -> None:
    pipelines.refuse_change_by_offloading(built, **TWO | SIZE)


def test_binning_is_explained_where_it_gets_in_the_way(built: Built) -> None:
    with pytest.raises(RecipeError, match=r"draws 64 x 64, the latents are for 1024 x 1024; .*binning=False"):
        built.engine("a", num_inference_steps=1)


def test_bench_draws_a_whole_image(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "peak_memory", lambda *_: None)
    monkeypatch.setattr(bench, "CALLS_BUDGET_S", 0.0)
    engines = {"cpu": built.bundle.engine("cpu")}
    document = bench.bench(built.model, engines, built.bundle.recipe, built.bundle.path, [], 0)
    row = document["contestants"]["cpu"]
    assert "derived" not in row["image_ms"] and row["image_ms"]["median"] > row["call_ms"]["median"] > 0


def test_generate_draws_with_it(built: Built, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    flags = ["--prompt", "the cat", "--n-steps", "2", "--scale", "1", "--guidance-scale", "1", "--target", "cpu"]
    assert generate([str(built.bundle.path), "--prompt", "a red circle", "-o", str(out), *flags]) == 0
    assert Image.open(out).size == (2 * 64 + 1, 64)


def test_the_recipe_s_own_formats_pass_the_gates_and_draw(tmp_path: Path) -> None:
    """E2M3 activations: what flips do to pictures is large here, see EIGHT_BITS, so that only the gates judge them."""
    built = pipelines.build("hunyuan11", tmp_path, "rtn")
    assert {layer.activation_format for layer in built.layers} == {"E2M3"}
    report = json.loads((built.bundle.path / "report/parity.json").read_text())
    assert {"cpu/segments", "onnx/segments", "onnx/operands_exact"} <= {gate["name"] for gate in report["gates"]}
    assert np.isfinite(latents(built.engine, **TWO | SIZE)).all()
