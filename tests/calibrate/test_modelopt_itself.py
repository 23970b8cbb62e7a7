"""ModelOpt's own algorithms, in our formats and in its own, through to a proven engine. They run in an environment that
has ModelOpt."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from benchmarks.tools.environments import CannotBeHadError
from export import checkpoint, to_onnx
from export.errors import RecipeError
from export.models import nvfp4
from export.models.load import LoadedModel, denoiser, load, sample_inputs
from pipeline import recipe as recipes
from pipeline.backends.reference import ReferenceEngine, fake_quant
from pipeline.backends.side_by_side import single_threaded_torch
from pipeline.calibrate import adopt, calibrate
from pipeline.calibrate.modelopt import backend
from pipeline.calibrate.modelopt.take_over import RECIPE_FILE, recipe_of_file
from pipeline.generate import case as picture_case
from pipeline.verify.effort import LARGE_INSIDE, Effort
from pipeline.verify.proof import verify_target
from pipeline.verify.report import Report
from pipeline.verify.study import study
from tests.calibrate.test_methods_gates import lowered, portable
from tests.support import tiny
from tests.support.environments import python_with, without_xdist

pytestmark = [pytest.mark.slow, pytest.mark.process]
REQUIREMENT = "nvidia-modelopt>=0.47,<0.48"
ROOT = Path(__file__).parent.parent.parent
SETTINGS = ["sampling.n_steps=2", "sampling.guidance_scale=1.0", "attention.qk=float", "attention.pv=float"]
EXACT = ("max", "mse", "awq", "gptq", "smoothquant")
FLOAT8 = ("fp8", "fp8_token", "fp8_svdquant")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(str(tiny.folder("pixart", tmp_path_factory.mktemp("model"))))


@pytest.fixture(scope="module")
def results(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that tests/support/modelopt_run.py fills."""
    try:
        python = python_with("modelopt", REQUIREMENT)
    except CannotBeHadError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("results")
    words = [str(python), "-m", "tests.support.modelopt_run", model.source, str(folder)]
    environment = without_xdist() | {"DITC_CACHE": str(tmp_path_factory.mktemp("cache"))}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def base(model: LoadedModel, *more: str) -> recipes.Recipe:
    return recipes.with_settings(recipes.load("pixart_w4a6"), [*SETTINGS, f"model={model.source}", *more])


def taken(model: LoadedModel, results: Path, case: str, folder: Path) -> tuple[recipes.Recipe, Any]:
    """The recipe of what ModelOpt saved, and its layers."""
    recipe = recipe_of_file(model, base(model), results / f"{case}.pt")
    return recipe, calibrate(model, recipe, folder)


def sample(model: LoadedModel, layers: Any) -> Any:
    with single_threaded_torch():  # as ModelOpt's: the number of threads decides the order of float32 sums
        return ReferenceEngine(fake_quant(model, layers, torch.float32)).run(sample_inputs(model, 2, 0))["sample"]


@pytest.mark.parametrize("case", [*EXACT, *FLOAT8, "svdquant", "auto", "int8"])
def test_weights_are_those_that_modelopt_multiplies_with(
    case: str, model: LoadedModel, results: Path, tmp_path: Path
) -> None:
    """To the bit, but integers, which it divides: two roundings."""
    _, layers = taken(model, results, case, tmp_path)
    with np.load(results / f"{case}.npz") as theirs:
        for layer in layers:
            own = layer.dequantized().astype(np.float32)
            np.testing.assert_allclose(own, theirs[layer.name], rtol=2.0**-22 if case == "int8" else 0)
    if case != "auto":
        assert all((layer.input_multiplier is not None) is (case in BALANCED) for layer in layers)
    assert all((layer.lora_down is not None) is ("svdquant" in case) for layer in layers)


BALANCED = ("awq", "smoothquant", "svdquant", "fp8_svdquant", "int8")


@pytest.mark.parametrize("case", EXACT)
def test_the_reference_gives_what_modelopts_module_gives(
    case: str, model: LoadedModel, results: Path, tmp_path: Path
) -> None:
    with np.load(results / f"{case}.npz") as theirs:
        np.testing.assert_array_equal(sample(model, taken(model, results, case, tmp_path)[1]), theirs["sample"])


@pytest.mark.parametrize("case", [*FLOAT8, "svdquant", "auto", "int8"])
def test_the_reference_is_close_where_roundings_differ(
    case: str, model: LoadedModel, results: Path, tmp_path: Path
) -> None:
    """Codes of a few activations lie on the other side of a midpoint: far below what quantization itself costs."""
    own = sample(model, taken(model, results, case, tmp_path)[1])
    whole = ReferenceEngine(denoiser(model)).run(sample_inputs(model, 2, 0))["sample"]
    with np.load(results / f"{case}.npz") as theirs:
        away, cost = (float(np.square(own - other).mean()) for other in (theirs["sample"], whole))
    assert away < 0.05 * cost


