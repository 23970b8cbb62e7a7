"""A folder of diffusers is built whole: components, tokenizer, scheduler; and drawn with, with no part of diffusers."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from ditc import Pipeline
from export.errors import ContractError
from pipeline import __main__ as cli
from pipeline import compile_pipeline, compiler, load
from pipeline.bundle.pipeline_bundle import load_pipeline
from pipeline.generate import latent_model
from pipeline.generate.example_prompts import PROMPTS_FILE
from pipeline.parts import read_folder
from pipeline.verify import pipeline_gates
from pipeline.verify.report import Report
from tests.support import pipelines
from tests.support.quick_build import measure_little

pytestmark = [pytest.mark.torch, pytest.mark.slow]
PROMPTS = ("a red circle", "two blue rings")
COMPONENTS = ["text_encoder", "transformer", "vae_decoder"]
GATES = {"tokenizer/ids_differing", "picture_psnr_db", "calls_ulps"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = pipelines.write_wide(tmp_path_factory.mktemp("whole") / "pixart")
    (folder / PROMPTS_FILE).write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    return folder


def build(folder: Path, output: Path, *more: str, engine: str = "pixart_w4a6") -> int:
    """Nothing that quantization costs random weights is asked about here."""
    settings = ["method=rtn", "calibrate.size=2", "budgets.quant_sqnr_db=-50", "budgets.final_psnr_fp_db=-50"]
    flags = [flag for setting in settings for flag in ("--set", setting)]
    with pytest.MonkeyPatch.context() as patch:
        measure_little(patch.setattr)
        return cli.main(
            ["build", "--engine", engine, "-m", str(folder), "--target", "cpu", "--n-steps", "2",
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
    page = (bundle / "report" / "index.html").read_text()
    links = {(bundle / "report" / link).resolve() for link in re.findall(r"href='([^']*)'", page)}
    assert {bundle / name / "report/index.html" for name in COMPONENTS} <= links
    assert all(link.is_file() for link in links) and "PASSED" in page
    assert load(bundle / "text_encoder").manifest["counts"]["quantized"] == 14
    for path in bundle.rglob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        said = {row.key for row in model.metadata_props}
        assert model.producer_name == "ditc" and said == {"recipe", "formats", "license"} and model.doc_string, path


def test_it_draws(bundle: Path) -> None:
    with Pipeline.load(bundle) as pipeline:
        assert pipeline.examples == PROMPTS, "those of the pipeline's own file"
        output = pipeline("a red circle", num_inference_steps=3, num_images_per_prompt=2, seed=5, output_type="np")
        again = pipeline("a red circle", num_inference_steps=3, seed=6, output_type="np")
    assert output.images.shape == (2, 64, 64, 3) and np.isfinite(output.images).all()
    assert output.seeds == (5, 6) and set(output.seconds) == set(COMPONENTS)
    np.testing.assert_allclose(again.images[0], output.images[1], atol=1e-2)


def test_a_component_is_replaced_and_the_others_stay(bundle: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "engine"
    shutil.copytree(bundle, output)
    before = load_pipeline(output).manifest["components"]
    setting = "components.text_encoder.formats.weight=INT8"
    assert build(folder, output, "--component", "text_encoder", "--set", setting) == 0
    whole = load_pipeline(output)
    assert {layer["weight_format"] for layer in whole.components["text_encoder"].manifest["layers"]} == {"INT8"}
    after = whole.manifest["components"]
    assert {name for name in COMPONENTS if before[name] != after[name]} == {"text_encoder"}


def test_no_component_of_another_recipe_or_model_is_put_beside_others(
    bundle: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    weights = other / "transformer/diffusion_pytorch_model.safetensors"
    save_file({key: tensor + 1 for key, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    before = load_pipeline(bundle).manifest
    for of, flags, words in (
        (folder, ("--set", "formats.weight=INT8"), "transformer stays in .*another formats.weight .'E2M1', not 'INT8'"),
        (folder, ("--set", "components.vae_decoder.budgets.quant_sqnr_db=-9"), "vae_decoder stays in .*quant_sqnr_db"),
        (other, (), "transformer stays in .*another file of weights than .*other/transformer has"),
    ):
        assert build(of, bundle, "--component", "text_encoder", *flags) == 2
        assert re.search(words, capsys.readouterr().out.splitlines()[-1])
    assert load_pipeline(bundle).manifest == before


def test_a_component_is_replaced_though_the_folder_has_moved(bundle: Path, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "engine")
    shutil.copytree(folder, tmp_path / "moved")
    assert build(tmp_path / "moved", tmp_path / "engine", "--component", "vae_decoder", "--dry-run") == 0


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


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_stages_of_a_first_component_outlive_an_interruption(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "engine"
    monkeypatch.setattr(compiler, "verified", interrupted)
    assert build(folder, output) == 130
    saved = f"interrupted; state saved in {output}.partial; run the same command again with --resume"
    assert capsys.readouterr().out.splitlines()[-1] == f"FAILED {saved}"
    assert build(folder, output, "--resume") == 130
    log = capsys.readouterr().err
    assert "component text_encoder" in log and "calibrate ..." not in log
    assert all(f"{stage}: done before" in log for stage in ("calibrate", "export", "cpu", "onnx"))


def test_finished_components_outlive_a_first_one_that_fails_when_it_is_resumed(
    bundle: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "engine"
    shutil.copytree(bundle, output)
    with monkeypatch.context() as patch:
        patch.setattr(compile_pipeline, "proven", interrupted)
        assert build(folder, output, "--force") == 130
    shutil.rmtree(output)
    assert build(folder, output, "--resume", "--set", "components.text_encoder.budgets.quant_sqnr_db=200") == 4
    left = tmp_path / "engine.partial/bundle"
    assert {path.parent.name for path in left.glob("*/manifest.json")} == set(COMPONENTS)


# Parts of these are so narrow that groups have 32 channels.
NARROW = ("weights.group_size=32", "budgets.quant_sqnr_db=-50")
OTHERS = {
    "dit": ("dit_w4a8", (), "one", ["transformer", "vae_decoder"]),
    "hunyuan12": (
        "hunyuan_w4a6", ("text_encoder", "text_encoder_2"), "a red circle",
        ["text_encoder", "text_encoder_2", "transformer", "vae_decoder"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_pipelines_are_built_whole_and_draw(name: str, tmp_path: Path) -> None:
    engine, encoders, prompt, components = OTHERS[name]
    root = pipelines.write(name, tmp_path / "pipeline")
    narrow = [NARROW[0], *(f"components.{encoder}.{setting}" for encoder in encoders for setting in NARROW)]
    flags = [flag for setting in narrow for flag in ("--set", setting)]
    assert build(root, tmp_path / "engine", *flags, engine=engine) == 0
    assert sorted(load_pipeline(tmp_path / "engine").components) == components
    with Pipeline.load(tmp_path / "engine") as pipeline:
        output = pipeline(prompt, num_inference_steps=2, output_type="np")
    assert set(output.seconds) == set(components) and np.isfinite(np.asarray(output.images)).all()


def _no_mask(right: Any) -> Any:
    """Padding is seen."""
    return lambda self, *rest: {
        name: np.ones_like(value) if "mask" in name else value for name, value in right(self, *rest).items()
    }


def _longer_mask(right: Any) -> Any:
    """One token of padding is seen."""

    def longer(mask: Any) -> Any:
        mask = mask.copy()
        mask[:, int(mask.sum(axis=1).min())] = 1
        return mask

    return lambda self, *rest: {
        name: longer(value) if "mask" in name else value for name, value in right(self, *rest).items()
    }


def _scaled(by: float) -> Any:
    """Latents are decoded by another scaling factor."""
    return lambda right: lambda self, latents, **rest: right(self, latents * np.float32(by), **rest)


def _guided(scale: float) -> Any:
    """Guidance is not the caller's."""
    return lambda right: lambda self, batches, n_steps, _, *rest: right(self, batches, n_steps, scale, *rest)


