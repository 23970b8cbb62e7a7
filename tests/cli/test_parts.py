"""Folders of pipelines, part by part: what becomes a component, what is left out, and what is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from export.errors import ModelError, RecipeError
from export.models.families import FAMILIES, WITHOUT_HEAD
from pipeline import recipe as recipes
from pipeline.build import main as build
from pipeline.generate.schedulers.config import read_scheduler_config, scheduler_class, write_scheduler_config
from pipeline.generate.schedulers.euler import EulerConfig
from pipeline.parts import AUTOENCODERS, TEXT_ENCODERS, is_whole, read_folder

PARTS = {
    "transformer": ["diffusers", "PixArtTransformer2DModel"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "safety_checker": ["pipelines.stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": [None, None],
}


def write(folder: Path, **changes: Any) -> Path:
    """A folder with the index of a pipeline, and of its parts what is read before any model is."""
    index = {"_class_name": "PixArtAlphaPipeline", **PARTS, **changes}
    (folder / "model_index.json").write_text(json.dumps(index))
    for name, value in index.items():
        if isinstance(value, list) and value[0] and name != "safety_checker":
            (folder / name).mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "tokenizer" / name).write_text("{}")
    if index["scheduler"][0]:
        (folder / "scheduler/scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    return folder


def recipe(folder: Path, *settings: str) -> recipes.Recipe:
    own = recipes.with_model(recipes.load("pixart_w4a6"), str(folder), None, None)
    return recipes.with_settings(own, list(settings))


def test_every_part_becomes_a_component_with_a_recipe_or_is_named_as_left_out(tmp_path: Path) -> None:
    folder = read_folder(recipe(write(tmp_path), "cpu.path=stock"))
    assert {part.name: part.recipe.name for part in folder.parts} == {
        "transformer": "pixart_w4a6", "text_encoder": "t5_w4a8", "vae_decoder": "vae_decoder",
    }  # fmt: skip
    assert {Path(part.recipe.model).name for part in folder.parts} == {"transformer", "text_encoder", "vae"}
    assert [part.name for part in folder.added] == ["vae_encoder"]
    assert folder.tokenizers == {"tokenizer": "T5TokenizerFast"} and list(folder.left_out) == ["safety_checker"]
    assert all(str(part.recipe.targets["cpu"]) == str(folder.parts[0].recipe.targets["cpu"]) for part in folder.parts)


def test_a_component_has_a_table_of_its_own_in_the_recipe(tmp_path: Path) -> None:
    settings = ("components.text_encoder.formats.activation=E3M4", "components.vae_encoder.recipe=vae_encoder")
    folder = read_folder(recipe(write(tmp_path), *settings))
    by_name = {part.name: part.recipe for part in folder.parts}
    assert by_name["text_encoder"].formats.activation == "E3M4" and by_name["text_encoder"].formats.weight == "E2M1"
    assert "vae_encoder" in by_name and by_name["transformer"].components == {}


def test_every_text_encoder_has_a_recipe() -> None:
    known = {row.class_name for row in FAMILIES.values() if row.library == "transformers"}
    assert set(TEXT_ENCODERS) == known | set(WITHOUT_HEAD) and set(TEXT_ENCODERS.values()) <= set(
        recipes.recipe_names()
    )
    assert {row.class_name for row in FAMILIES.values() if row.half is not None} == set(AUTOENCODERS)


WRONG = {
    "an unknown text encoder": ({"text_encoder": ["transformers", "GemmaModel"]}, "part text_encoder .* GemmaModel"),
    "an unknown autoencoder": ({"vae": ["diffusers", "AutoencoderDC"]}, "part vae is of class AutoencoderDC"),
    "an unknown tokenizer": ({"tokenizer": ["transformers", "LlamaTokenizer"]}, "part tokenizer .* LlamaTokenizer"),
    "an unknown pipeline": ({"_class_name": "MochiPipeline"}, "'MochiPipeline' is not supported; .* PixArtAlpha"),
    "an unknown scheduler": (
        {"scheduler": ["diffusers", "PNDMScheduler"]},
        r"scheduler_config\.json: the class that model_index\.json states, 'PNDMScheduler' is not supported",
    ),
    "no scheduler": ({"scheduler": [None, None]}, "draws with scheduler, of which it lists no part"),
    "no decoder": ({"vae": [None, None]}, "draws with vae_decoder, of which it lists no part"),
    "a class that is none": ({"vae": ["diffusers", 3]}, "part vae is"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_built_is_refused_by_name(wrong: str, tmp_path: Path) -> None:
    changes, words = WRONG[wrong]
    with pytest.raises(ModelError, match=words):
        read_folder(recipe(write(tmp_path, **changes)))


def test_a_part_that_was_not_downloaded_is_named(tmp_path: Path) -> None:
    (write(tmp_path) / "vae").rmdir()
    with pytest.raises(ModelError, match=r"vae is missing, which .*model_index\.json lists.*-m .*transformer"):
        read_folder(recipe(tmp_path))


def test_the_index_says_of_which_class_the_scheduler_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in diffusers, whatever class the file of its keys was written by; the bundle's file says the same."""
    write(tmp_path, scheduler=["diffusers", "EulerDiscreteScheduler"])
    path, keys = tmp_path / "scheduler/scheduler_config.json", {"skip_prk_steps": True, "beta_end": 0.012}
    path.write_text(json.dumps({"_class_name": "PNDMScheduler", "lambda_min_clipped": -math.inf, **keys}))
    with caplog.at_level("INFO"):
        index = read_folder(recipe(tmp_path)).index
    assert f"{path}: of PNDMScheduler, read as EulerDiscreteScheduler, which model_index.json states" in caplog.text
    own = read_scheduler_config(path, scheduler_class(index))
    assert own == EulerConfig(beta_end=0.012)
    write_scheduler_config(tmp_path / "written.json", scheduler_class(index), path)
    assert read_scheduler_config(tmp_path / "written.json") == own
    path.write_text('{"_class_name": "PNDMScheduler", "acceleration": 2}')
    with pytest.raises(ModelError, match="key 'acceleration' is unknown"):
        read_folder(recipe(tmp_path))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("components.image_encoder.recipe=t5_w4a8", "image_encoder: .* becomes transformer, text_encoder, vae_decoder"),
        ("components.transformer.recipe=t5_w4a8", "components.transformer is the recipe itself"),
        ("components.text_encoder.formats.actvation=INT8", r"text_encoder: key formats\.actvation is unknown"),
        ("components.text_encoder.recipe=t5", "recipe 't5' is unknown"),
        ("components.text_encoder.recipe=5", "components.text_encoder.recipe is 5; give the name of a recipe"),
    ],
)
def test_a_table_that_belongs_to_no_part_or_makes_no_recipe_is_refused(
    setting: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=words):
        read_folder(recipe(write(tmp_path), setting))


def test_one_model_has_no_components(capsys: pytest.CaptureFixture[str]) -> None:
    assert not is_whole("zoo:pixart_mini")
    for flags, words in (
        (["--component", "text_encoder"], "zoo:pixart_mini is one model, no pipeline with parts"),
        (["--set", "components.vae_decoder.recipe=vae_decoder"], "components.vae_decoder is of a part of a pipeline"),
    ):
        assert build(["--engine", "pixart_w4a6", "--target", "cpu", "--dry-run", *flags]) == 2
        assert words in capsys.readouterr().out


def test_a_component_needs_the_bundle_that_it_is_put_into(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path)
    flags = ["--engine", "pixart_w4a6", "-m", str(folder), "--target", "cpu", "-o", str(tmp_path / "out")]
    assert build([*flags, "--component", "text_encoder"]) == 2
    assert "out is no pipeline bundle to put it into" in capsys.readouterr().out