def test_a_live_module_gives_the_layers_of_the_file(model: LoadedModel, results: Path, tmp_path: Path) -> None:
    _, layers = taken(model, results, "awq", tmp_path / "file")
    recipe = recipes.load(str(results / "live" / RECIPE_FILE))
    live = adopt(model, recipe, results / "live", tmp_path / "live")
    for one, other in zip(layers, live, strict=True):
        for key in ("codes", "scales", "multipliers", "input_multiplier"):
            np.testing.assert_array_equal(getattr(one, key), getattr(other, key))


@pytest.mark.parametrize("name", [name for name in vars(backend) if name.endswith("_CFG")])
def test_modelopt_calibrates_by_every_configuration(name: str, results: Path) -> None:
    config = getattr(backend, name)
    [weight, activation] = [row["cfg"]["backend_extra_args"] for row in config["quant_cfg"] if "cfg" in row]
    for layer in checkpoint.load(results / "presets" / name):
        assert (layer.weight_format, layer.activation_format) == (weight["format"], activation["format"])
        assert (layer.granularity, layer.group_size) == (weight["granularity"], weight["group_size"])


def test_a_folder_of_save_pretrained_gives_the_layers_of_the_file(
    model: LoadedModel, results: Path, tmp_path: Path
) -> None:
    _, layers = taken(model, results, "int8", tmp_path / "file")
    folders = calibrate(model, recipe_of_file(model, base(model), results / "folder"), tmp_path / "folder")
    for one, other in zip(layers, folders, strict=True):
        for key in ("codes", "scales", "bias", "input_multiplier", "activation_scale"):
            np.testing.assert_array_equal(getattr(one, key), getattr(other, key))


def test_auto_quantize_mixes_formats(model: LoadedModel, results: Path, tmp_path: Path) -> None:
    """Within its bits, whose sum over all linears is what the configurations state."""
    _, layers = taken(model, results, "auto", tmp_path)
    assert len({layer.weight_format for layer in layers}) > 1 and len({layer.activation_format for layer in layers}) > 1
    assert len({layer.granularity for layer in layers}) > 1
    bits = {("E2M1", "exact_group"): 4 + 4 / 32, ("E2M1", "group"): 5, ("E2M3", "per_channel"): 6}
    sizes = [layer.in_features * layer.out_features for layer in layers]
    taken_bits = [bits.get((layer.weight_format, layer.granularity), 8) for layer in layers]
    assert 5 < np.average(taken_bits, weights=sizes) <= 5.5
    assert (results / "refused.txt").read_text() == (
        "effective_bits 4: the smallest of these formats has 4.125; give 4.125 to 16"
    )


def test_linears_that_auto_quantize_leaves_in_float_are_kept_by_the_setting_it_is_told(
    model: LoadedModel, results: Path, tmp_path: Path
) -> None:
    path = results / "auto_floats.pt"
    with pytest.raises(RecipeError, match=r"linears are not quantized; --set 'keep=\[.*\]' keeps them") as caught:
        recipe_of_file(model, base(model), path)
    recipe = base(model, str(caught.value).partition("--set '")[2].partition("'")[0])
    kept = recipes.load_float_model(recipe)
    assert 0 < len(kept.linears()) < len(model.linears())
    layers = calibrate(kept, recipe_of_file(kept, recipe, path), tmp_path)
    with np.load(results / "auto_floats.npz") as theirs:
        for layer in layers:
            np.testing.assert_array_equal(layer.dequantized().astype(np.float32), theirs[layer.name])


def test_nvfp4_weights_are_read_as_modelopt_reads_them(results: Path) -> None:
    with np.load(results / "nvfp4.npz") as parts:
        codes, blocks, whole, weight = (torch.from_numpy(parts[key]) for key in ("codes", "blocks", "whole", "weight"))
    blocks = blocks.view(torch.float8_e4m3fn)
    assert nvfp4.problem(codes, blocks, whole) is None
    assert torch.equal(nvfp4.dequantized(codes, blocks, whole, "fc.weight_scale_2"), weight)


@pytest.mark.torch
@pytest.mark.parametrize("case", ["svdquant", "fp8_token", "auto"])
def test_engines_of_them_pass_the_gates(case: str, model: LoadedModel, results: Path, tmp_path: Path) -> None:
    recipe, layers = taken(model, results, case, tmp_path / "layers")
    to_onnx.export_portable(model, layers, tmp_path / "model.onnx")
    with mock.patch.object(picture_case, "SMALL_PICTURES", 2):
        studied = study(model, layers, recipe)
    report, effort = Report(), Effort((0, 1), studied.probed[-1:], pictures=1, inside=LARGE_INSIDE)
    for path in ("stock", "fused"):
        verify_target("cpu", model, layers, lowered(recipe, path, tmp_path), None, studied, report, effort=effort)
    verify_target("onnx", model, layers, *portable(tmp_path), studied, report, effort=effort)
    assert report.failures() == []
