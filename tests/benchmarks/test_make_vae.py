"""Random autoencoders of true form: same arguments, same bytes; live signals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.zoo.make_vae import config_of, write
from export.models.load import denoiser, load, sample_inputs

pytestmark = pytest.mark.torch
SMALL = config_of((32, 64), blocks=1, groups=8)


def test_it_is_loaded_and_its_signals_live(tmp_path: Path) -> None:
    parameters = write(tmp_path, SMALL)
    halves = [load(str(tmp_path), half=half) for half in ("decoder", "encoder")]
    assert sum(model.parameters for model in halves) == parameters
    for model in halves:
        inputs = {name: torch.from_numpy(array) for name, array in sample_inputs(model, 2, 0).items()}
        with torch.no_grad():
            assert 0.1 < denoiser(model)(**inputs).std() < 10


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write(tmp_path / name, SMALL, seed)
    one, same, other = ((tmp_path / name / "diffusion_pytorch_model.safetensors").read_bytes() for name in "abc")
    assert one == same != other
