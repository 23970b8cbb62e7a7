"""Calibrations as a whole of two small blocks: data are sampled, blocks observed, group sizes searched, branches tuned.

The denoiser is made here, so that nothing is loaded; tests of each method with true models stand beside this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export.checkpoint import QuantizedLinear, shared_router
from export.formats.format import get_format
from export.models import torch_modules
from export.models.families import Family, Input
from export.models.load import LoadedModel
from pipeline.calibrate import calibrate
from pipeline.recipe import Recipe, with_settings
from tests.support.observed import KINDS, WIDTH, Block

CONFIG = {"in_channels": 4, "sample_size": 4, "patch_size": 1}
FAMILY = Family(
    name="toy",
    class_name="Toy",
    matches=lambda _: True,
    quantized=tuple((rf"blocks\.\d\.{name}", kind) for name, kind in KINDS.items()),
    kept=((".*", "outside the blocks"),),
    inputs=lambda _: (
        Input("hidden_states", ("batch", 4, "height", "width")),
        Input("timestep", ("batch",), "timestep"),
    ),
    call=lambda module, inputs: module(**inputs),
    conditioning="none",
)
SETTINGS = (
    "calibrate.size=2",
    "calibrate.timesteps=2",
    "sampling.n_steps=2",
    "sampling.guidance_scale=2.0",
    "weights.group_size=8",
)


class Toy(nn.Module):
    """Cells [B, 4, H, W] -> tokens [B, H W, WIDTH], shifted by the timestep -> two blocks -> cells."""

    def __init__(self) -> None:
        super().__init__()
        self.config = CONFIG
        self.proj_in, self.proj_out = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        tokens = self.proj_in(hidden_states.flatten(2).mT) + torch.sin(timestep / 100)[:, None, None]
        for block in self.blocks:
            tokens = block(tokens)
        cells: Tensor = self.proj_out(tokens).mT.reshape(hidden_states.shape)
        return cells


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    monkeypatch.setenv("DITC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch_modules, "set_resolution", lambda *_: None)  # it has no table of positions
    torch.manual_seed(0)
    files: Any = None
    return LoadedModel(
        FAMILY, CONFIG, tmp_path, "toy", Toy().eval().requires_grad_(False), revision="", sha256="toy", files=files
    )


def layers_of(model: LoadedModel, folder: Path, *settings: str) -> list[QuantizedLinear]:
    return calibrate(model, with_settings(Recipe("t", "toy"), [*SETTINGS, *settings]), folder)


def test_msfp_tunes_branches_and_nothing_else(
    model: LoadedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    few = ("iterations=3", "batch=4", "lora_rank=2")
    settings = ("method=msfp", "formats.activation=E2M1", *(f"calibrate.options.{option}" for option in few))
    tuned = layers_of(model, tmp_path / "tuned", *settings)
    plain = layers_of(model, tmp_path / "plain", *settings, "calibrate.options.use_lora=false")
    assert len(tuned) == 2 * len(KINDS) and shared_router(tuned).branches == 2
    for layer, before in zip(tuned, plain, strict=True):
        np.testing.assert_array_equal(layer.codes, before.codes)
        assert before.lora_up is None and layer.lora_up.any(), f"{layer.name} has learned"
    one_sided = {layer.kind for layer in tuned if not get_format(layer.activation_format).sign_bits}
    assert one_sided == {"ff.out"}, "only what stands behind GELU may go without a sign"
    # Two prompts in two halves at two steps.
    assert "calibration on 8 samples needs about" in caplog.text
    assert "TALoRA branch 1 serves timesteps" in caplog.text


def test_qdit_searches_group_sizes_within_the_bytes_of_the_recipe(
    model: LoadedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    settings = ("method=qdit", "weights.granularity=group", "formats.activation=INT8")
    search = ("search=proxy", "sizes=4,8,16", "generations=1", "population=4", "samples=4", "rows=16")
    plain = layers_of(model, tmp_path / "plain", *settings)
    chosen = layers_of(model, tmp_path / "searched", *settings, *(f"calibrate.options.{key}" for key in search))
    assert {layer.group_size for layer in plain} == {8} and {layer.group_size for layer in chosen} <= {4, 8, 16}
    assert sum(layer.size_bytes for layer in chosen) <= sum(layer.size_bytes for layer in plain)
    assert {layer.activation_group for layer in chosen} <= {0, 4, 8} and "searched 4 candidates" in caplog.text
