"""A new model family is one row: a class that nobody has heard of, added to the table alone, goes the whole way.

Its tokens are the pixels, its condition a tone for each picture: what no other family has.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from export.errors import RecipeError
from export.models import load as models
from export.models.families import FAMILIES, Family, Input
from pipeline import __main__ as cli
from pipeline import load
from tests.support.quick_build import measure_little

pytestmark = pytest.mark.torch

# --- the model -------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """x + mix(x, the mean token and the tone), then a feed-forward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift, self.mix = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden_states: Tensor, tone: Tensor) -> Tensor:
        x = hidden_states + self.mix(hidden_states + hidden_states.mean(1, keepdim=True) + self.shift(tone)[:, None])
        return x + self.down(nn.functional.gelu(self.up(x), approximate="tanh"))


class ToyTransformer2DModel(ModelMixin, ConfigMixin):  # type: ignore[misc]  # their bases are untyped
    """As a class of diffusers that is younger than this project."""

    @register_to_config
    def __init__(self, sample_size: int = 4, in_channels: int = 4, patch_size: int = 1, width: int = 32) -> None:
        super().__init__()
        self.embed, self.tint = nn.Linear(in_channels, width), nn.Parameter(torch.randn(width))
        self.layers = nn.ModuleList(Block(width) for _ in range(2))
        self.out = nn.Linear(width, in_channels)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, tone: Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        x, condition = self.embed(hidden_states.flatten(2).mT), tone * self.tint + timestep[:, None] / 1000
        for block in self.layers:
            x = block(x, condition)
        sample = self.out(x).mT.unflatten(2, hidden_states.shape[2:])
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


# --- the row ---------------------------------------------------------------------------------------------------------

TOY = Family(
    name="toy",
    class_name="ToyTransformer2DModel",
    matches=lambda config: True,
    quantized=((r"layers\.\d+\.mix", "attn.out"), (r"layers\.\d+\.up", "ff.in"), (r"layers\.\d+\.down", "ff.out")),
    kept=((r"layers\.\d+\.shift", "runs once per image"), (r"embed|out", "few channels")),
    inputs=lambda config: (
        Input("hidden_states", ("batch", config["in_channels"], "height", "width")),
        Input("timestep", ("batch",), "timestep"),
        Input("tone", ("batch", 1)),
    ),
    call=lambda module, inputs: module(**inputs, return_dict=False)[0],
    conditioning="a tone, added to every block's input",
    binned=False,
)


@pytest.fixture(scope="module", autouse=True)
def row() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusers, TOY.class_name, ToyTransformer2DModel, raising=False)
        patch.setitem(FAMILIES, TOY.name, TOY)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("family") / "toy"
    ToyTransformer2DModel().half().float().save_pretrained(path)  # kept weights are rounded to fp16
    return path


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        measure_little(patch.setattr)
        flags = ["--engine", "dit_w4a8", "-m", str(folder), "--target", "cpu", "-o", str(folder.parent / "e")]
        for setting in ("method=rtn", "sampling.n_steps=2", "weights.group_size=32"):
            flags += ["--set", setting]
        assert cli.main(["build", *flags]) == 0
    return folder.parent / "e"


# --- what becomes of them --------------------------------------------------------------------------------------------


def test_it_is_loaded_by_its_row(folder: Path) -> None:
    model = models.load(str(folder))
    assert model.family is TOY and not model.notes
    assert [ref.kind for ref in model.linears()] == ["attn.out", "ff.in", "ff.out"] * 2
    assert dict(model.kept())["layers.1.shift"] == "runs once per image"
    inputs = {name: torch.from_numpy(value) for name, value in models.sample_inputs(model, 2, 0).items()}
    with torch.no_grad():
        expected = ToyTransformer2DModel.from_pretrained(folder)(**inputs).sample
        assert torch.equal(models.denoiser(model)(**inputs), expected)


def test_its_bundle_is_proven(bundle: Path) -> None:
    report = json.loads((bundle / "report" / "parity.json").read_text())
    assert report["passed"] and {gate["name"] for gate in report["gates"]} >= {"cpu/codes_equal", "onnx/codes_equal"}
    manifest = load(bundle).manifest
    assert manifest["model"]["family"] == "toy" and manifest["counts"]["quantized"] == 6


def test_its_engine_draws_in_the_place_of_the_model(bundle: Path, folder: Path) -> None:
    inputs = models.sample_inputs(models.load(str(folder)), 3, 1)
    engine = load(bundle).as_diffusers("cpu")
    try:
        sample = engine(**{name: torch.from_numpy(value) for name, value in inputs.items()}).sample.numpy()
        with pytest.raises(RecipeError, match=r"input tone is missing; pass it, with shape \[batch, 1\]"):
            engine(torch.from_numpy(inputs["hidden_states"]), torch.from_numpy(inputs["timestep"]), None)
    finally:
        engine.engine.close()
    portable = load(bundle).engine("onnx")
    try:
        np.testing.assert_allclose(sample, portable.run(inputs)["sample"], atol=1e-4)
    finally:
        portable.close()
