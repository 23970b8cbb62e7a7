"""Random T5 encoders of true form: same arguments, same bytes; live signals; outliers where they are planted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from benchmarks.zoo.make_t5_xxl import STREAM, config_of, outliers, tensor, write
from export.models.load import denoiser, load, sample_inputs

pytestmark = pytest.mark.torch
SMALL = dict(layers=2, width=512, ff=1024, heads=2, vocabulary=300)


def test_it_is_loaded_and_its_signals_live(tmp_path: Path) -> None:
    parameters = write(tmp_path, config_of(**SMALL), shard_bytes=1_000_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    model = load(str(tmp_path))
    assert model.parameters == parameters and model.family.name == "t5" and len(model.linears()) == 14
    with torch.no_grad():
        output = denoiser(model)(**{k: torch.from_numpy(v) for k, v in sample_inputs(model, 2, 0).items()})
    assert 0.1 < output.std() < 10


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, config_of(**SMALL), seed=3)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    write(tmp_path / "c", config_of(**SMALL), seed=3, planted=False)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ac")
    assert any(not np.array_equal(one[name], other[name]) for name in one)


def test_the_stream_has_the_same_outliers_in_every_block() -> None:
    chosen = outliers(512, 0)
    for layer in range(2):
        weight = tensor(f"encoder.block.{layer}.layer.1.DenseReluDense.wo.weight", (512, 64), 2, 0).astype(float)
        sizes = np.sqrt(np.mean(weight**2, 1))
        assert set(np.flatnonzero(sizes > STREAM / 2 * np.median(sizes))) == set(chosen)
