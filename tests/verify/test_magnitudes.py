"""Up to the largest numbers that an engine takes it computes what PyTorch does; beyond them it refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from export.errors import RecipeError
from export.models import load as models
from export.to_onnx import export_portable
from pipeline import recipe as recipes
from pipeline.backends.cpu import CpuBackend
from pipeline.backends.cpu.engine import CpuEngine
from pipeline.backends.feeds import LARGEST, LARGEST_OF
from pipeline.distance import sqnr_db
from pipeline.verify.proof import drawn
from tests.support import native, tiny

pytestmark = [pytest.mark.torch, pytest.mark.kernels]

# At ordinary numbers the engines of this model are 120 dB from the float64 reference, and no code flips. Of a timestep
# the phase is rounded to float32: 2^14 * 2^-24 rad is 60 dB of one embedding, which the network lessens.
LEAST_DB = {"hidden_states": 100.0, "encoder_hidden_states": 100.0, "timestep": 60.0}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The float64 reference, engines by `cpu.path`, and a call."""
    import torch

    from pipeline.backends.reference import ReferenceEngine, fake_quant

    root = tmp_path_factory.mktemp("magnitudes")
    model = models.load(str(tiny.folder("pixart", root)))
    layers = tiny.quantized(model, granularity="exact_group")
    export_portable(model, layers, root / "model.onnx")
    engines = {path: build(root, path) for path in ("stock", "fused")[: 1 if native.problem() else 2]}
    exact = ReferenceEngine(fake_quant(model, layers, torch.float64), torch.float64)
    return exact, engines, models.sample_inputs(model, 2, 0)


def build(root: Path, path: str) -> CpuEngine:
    recipe = recipes.from_dict({"name": "tiny", "model": "here", "cpu": {"path": path}}, "test")
    for folder in (root / f"work-{path}", root / path):
        folder.mkdir()
    CpuBackend().build(CpuBackend().lower(root / "model.onnx", root / f"work-{path}", recipe), root / path, recipe)
    return CpuEngine(root / path, threads=1)


@pytest.mark.parametrize("name", LEAST_DB)
def test_the_largest_numbers_give_what_pytorch_gives(name: str, built: Any) -> None:
    exact, engines, inputs = built
    limit = LARGEST_OF.get(name, LARGEST)
    largest = np.abs(inputs[name]).max()
    inputs = inputs | {name: (inputs[name] * (limit / largest * (1 - 2**-20))).astype(np.float32)}
    expected = exact.run(inputs)["sample"]
    for path, engine in engines.items():
        assert sqnr_db(expected, engine.run(inputs)["sample"]) > LEAST_DB[name], path


@pytest.mark.parametrize("value", [2.0**41, -1e19, 1e30])
@pytest.mark.parametrize("name", LEAST_DB)
def test_larger_ones_are_refused(name: str, value: float, built: Any) -> None:
    """1e19 and above gave finite numbers that were wrong: the squares of a norm overflow, and its result is zero."""
    _, engines, inputs = built
    array = inputs[name].copy()
    array.reshape(-1)[-1] = value
    for engine in engines.values():
        with pytest.raises(RecipeError, match=f"input {name} holds .*; the engine takes numbers of magnitude up to"):
            engine.run(inputs | {name: array})


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("name", LEAST_DB)
def test_what_is_not_finite_gives_nan_where_pytorch_does(name: str, value: float, built: Any) -> None:
    """In the sample that has it, and in no other."""
    exact, engines, inputs = built
    array = inputs[name].copy()
    array[1].reshape(-1)[-1:] = value
    if name == "timestep":
        array[1] = value
    expected = exact.run(inputs | {name: array})["sample"]
    assert np.isfinite(expected[0]).all() and not np.isfinite(expected[1]).any()
    for path, engine in engines.items():
        output = engine.run(inputs | {name: array})["sample"]
        assert not np.isfinite(output[1]).any(), path
        assert sqnr_db(expected[0], output[0]) > 100, path


def test_an_engine_that_diverges_fails_its_gates_in_pictures_of_nan(built: Any) -> None:
    """Not in an error: its own latents, step after step, are not somebody's wrong input."""
    _, engines, inputs = built

    def draw(run: Any) -> Any:
        return run(inputs | {"hidden_states": run(inputs)["sample"][:, :4] * np.float32(1e30)})["sample"]

    case = SimpleNamespace(draw=draw, noise=np.zeros((2, 4, 8, 8), np.float32))
    pictures = drawn(engines["stock"].run, case)  # type: ignore[arg-type]
    assert pictures.shape == (2, 4, 8, 8) and np.isnan(pictures).all()
