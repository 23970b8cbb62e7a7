"""A folder of diffusers is built whole: components, tokenizer, scheduler; and drawn with, with no part of diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ditc import Pipeline
from export.errors import ContractError
from pipeline import __main__ as cli
from pipeline import load
from pipeline.bundle.pipeline_bundle import load_pipeline
from pipeline.generate import latent_model
from pipeline.verify import pipeline_gates
from tests.support import pipelines
from tests.support.quick_build import measure_little
from tests.support.tiny_text import t5_folder

pytestmark = [pytest.mark.torch, pytest.mark.slow]
COMPONENTS = ["text_encoder", "transformer", "vae_decoder"]
GATES = {"tokenizer/ids_differing", "picture_psnr_db"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PixArt-alpha, with a text encoder whose linears have groups of 64."""
    path = tmp_path_factory.mktemp("whole") / "pixart"
    pipelines.write("alpha", path, caption_channels=64)
    shutil.rmtree(path / "text_encoder")
    t5_folder(path)
    return path


def build(folder: Path, output: Path, *more: str) -> int:
    """Nothing that quantization costs random weights is asked about here."""
    settings = ["method=rtn", "calibrate.size=2", "budgets.quant_sqnr_db=0", "budgets.final_psnr_fp_db=0"]
    flags = [flag for setting in settings for flag in ("--set", setting)]
    with pytest.MonkeyPatch.context() as patch:
        measure_little(patch.setattr)
        return cli.main(
            ["build", "--engine", "pixart_w4a6", "-m", str(folder), "--target", "cpu", "--n-steps", "2",
             "-o", str(output), *flags, *more]
        )  # fmt: skip


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    output = folder.parent / "engine"
    assert build(folder, output) == 0
    return output


def test_its_components_are_bundles_and_its_own_gates_hold(bundle: Path) -> None:
    whole = load_pipeline(bundle)
    assert sorted(whole.components) == COMPONENTS and whole.class_name == "PixArtAlphaPipeline"
    report = json.loads((bundle / "report" / "parity.json").read_text())
    assert report["passed"] and {gate["name"] for gate in report["gates"]} == GATES
    assert all(json.loads((bundle / name / "report/parity.json").read_text())["passed"] for name in COMPONENTS)
    assert load(bundle / "text_encoder").manifest["counts"]["quantized"] == 14


def test_it_draws(bundle: Path) -> None:
    with Pipeline.load(bundle) as pipeline:
        output = pipeline("a red circle", num_inference_steps=3, num_images_per_prompt=2, seed=5, output_type="np")
        again = pipeline("a red circle", num_inference_steps=3, seed=6, output_type="np")
    assert output.images.shape == (2, 64, 64, 3) and np.isfinite(output.images).all()
    assert output.seeds == (5, 6) and set(output.seconds) == set(COMPONENTS)
    np.testing.assert_allclose(again.images[0], output.images[1], atol=1e-2)


def test_a_component_is_replaced_and_the_others_stay(bundle: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "engine"
    shutil.copytree(bundle, output)
    before = load_pipeline(output).manifest["components"]
    assert build(folder, output, "--component", "text_encoder", "--set", "components.text_encoder.formats.weight=INT8") == 0
    whole = load_pipeline(output)
    assert {layer["weight_format"] for layer in whole.components["text_encoder"].manifest["layers"]} == {"INT8"}
    after = whole.manifest["components"]
    assert {name for name in COMPONENTS if before[name] != after[name]} == {"text_encoder"}


def test_what_was_built_before_is_taken_over(
    bundle: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "engine"
    shutil.copytree(bundle, output)
    assert build(folder, output) == 2, "it exists"
    assert "exists; add --force" in capsys.readouterr().out
    assert build(folder, output, "--force") == 0
    log = capsys.readouterr().err
    assert all(f"{name}: as in {output}, taken over" in log for name in COMPONENTS)
    assert load_pipeline(output).manifest["components"] == load_pipeline(bundle).manifest["components"]


def test_finished_components_outlive_one_that_fails(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A budget that no quantization meets fails the denoiser's gates; the text encoder is there when it is resumed."""
    output = tmp_path / "engine"
    assert build(folder, output, "--set", "budgets.quant_sqnr_db=200") == 4
    assert not output.exists() and (tmp_path / "rejected/engine/transformer/report/parity.json").is_file()
    capsys.readouterr()
    assert build(folder, output) == 2
    assert "holds an interrupted build" in capsys.readouterr().out
    assert build(folder, output, "--resume") == 0
    assert "text_encoder: built before, taken over" in capsys.readouterr().err
    assert sorted(load_pipeline(output).components) == COMPONENTS and not (tmp_path / "engine.partial").exists()


# What lies between components, spoilt: each in a way that a component's own gates cannot see.
FAULTS = {
    "a mask of ones": (
        "_encode", lambda right: lambda self, *rest: {k: np.ones_like(v) if "mask" in k else v
                                                      for k, v in right(self, *rest).items()},
    ),
    "a scaling factor forgotten": ("_decode", lambda right: lambda self, x, **rest: right(self, x * np.float32(0.9), **rest)),
    "another size told": (
        "_condition", lambda right: lambda self, *rest: {k: v * 2 if k == "resolution" else v
                                                         for k, v in right(self, *rest).items()},
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_between_components_fails_the_picture(
    fault: str, bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.parts import read_folder

    whole = load_pipeline(bundle)
    recipe = whole.components["transformer"].recipe
    name, spoil = FAULTS[fault]
    monkeypatch.setattr(latent_model.LatentModel, name, spoil(getattr(latent_model.LatentModel, name)))
    report = pipeline_gates.pipeline_report(whole, read_folder(_of(recipe, folder)))
    failed = {gate.name for gate in report.failures()}
    assert failed == {"picture_psnr_db"}, report.sentence()


def _of(recipe: object, folder: Path) -> object:
    from dataclasses import replace

    return replace(recipe, model=str(folder))  # type: ignore[type-var]


def test_damage_in_a_component_is_found_before_anything_runs(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "engine"
    shutil.copytree(bundle, output)
    (output / "vae_decoder/config.json").write_text("{}")
    with pytest.raises(ContractError, match=r"vae_decoder/config\.json has 2 bytes"):
        Pipeline.load(output)
