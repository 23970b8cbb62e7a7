"""Random encoders, T5's apart: same arguments, same bytes; live signals; outliers where they are planted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.quality.text_encoder_study import RECIPES, WRITERS, write_encoder
from benchmarks.zoo.make_t5_xxl import STREAM, outliers
from export.models.load import denoiser, load, sample_inputs

pytestmark = pytest.mark.torch
LAYERS, WIDTH, VOCABULARY = 2, 128, 100


@pytest.mark.parametrize("write", WRITERS.values())
@pytest.mark.parametrize("planted", [False, True])
def test_it_is_loaded_and_its_signals_live(tmp_path: Path, write: Callable[..., None], planted: bool) -> None:
    for name in "ab":
        write(tmp_path / name, LAYERS, WIDTH, 2 * WIDTH, 2, VOCABULARY, planted)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    model = load(str(tmp_path / "a"))
    linears = 6 if model.family.name in ("clip", "bert") else 7  # a gated feed-forward has three
    assert f"write_{model.family.name}" == write.__name__ and len(model.linears()) == linears * LAYERS
    inputs = {name: torch.from_numpy(value) for name, value in sample_inputs(model, 2, 0).items()}
    with torch.no_grad():
        hidden = denoiser(model).outputs(**inputs)["last_hidden_state"]
    assert 0.1 < hidden.std() < 10
    into = {
        "clip": "encoder.layers.1.mlp.fc2", "bert": "encoder.layer.1.output.dense",
        "gemma2": "layers.1.post_feedforward_layernorm", "qwen3": "layers.1.mlp.down_proj",
    }[model.family.name]  # fmt: skip
    weight = model.module.get_submodule(into).weight
    sizes = 1 + weight if weight.ndim == 1 else weight.square().mean(1).sqrt()
    large = torch.nonzero(sizes > STREAM / 2 * sizes.median()).flatten().tolist()
    assert large == (outliers(WIDTH, 0).tolist() if planted else [])


def test_the_study_knows_an_encoder_for_each_recipe(tmp_path: Path) -> None:
    for name in RECIPES:
        write_encoder(name, tmp_path / name, planted=False)
        assert load(str(tmp_path / name)).family.name == name