def _later(right: Any) -> Any:
    """The model is told of other timesteps than the scheduler's."""

    def spoilt(self: Any, *rest: Any) -> Any:
        scheduler = right(self, *rest)
        scheduler.timesteps = scheduler.timesteps - np.float32(0.01)
        return scheduler

    return spoilt


# What lies between components, spoilt in ways that a component's own gates cannot see: coarsely, and by a little.
FAULTS = {"_encode": _no_mask, "_decode": _scaled(0.9), "start": _guided(2.0)}
SMALL_FAULTS = {"_encode": _longer_mask, "_decode": _scaled(1.0001), "start": _guided(4.4999), "_scheduler": _later}


def gates_of(bundle: Path, folder: Path) -> Report:
    whole = load_pipeline(bundle)
    recipe = whole.components["transformer"].recipe
    return pipeline_gates.pipeline_report(whole, read_folder(replace(recipe, model=str(folder))))


def spoil(faults: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_model.LatentModel, name, faults[name](getattr(latent_model.LatentModel, name)))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_between_components_fails_both_gates(
    fault: str, bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(FAULTS, fault, monkeypatch)
    report = gates_of(bundle, folder)
    assert {gate.name for gate in report.failures()} == {"picture_psnr_db", "calls_ulps"}, report.sentence()


@pytest.mark.parametrize("fault", SMALL_FAULTS)
def test_a_small_fault_fails_the_gate_that_compares_calls(
    fault: str, bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(SMALL_FAULTS, fault, monkeypatch)
    report = gates_of(bundle, folder)
    assert "calls_ulps" in {gate.name for gate in report.failures()}, report.sentence()


@pytest.fixture
def wild(monkeypatch: pytest.MonkeyPatch) -> None:
    """A denoiser in which the last bit of the latents decides all, as where a code flips early in a deep model."""
    right = pipeline_gates.Shared.run

    def run(self: pipeline_gates.Shared, inputs: dict[str, Any]) -> dict[str, Any]:
        outputs = right(self, inputs)
        if self.name != "transformer":
            return outputs
        tokens = inputs["encoder_attention_mask"].sum(axis=1)  # so that guidance has something to go by
        samples = zip(self.move(inputs)["hidden_states"], tokens, strict=True)
        seeds = [list(hashlib.sha256(latents.tobytes() + count.tobytes()).digest()) for latents, count in samples]
        noise = [np.random.default_rng(seed).standard_normal(outputs["sample"][0].shape) for seed in seeds]
        return outputs | {"sample": np.asarray(noise, np.float32)}

    monkeypatch.setattr(pipeline_gates.Shared, "run", run)


def test_where_runs_part_widely_a_right_pipeline_passes(bundle: Path, folder: Path, wild: None) -> None:
    report = gates_of(bundle, folder)
    limit = next(gate.limit for gate in report.gates if gate.name == "picture_psnr_db")
    assert report.passed and limit < 30, report.sentence()


@pytest.mark.parametrize("fault", FAULTS)
def test_where_runs_part_widely_a_fault_still_fails(
    fault: str, bundle: Path, folder: Path, wild: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The picture's own gate lets it pass there."""
    spoil(FAULTS, fault, monkeypatch)
    report = gates_of(bundle, folder)
    assert {gate.name for gate in report.failures()} == {"calls_ulps"}, report.sentence()


def test_it_is_verified_again_whole(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = ["--baseline", str(bundle), "--junit", str(tmp_path / "junit.xml")]
    assert cli.main(["verify", str(bundle), "-o", str(tmp_path / "new"), *results]) == 0
    page = (tmp_path / "new" / "index.html").read_text()
    links = re.findall(r"href='([^']*)'", page)
    assert {"text_encoder/index.html", "parity.json"} <= set(links)
    assert all((tmp_path / "new" / link).is_file() for link in links)
    answer = capsys.readouterr().out
    assert all(f"ok    {name}" in answer for name in ("picture_psnr_db", "calls_ulps", "text_encoder/cpu/gemm_exact"))
    assert all(f"ok    {name}/cpu/finite" in answer for name in COMPONENTS)
    suites = [suite.attrib["name"] for suite in ElementTree.parse(tmp_path / "junit.xml").getroot()]
    assert {f"pixart_w4a6/{name}/cpu" for name in COMPONENTS} < set(suites) and suites[-1] == "pixart_w4a6/baseline"


def test_it_is_compared_whole(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert cli.main(["compare", str(bundle), str(bundle), "--check", "-o", str(page)]) == 0
    answer = capsys.readouterr().out
    assert "gates/calls_ulps" in answer and all(f"bytes/{name}/cpu" in answer for name in COMPONENTS)
    assert "Pictures of transformer" in page.read_text()


def test_inspect_shows_its_components(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(bundle)]) == 0
    answer = capsys.readouterr().out
    assert all(name in answer for name in (*COMPONENTS, "PixArtAlphaPipeline", "tokenizer/tokenizer.json"))
    assert cli.main(["inspect", str(bundle), "--json"]) == 0
    assert sorted(json.loads(capsys.readouterr().out)["components"]) == COMPONENTS


def test_damage_in_a_component_is_found_before_anything_runs(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "engine"
    shutil.copytree(bundle, output)
    (output / "vae_decoder/config.json").write_text("{}")
    with pytest.raises(ContractError, match=r"vae_decoder/config\.json has 2 bytes"):
        Pipeline.load(output)
