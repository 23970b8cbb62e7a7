"""PixArt-alpha and PixArt-Sigma in their own pipelines: built, calibrated on their trajectories, drawn with."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import pipelines
from tests.pipelines import Built, latents

TWO = {"prompt": ["a red circle on the white", "the cat"]}
# The engines draw 64 x 64. Sigma's model is one for 1024, alpha's is for 64 itself.
SIZE = {"height": 64, "width": 64, "use_resolution_binning": False}
METHODS = {"alpha": ("fp4dit", "calibrate.options={iterations = 4}"), "sigma": ("qdit",)}
SIZES = {"alpha": (), "sigma": ("sampling.height=64", "sampling.width=64")}


@pytest.fixture(scope="module", params=METHODS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    name = request.param
    return pipelines.build(name, tmp_path_factory.mktemp(name), *METHODS[name], *SIZES[name])


CALLS = {
    "two prompts": {},
    "pictures of a prompt, without something": {"num_images_per_prompt": 2, "negative_prompt": "blue ring"},
    "unguided": {"prompt": "dog", "guidance_scale": 1.0},
    "short prompts": {"max_sequence_length": 7},
    "long prompts": {"max_sequence_length": 300},
}


@pytest.mark.parametrize("call", CALLS)
def test_pictures_are_those_of_the_quantized_model(built: Built, call: str) -> None:
    built.refuse_wrong_picture(**TWO | SIZE | CALLS[call])
