"""CLIP and BERT encoders go the whole way of T5's, with all of their outputs, and the gates see what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from export import to_onnx
from export.checkpoint import QuantizedLinear
from export.errors import ContractError, RecipeError
from export.models import clip_modules, text_modules
from export.models.load import LoadedModel, sample_inputs
from export.models.load import load as load_model
from pipeline import __main__ as cli
from pipeline import load
from pipeline import recipe as recipes
from pipeline.backends import BACKENDS
from pipeline.calibrate import calibrate
from pipeline.recipe import Recipe
from pipeline.verify.proof import verify_target
from pipeline.verify.report import Report
from pipeline.verify.study import Study, joined, study, units_of
from tests.support.quick_build import measure_little
from tests.support.tiny_text import bert_folder, clip_folder
from tests.support.traces import TRACE
from tests.test_text_encoder import GATES, OF_PICTURES

pytestmark = pytest.mark.torch
PROJECTED = "CLIPTextModelWithProjection"
OUTPUTS = {
    "clip_projection": {"last_hidden_state": (77, 64), "pooled": (32,), "penultimate_hidden_state": (77, 64)},
    "bert": {"last_hidden_state": (77, 64)},
}
RECIPES = {"clip_projection": "clip_w4a8", "bert": "bert_w4a8"}


@pytest.fixture(scope="module", params=RECIPES)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each family, built by the command line; its model lies beside it."""
    parent = tmp_path_factory.mktemp("pipeline")
    folder = bert_folder(parent) if request.param == "bert" else clip_folder(parent, kind=PROJECTED)
    with pytest.MonkeyPatch.context() as patch:
        measure_little(patch.setattr)
        flags = ["--engine", RECIPES[request.param], "-m", str(folder), "--target", "cpu", "-o", str(parent / "engine")]
        assert cli.main(["build", *flags]) == 0
    return parent / "engine"


def test_its_bundle_is_proven(bundle: Path) -> None:
    report = json.loads((bundle / "report" / "parity.json").read_text())
    names = {gate["name"].removeprefix("cpu/") for gate in report["gates"] if gate["passed"]}
    assert report["passed"] and names >= GATES | {"quant_sqnr_db"} and not names & OF_PICTURES
    manifest = load(bundle).manifest
    assert manifest["counts"]["quantized"] == 12
    assert {row["path"] for row in manifest["targets"]["cpu"]["choices"].values()} == {"u8 x packed s4"}
    outputs = OUTPUTS[manifest["model"]["family"]]
    ends = [row["output"] for row in report["segments"] if row["layer"] is None and row["target"] == "cpu"]
    assert ends == (list(outputs) if len(outputs) > 1 else [None])


def test_its_engines_encode_prompts_of_any_length(bundle: Path) -> None:
    model, opened = load_model(str(bundle.parent / "text_encoder")), load(bundle)
    cpu, portable = opened.engine("cpu"), opened.engine("onnx")
    try:
        for count, tokens in ((1, 1), (3, 77)):
            inputs = sample_inputs(model, count, 1, tokens=tokens)
            counted = inputs["attention_mask"].astype(bool)
            outputs, others = (engine.run(inputs) for engine in (cpu, portable))
            assert set(outputs) == set(OUTPUTS[model.family.name])
            for name, shape in OUTPUTS[model.family.name].items():
                assert outputs[name].shape == (count, *(tokens if size == 77 else size for size in shape))
                rows = counted if outputs[name].ndim == 3 else slice(None)
                error = np.linalg.norm((outputs[name] - others[name])[rows]) / np.linalg.norm(others[name][rows])
                assert error < 0.02, name  # flipped codes
    finally:
        cpu.close()
        portable.close()


def test_a_prompt_beyond_its_positions_is_refused(bundle: Path) -> None:
    engine = load(bundle).engine("cpu")
    try:
        with pytest.raises((RecipeError, ContractError), match="no more tokens than"):
            engine.run({"input_ids": np.full((1, 100), 5), "attention_mask": np.ones((1, 100), np.int64)})
    finally:
        engine.close()


