"""A denoiser described without its weights: inputs and sizes by family and configuration."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from export.errors import RecipeError
from export.models.description import Description, sample_inputs
from export.models.families import FAMILIES
from pipeline.generate.case import described_case
from pipeline.recipe import Recipe, Sampling
from tests.support import tiny


def description(family: str, folder: Path) -> Description:
    return Description(FAMILIES[family], {"pixart": tiny.PIXART, "dit": tiny.DIT}[family], folder, "a tiny one")


def test_a_cell_is_a_pixel_where_pictures_are_made_without_a_decoder(tmp_path: Path) -> None:
    assert description("pixart", tmp_path).cells() == (8, 8)
    assert description("pixart", tmp_path).cells(128, 32) == (16, 4)
    (tmp_path / "generation.json").write_text(json.dumps({"output": "pixels"}))
    assert description("pixart", tmp_path).cells(16, 4) == (16, 4)


def test_sizes_that_the_model_cannot_make_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="image size 24 x 64: a tiny one needs multiples of 16 pixels"):
        description("pixart", tmp_path).cells(24, 64)
    with pytest.raises(RecipeError, match="image size 32 x 64: dit makes square images only"):
        description("dit", tmp_path).cells(32, 64)


def test_samples_have_the_shapes_of_the_family(tmp_path: Path) -> None:
    model = description("pixart", tmp_path)
    samples = sample_inputs(model, 2, seed=0, tokens=7)
    assert {name: value.shape for name, value in samples.items()} == {
        "hidden_states": (2, 4, 8, 8),
        "encoder_hidden_states": (2, 7, 32),
        "timestep": (2,),
        "encoder_attention_mask": (2, 7),
    }
    assert model.shared == frozenset()
    again = sample_inputs(model, 2, seed=0, tokens=7)
    assert all(np.array_equal(samples[name], again[name]) for name in samples)
    assert not np.array_equal(samples["hidden_states"], sample_inputs(model, 2, 1, tokens=7)["hidden_states"])


def test_pictures_can_be_drawn_by_a_description(tmp_path: Path) -> None:
    recipe = Recipe("tiny", "nowhere", sampling=Sampling(n_steps=3, guidance_scale=2.0))
    case = described_case(description("dit", tmp_path), recipe, 2)
    calls = []

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        calls.append({name: value.shape for name, value in inputs.items()})
        return {"sample": np.zeros((4, 8, 8, 8), np.float32)}

    assert case.draw(run).shape == (2, 4, 8, 8)
    assert calls == [{"hidden_states": (4, 4, 8, 8), "timestep": (4,), "class_labels": (4,)}] * 3
