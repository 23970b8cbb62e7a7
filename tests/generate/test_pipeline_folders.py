"""A pipeline's folder that cannot be read is refused in a sentence, whatever is wrong; nothing is waited for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from export.errors import ModelError, RecipeError
from pipeline.generate.latent import _refuse_other_class
from pipeline.generate.pipeline_folder import float32_bytes, open_pipeline
from tests.support import pipelines, tiny

pytestmark = pytest.mark.torch

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.write("dit", tmp_path_factory.mktemp("pipeline") / "dit")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "dit"))


INDICES = {
    b"[]": "the document is []",
    b"{": "is not valid JSON",
    b"\xff\xfe": "is not in UTF-8",
    b"[" * 10_000: "is nested more than",
}


@pytest.mark.parametrize("content", INDICES, ids=INDICES.values())
def test_an_index_that_is_none(content: bytes, folder: Path) -> None:
    (folder / "model_index.json").write_bytes(content)
    words = INDICES[content].replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(ModelError, match=rf"model_index\.json.* {words}"):
        _refuse_other_class(str(folder), "dit", {})


def test_a_transformer_of_no_class(folder: Path) -> None:
    (folder / "model_index.json").write_text('{"transformer": ["diffusers", 3]}')
    with pytest.raises(RecipeError, match="its transformer is 3"):
        _refuse_other_class(str(folder), "dit", {})


def test_an_engine_without_a_row_is_told_by_its_class(folder: Path) -> None:
    (folder / "model_index.json").write_text('{"transformer": ["diffusers", "FluxTransformer2DModel"]}')
    _refuse_other_class(str(folder), "recorded", {"_class_name": "FluxTransformer2DModel"})
    with pytest.raises(RecipeError, match="its transformer is FluxTransformer2DModel, the engine is one of SD3Transf"):
        _refuse_other_class(str(folder), "recorded", {"_class_name": "SD3Transformer2DModel"})


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "weights cut short": (lambda folder: cut(folder / WEIGHTS), "diffusers cannot open this pipeline"),
    "weights are a pipe": (lambda folder: pipe(folder / WEIGHTS), "is a pipe, not a file"),
    "configuration cut short": (lambda folder: cut(folder / "vae/config.json"), "diffusers cannot open this pipeline"),
    "configuration of another class": (
        lambda folder: (folder / "vae/config.json").write_text('{"block_out_channels": "wide"}'),
        "diffusers cannot open this pipeline",
    ),
    "no scheduler": (lambda folder: shutil.rmtree(folder / "scheduler"), "diffusers cannot open this pipeline"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_parts_that_cannot_be_read(name: str, folder: Path) -> None:
    damage, words = DAMAGES[name]
    damage(folder)
    module = tiny.random_module(pipelines.ROWS["dit"].class_name, pipelines.ROWS["dit"].config)
    with pytest.raises(ModelError, match=words):
        open_pipeline(folder, module)


@pytest.mark.parametrize(("damage", "words"), [(cut, "not a whole safetensors file"), (pipe, "is a pipe, not a file")])
def test_sizes_are_read_of_whole_files(damage: Damage, words: str, folder: Path) -> None:
    assert float32_bytes(folder) > 0
    damage(folder / WEIGHTS)
    with pytest.raises(ModelError, match=words):
        float32_bytes(folder)