def test_it_is_verified_again_looked_into_and_measured(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_little(monkeypatch.setattr)
    for verb in ("verify", "inspect", "bench"):
        assert cli.main([verb, str(bundle)]) == 0, capsys.readouterr().out
    assert "picture of" not in capsys.readouterr().out


# --- several outputs judged as one ----------------------------------------------------------------------------------


@pytest.mark.fast
def test_outputs_count_alike() -> None:
    rng = np.random.default_rng(0)
    counted = np.array([[1, 1, 0], [1, 0, 0]])
    outputs = {"hidden": 100 * rng.standard_normal((2, 3, 8)), "pooled": rng.standard_normal((2, 4))}
    units = units_of(outputs, counted)
    assert units["hidden"] > 50 > units["pooled"]
    one = joined(outputs, units, 3)["outputs"]
    assert one.shape == (2, 3, 12)
    np.testing.assert_allclose(np.mean(one[counted.astype(bool)][:, :8] ** 2), 1)
    assert (one[:, 0, 8:] == one[:, 2, 8:]).all()
    assert set(joined({"hidden": outputs["hidden"]}, units, 3)) == {"hidden"}
    assert set(joined(outputs | {"hidden": outputs["hidden"][:, :2]}, units, 3)) == {"hidden"}


# --- faults ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A tiny CLIP whose end token is not the largest id, with its references."""

    model: LoadedModel
    recipe: Recipe
    layers: list[QuantizedLinear]
    study: Study
    folder: Path

    def failures(self, where: Any = None, name: str = "", fault: Callable[..., Any] | None = None) -> set[str]:
        """Gates that fail for an engine that is exported with `fault` in the place of what `where` calls `name`."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(to_onnx, "_traced", TRACE)  # not an earlier one, without the fault
            if isinstance(where, dict):
                patch.setitem(where, name, fault)
            elif where is not None:
                patch.setattr(where, name, fault)
            to_onnx.export_portable(self.model, self.layers, self.folder / "model.onnx")
        lowered = self.folder / "cpu"
        lowered.mkdir(exist_ok=True)
        graph = BACKENDS["cpu"].lower(self.folder / "model.onnx", lowered, self.recipe)
        report = Report()
        verify_target("cpu", self.model, self.layers, graph, None, self.study, report)
        return {gate.name.removeprefix("cpu/") for gate in report.failures()}


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tmp_path_factory.mktemp("faults")
    model, recipe = load_model(str(clip_folder(folder, eos_token_id=100))), recipes.load("clip_w4a8")
    layers = calibrate(model, recipe, folder / "calibrate")
    return Subject(model, recipe, layers, study(model, layers, recipe), folder)


def one_more_key(tokens: int, like: Tensor) -> Tensor:
    place = torch.arange(tokens)
    return (place[None, :] > place[:, None] + 1).to(like.dtype)[None, None] * text_modules.HOLE


def rows_of_the_last_token(input_ids: Tensor, eos_token_id: int) -> Tensor:
    batch, tokens = input_ids.shape
    return torch.arange(batch) * tokens + tokens - 1


def rows_of_the_largest_id(input_ids: Tensor, eos_token_id: int) -> Tensor:
    return END_ROWS(input_ids, clip_modules.LEGACY_END)


def last_for_penultimate(*inputs: Any) -> tuple[Tensor, ...]:
    last, pooled, _ = ENCODE(*inputs)
    return last, pooled, last + 0


END_ROWS, ENCODE = clip_modules.end_rows, clip_modules.encode
FAULTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "a causal mask that lets one more token through": ("causal_bias", one_more_key),
    "no causal mask": ("causal_bias", lambda tokens, like: like.new_zeros((1, 1, 1, 1))),
    "no mask of padding": ("padding_bias", lambda mask, dtype: mask[:, None, None, :].to(dtype) * 0),
    "pooled at the last token": ("end_rows", rows_of_the_last_token),
    "pooled by the legacy rule": ("end_rows", rows_of_the_largest_id),
    "the last hidden state for the penultimate": ("encode", last_for_penultimate),
}


def test_a_right_engine_passes(subject: Subject) -> None:
    assert not subject.failures()


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(subject: Subject, fault: str) -> None:
    # Padding behind a prompt is hidden from it by the causal mask already: what comes out is right.
    of_outputs = set() if fault == "no mask of padding" else {"step_sqnr_db", "calls"}
    assert subject.failures(clip_modules, *FAULTS[fault]) & {"segments", "step_sqnr_db", "calls"} == {
        "segments",
        *of_outputs,
    }


@pytest.mark.slow
def test_another_activation_function_is_seen(subject: Subject) -> None:
    assert "segments" in subject.failures(text_modules.ACTIVATIONS, "quick_gelu", torch.nn.functional.gelu)
