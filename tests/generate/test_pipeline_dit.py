"""DiT in its own pipeline: built, calibrated on its trajectories, drawn with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from export.errors import RecipeError
from pipeline.generate.__main__ import main as generate
from tests.support import pipelines
from tests.support.pipelines import Built, decibels, latents

pytestmark = [pytest.mark.slow, pytest.mark.torch]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return pipelines.build("dit", tmp_path_factory.mktemp("dit"), "ptq4dit")


CALLS: dict[str, dict[str, Any]] = {
    "three classes": {"class_labels": [1, 999, 1]},
    "one": {"class_labels": [7]},
    "unguided": {"class_labels": [0, 5], "guidance_scale": 1.0},
}


@pytest.mark.parametrize("call", CALLS)
def test_pictures_are_those_of_the_quantized_model(built: Built, call: str) -> None:
    built.refuse_wrong_picture(**CALLS[call])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_pipeline_s_type_is_the_caller_s(built: Built, dtype: torch.dtype) -> None:
    call = CALLS["three classes"] | {"guidance_scale": 2.0}
    drawn, expected = (latents(copy.deepcopy(pipe).to(dtype), **call) for pipe in (built.engine, built.float))
    assert min(decibels(expected, drawn)) > built.bundle.recipe.budgets.final_psnr_fp_db


def test_offloading_leaves_the_picture(built: Built) -> None:
    pipelines.refuse_change_by_offloading(built, **CALLS["three classes"])


def test_classes_that_the_model_lacks_are_refused(built: Built) -> None:
    with pytest.raises(RecipeError, match=r"class_labels holds \[1001, 1000\]; the model knows 0 to 1000"):
        built.engine(class_labels=[1001], num_inference_steps=1)


def test_generate_draws_by_number_and_by_name(built: Built, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    flags = ["--prompt", "nought", "--n-steps", "2", "--scale", "1", "--guidance-scale", "0", "--target", "cpu"]
    assert generate([str(built.bundle.path), "--prompt", "999", "-o", str(out), *flags]) == 0
    assert Image.open(out).size == (2 * 64 + 1, 64)
