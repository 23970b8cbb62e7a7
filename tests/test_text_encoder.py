"""A text encoder goes the whole way of a denoiser: built, proven by the same gates, called by ids."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from export.errors import RecipeError
from export.models.load import denoiser, sample_inputs
from export.models.load import load as load_model
from pipeline import __main__ as cli
from pipeline import load
from pipeline import recipe as recipes
from pipeline.backends.reference import ReferenceEngine, fake_quant
from pipeline.calibrate import calibrate
from pipeline.distance import sqnr_db
from tests.support.quick_build import measure_little
from tests.support.tiny_text import t5_folder

pytestmark = pytest.mark.torch
# Of a denoiser's gates, those that a text encoder has none of.
OF_PICTURES = {"final_psnr_fp_db", "final_psnr_db"}
GATES = {
    "coverage", "tables", "segments", "quantizers", "calls", "calls_median", "repeats", "finite", "gemm_exact",
    "codes_inadmissible", "scale_error", "linear_output", "codes_equal", "step_sqnr_db", "median_sqnr_db",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return t5_folder(tmp_path_factory.mktemp("pipeline"))


def built(folder: Path, name: str, *more: str) -> Path:
    output = folder.parent / name
    with pytest.MonkeyPatch.context() as patch:
        measure_little(patch.setattr)
        flags = ["--engine", "t5_w4a8", "-m", str(folder), "--target", "cpu", "-o", str(output), *more]
        assert cli.main(["build", *flags]) == 0
    return output


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    return built(folder, "engine")


def test_its_bundle_is_proven(bundle: Path) -> None:
    report = json.loads((bundle / "report" / "parity.json").read_text())
    names = {gate["name"].removeprefix("cpu/") for gate in report["gates"] if gate["passed"]}
    assert report["passed"] and names >= GATES | {"quant_sqnr_db"} and not names & OF_PICTURES
    manifest = load(bundle).manifest
    assert manifest["model"]["family"] == "t5" and manifest["counts"]["quantized"] == 14
    assert {row["path"] for row in manifest["targets"]["cpu"]["choices"].values()} == {"u8 x packed s4"}


def test_its_engines_encode_prompts_of_any_length(bundle: Path, folder: Path) -> None:
    model, opened = load_model(str(folder)), load(bundle)
    cpu, portable = opened.engine("cpu"), opened.engine("onnx")
    try:
        for count, tokens in ((1, 1), (2, 120), (3, 300)):
            inputs = sample_inputs(model, count, 1, tokens=tokens)
            hidden, other = (engine.run(inputs)["last_hidden_state"] for engine in (cpu, portable))
            assert hidden.shape == (count, tokens, 64)
            counted = inputs["attention_mask"].astype(bool)
            error = np.linalg.norm((hidden - other)[counted]) / np.linalg.norm(other[counted])
            assert error < 0.02  # flipped codes
    finally:
        cpu.close()
        portable.close()


def test_an_id_beyond_the_vocabulary_is_refused(bundle: Path) -> None:
    engine = load(bundle).engine("cpu")
    inputs = {"input_ids": np.full((1, 3), 128), "attention_mask": np.ones((1, 3), np.int64)}
    try:
        with pytest.raises(RecipeError, match="give numbers that the model knows"):
            engine.run(inputs)
        with pytest.raises(RecipeError, match="indices and lengths start at 0"):
            engine.run(inputs | {"input_ids": np.full((1, 3), -1)})
    finally:
        engine.close()


def test_it_is_verified_again_looked_into_and_measured(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_little(monkeypatch.setattr)
    for verb in ("verify", "inspect", "bench"):
        assert cli.main([verb, str(bundle)]) == 0, capsys.readouterr().out
    assert "picture of" not in capsys.readouterr().out


def test_it_draws_nothing(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", str(bundle), "--prompt", "a", "-o", str(tmp_path / "a.png")]) == 2
    assert "is a text encoder, which draws nothing" in capsys.readouterr().err
    with pytest.raises(RecipeError, match="is a text encoder, which draws nothing"):
        load(bundle).as_diffusers()


def test_methods_that_look_at_inputs_calibrate_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DITC_CACHE", str(tmp_path / "cache"))
    model, recipe = load_model(str(folder)), recipes.load("t5_w4a8")
    settings = [
        "method=qdit",
        'calibrate.options={activations="per_token", rows=512, range="recipe"}',
        "calibrate.size=16",
    ]
    errors = {}
    for name, given in {"rtn": [], "gptq": settings}.items():
        layers = calibrate(model, recipes.with_settings(recipe, given), tmp_path / name)
        engines = ReferenceEngine(denoiser(model)), ReferenceEngine(fake_quant(model, layers, torch.float32))
        inputs = sample_inputs(model, 8, 3)
        counted = inputs["attention_mask"].astype(bool)
        hidden, quantized = (engine.run(inputs)["last_hidden_state"][counted] for engine in engines)
        errors[name] = sqnr_db(hidden, quantized)
    assert errors["gptq"] > errors["rtn"] + 0.5, errors


def test_a_method_that_looks_at_steps_is_refused(folder: Path, tmp_path: Path) -> None:
    recipe = recipes.with_settings(recipes.load("t5_w4a8"), ["method=msfp"])
    with pytest.raises(RecipeError, match=r"msfp looks at the steps of a sampler, and .* is a text encoder"):
        calibrate(load_model(str(folder)), recipe, tmp_path)


@pytest.mark.slow
def test_a_bundle_without_the_portable_model(folder: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    single = built(folder, "single", "--drop-portable")
    names, whole = ({path.relative_to(root).as_posix() for path in root.rglob("*")} for root in (single, bundle))
    assert whole - names == {"model.onnx", "model.onnx.data"} and not names - whole
    assert (
        load(single).targets == ("cpu",)
        and (single / "cpu/model.onnx").read_bytes() == (bundle / "cpu/model.onnx").read_bytes()
    )
    names = {
        gate["name"].partition("/")[0] for gate in json.loads((single / "report" / "parity.json").read_text())["gates"]
    }
    assert names == {"quant_sqnr_db", "cpu"}
    assert cli.main(["verify", str(single)]) != 0
    assert "has no portable model, from which engines are lowered again" in capsys.readouterr().out
