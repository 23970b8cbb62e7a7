"""--lora: what it takes, where it goes in a recipe, and what is refused before any model is read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from export.errors import ModelError, RecipeError
from export.models.adapter_names import refuse_other_kinds
from export.models.adapters import Adapter
from pipeline import __main__ as cli
from pipeline import build
from pipeline import recipe as recipes
from pipeline.bench.convert import FloatModel

RECIPE = recipes.load("pixart_w4a6")
TEXTS = {
    "a.safetensors": ("a.safetensors", 1.0),
    "a.safetensors:0.8": ("a.safetensors", 0.8),
    "a.safetensors:-1e-3": ("a.safetensors", -0.001),
    "C:/a.safetensors": ("C:/a.safetensors", 1.0),
    "C:a.safetensors": ("C:a.safetensors", 1.0),
    "odd:name.safetensors:2": ("odd:name.safetensors", 2.0),
    "a.bin:2": ("a.bin", 2.0),
}
WRONG_TEXTS = {
    "a.safetensors:": "'' is not a number; give FILE or FILE:SCALE",
    "a.safetensors:big": "'big' is not a number",
    "a.safetensors:0": "scale 0 of file 'a.safetensors'; a scale is a finite number other than 0",
    "a.safetensors:nan": "scale nan of file",
    "a.safetensors:-inf": "scale -inf of file",
    ":1": "scale 1 of file ''",
    "a\0.safetensors": "no path has a null character",
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_file_and_its_scale(text: str) -> None:
    adapter = Adapter.parse(text)
    assert (str(adapter.path), adapter.scale) == TEXTS[text]
    assert Adapter.parse(str(adapter)) == adapter


@pytest.mark.parametrize("text", WRONG_TEXTS)
def test_texts_that_are_no_file_at_a_scale(text: str) -> None:
    with pytest.raises(RecipeError, match=WRONG_TEXTS[text]):
        replace(RECIPE, lora=(text,))


def test_a_recipe_states_whole_paths_and_goes_through_toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    recipe = recipes.with_model(RECIPE, None, None, None, ["a.safetensors:0.5", "elsewhere.safetensors"])
    assert recipe.lora == (f"{tmp_path / 'a.safetensors'}:0.5", "elsewhere.safetensors:1.0")
    (tmp_path / "recipe.toml").write_text(recipes.to_toml(recipe), encoding="utf-8")
    assert recipes.load(str(tmp_path / "recipe.toml")) == recipe
    assert "lora" not in RECIPE.document()


def test_a_build_states_whole_paths_of_a_recipe_s_own_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.toml").write_text(recipes.to_toml(replace(RECIPE, lora=("a.safetensors:0.5",))), encoding="utf-8")
    flags = build.make_parser().parse_args(["--engine", "own.toml"])
    assert build.resolve(flags).lora == (f"{tmp_path / 'a.safetensors'}:0.5",)


def test_adapters_stay_with_another_model_unless_others_are_named() -> None:
    """A bundle whose model was moved is else compared with that model without them."""
    own = replace(RECIPE, lora=("a.safetensors:0.5",))
    assert recipes.with_model(own, "some/model", None, None).lora == own.lora
    assert recipes.with_model(own, None, None, None, ["b.safetensors"]).lora == ("b.safetensors:1.0",)
    assert recipes.with_model(own, None, None, None, []).lora == ()


def test_one_file_stands_there_once() -> None:
    with pytest.raises(RecipeError, match=r"adapter a.safetensors stands there twice; give it once, at one scale"):
        replace(RECIPE, lora=("a.safetensors:0.5", "a.safetensors"))


def test_one_file_stands_there_once_however_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.safetensors").touch()
    (tmp_path / "link.safetensors").symlink_to("a.safetensors")
    for other in ("./a.safetensors", str(tmp_path / "a.safetensors"), "link.safetensors"):
        with pytest.raises(RecipeError, match=r"adapter a.safetensors stands there twice"):
            replace(RECIPE, lora=("a.safetensors:0.5", other))


def test_processes_that_load_the_model_themselves_are_told() -> None:
    model = FloatModel.of_recipe(replace(RECIPE, lora=("a.safetensors:0.5",)))
    assert model.lora == ("a.safetensors:0.5",)


@pytest.mark.parametrize("verb", ["build", "calibrate"])
def test_a_wrong_scale_ends_with_one_sentence(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, "--engine", "pixart_w4a6", "--lora", "a.safetensors:none", "--json"]) == 2
    assert "'none' is not a number" in json.loads(capsys.readouterr().out)["reason"]


KINDS = {"x.lokr_w1": "LoKr", "x.hada_w1_a": "LoHa", "x.oft_R.weight": "OFT", "x.ia3_l": "IA3", "x.dora_scale": "DoRA"}


@pytest.mark.parametrize("name", KINDS)
def test_adapters_of_other_kinds_are_named(name: str) -> None:
    names = ["x.lora_A.weight", name]
    with pytest.raises(ModelError, match=rf"^adapter a: tensor {name}: {KINDS[name]}.*; only LoRA is merged here"):
        refuse_other_kinds(names, "adapter a")
    refuse_other_kinds(names[:1], "adapter a")
