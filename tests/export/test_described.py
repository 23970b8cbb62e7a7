"""`verify` looks at what no gate does: a bundle's recipe, configuration and description of drawing are the model's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.errors import UserError
from export.models import load as models
from export.models import sources
from pipeline import recipe as recipes
from pipeline.compiler import describe
from pipeline.verify import __main__ as verify_command
from pipeline.verify.__main__ import refuse_other_description
from pipeline.verify.report import Gate, Report
from tests.support.bundles import make_bundle, stand_in
from tests.support.hostile import edit

pytestmark = pytest.mark.torch

RECIPE = recipes.load("pixart_w4a6")


@pytest.fixture(scope="module")
def model() -> models.LoadedModel:
    return models.load("zoo:pixart_mini")


def check(folder: Path, model: models.LoadedModel) -> None:
    row = {"family": model.family.name, "source": model.source}
    refuse_other_description(stand_in(folder, RECIPE, row, lambda: None), model)


def notes_on_origin(folder: Path) -> None:
    edit(folder / "config.json", lambda document: document.update(_name_or_path="elsewhere", _diffusers_version="0"))


def test_what_a_build_writes_is_taken(model: models.LoadedModel, tmp_path: Path) -> None:
    describe(tmp_path, model, RECIPE)
    check(tmp_path, model)
    notes_on_origin(tmp_path)
    check(tmp_path, model)


def setting(file: str, key: str, value: Any) -> Callable[[Path], object]:
    return lambda folder: edit(folder / file, lambda document: document.__setitem__(key, value))


GENERATION = sources.find("zoo:pixart_mini")[0] / "generation.json"
EMBEDDING = json.loads(GENERATION.read_text(encoding="utf-8"))["conditioning"]["embedding"]
OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "guidance": (setting("generation.json", "guidance_scale", 7.5), "generation.json"),
    "kind of output": (setting("generation.json", "output", "latents"), "generation.json"),
    "no description": (lambda folder: (folder / "generation.json").unlink(), "generation.json"),
    "size": (setting("config.json", "sample_size", 64), "config.json"),
    "words": (lambda folder: (folder / EMBEDDING).write_bytes(b"other"), EMBEDDING),
    "one file more": (lambda folder: shutil.copyfile(folder / EMBEDDING, folder / "payload.safetensors"), "payload"),
    "recipe": (
        lambda folder: (folder / "recipe.toml").write_text(recipes.to_toml(recipes.load("pixart_w4a4"))),
        "recipe.toml",
    ),
    "no recipe": (lambda folder: (folder / "recipe.toml").unlink(), "recipe.toml"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_description_is_refused(name: str, model: models.LoadedModel, tmp_path: Path) -> None:
    change, file = OTHERS[name]
    describe(tmp_path, model, RECIPE)
    change(tmp_path)
    with pytest.raises(UserError, match=f"{file}.*(is not what the manifest's model and recipe make|does not exist)"):
        check(tmp_path, model)


@pytest.mark.parametrize("kept", [True, False])
def test_a_failure_of_verify_says_how_far_and_where_the_report_is(
    kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gates = [Gate("cpu/calls", 20.5, 60, "dB", "worst sample; most in call 3: the mask is kept", at_most=False)]
    monkeypatch.setattr(verify_command, "verify_bundle", lambda *_: Report(gates))
    flags = ["-o", str(tmp_path / "report")] if kept else []
    assert verify_command.main([str(make_bundle(tmp_path / "bundle")), *flags]) == 4
    where = f"see {tmp_path / 'report' / 'index.html'}" if kept else "give -o DIR to keep the report"
    sentence = "parity gate failed: cpu/calls = 20.5 dB, limit 60; cpu/calls: worst sample; most in call 3: the mask is"
    assert f"{sentence} kept; {where}" in capsys.readouterr().err
