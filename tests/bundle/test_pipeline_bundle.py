"""pipeline.json: what is listed is verified, what is not listed is refused, whatever part of the folder it is in."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from export.documents import sha256
from export.errors import ContractError, RecipeError
from pipeline import load, machine, text_to_image
from pipeline.bundle import memory
from pipeline.bundle.bundle import Bundle
from pipeline.bundle.pipeline_bundle import PipelineBundle, is_pipeline, load_pipeline
from pipeline.files import MANIFEST_FILE, PIPELINE_FILE, write_json
from tests.support.bundles import make_bundle

SCHEDULER = "scheduler/scheduler_config.json"
COMPONENTS = ("transformer", "text_encoder")


def write(folder: Path) -> Path:
    """Two components, a tokenizer and a scheduler."""
    folder.mkdir(exist_ok=True)
    for name in COMPONENTS:
        make_bundle(folder / name)
    for name in ("tokenizer/tokenizer.json", SCHEDULER):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    seal(folder)
    return folder


def seal(folder: Path, **changes: object) -> None:
    """A true pipeline.json of what is there."""
    names = ("tokenizer/tokenizer.json", SCHEDULER)
    document = {
        "schema_version": 1,
        "pipeline": "whole",
        "class_name": "PixArtAlphaPipeline",
        "index": {"_class_name": "PixArtAlphaPipeline"},
        "components": {
            name: {"engine": "small", "sha256": sha256(folder / name / MANIFEST_FILE)} for name in COMPONENTS
        },
        "files": {name: {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in names},
        "left_out": {},
        "recipe": {},
        "source": {"path": "here", "revision": ""},
        "tools": {},
        "code": "",
        "machine": {},
        "created": "",
        "stages": [],
    }
    write_json(folder / PIPELINE_FILE, document | changes)


def test_a_pipeline_bundle_opens_with_its_components(tmp_path: Path) -> None:
    whole = load_pipeline(write(tmp_path))
    assert (whole.name, whole.class_name, tuple(whole.components)) == ("whole", "PixArtAlphaPipeline", COMPONENTS)
    assert whole.tokenizers == ("tokenizer",) and whole.components["transformer"].targets == ("cpu",)
    assert is_pipeline(tmp_path) and not is_pipeline(tmp_path / "transformer")


def test_who_opens_it_as_a_bundle_of_one_model_is_told_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"is a pipeline bundle; give a component of it, as .*transformer"):
        load(write(tmp_path))


def test_a_bundle_of_one_model_is_no_pipeline_bundle(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"has no pipeline\.json"):
        load_pipeline(make_bundle(tmp_path / "one"))


def _append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def _other_component(folder: Path) -> None:
    """A whole bundle in the place of another: its own manifest is true."""
    path = folder / "text_encoder" / MANIFEST_FILE
    write_json(path, json.loads(path.read_text()) | {"engine": "other"})


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a tokenizer changed": (lambda f: _append(f / "tokenizer/tokenizer.json"), r"tokenizer\.json has 3 bytes"),
    "a scheduler changed": (lambda f: (f / SCHEDULER).write_text("[]"), r"scheduler_config\.json differs"),
    "a file is missing": (lambda f: (f / SCHEDULER).unlink(), r"scheduler_config\.json is missing"),
    "a file too many": (lambda f: (f / "notes.txt").write_text("x"), r"notes\.txt is not in the pipeline\.json"),
    "a link": (lambda f: (f / "more").symlink_to("/etc/hostname"), r"more is a link"),
    "a component's file": (lambda f: _append(f / "text_encoder/cpu/model.onnx"), r"cpu/model\.onnx has 8 bytes"),
    "a component exchanged": (_other_component, r"manifest\.json differs from .*pipeline\.json"),
    "a component gone": (lambda f: (f / "transformer" / MANIFEST_FILE).unlink(), r"manifest\.json is missing"),
    "another version": (lambda f: seal(f, schema_version=2), r"schema version 2, this version reads 1"),
    "a name that leaves": (lambda f: seal(f, files={"../x": {"size": 1, "sha256": "0" * 64}}), r"leaves the folder"),
    "a component in a folder": (
        lambda f: seal(f, components={"a/b": {"engine": "e", "sha256": "0" * 64}}), "no plain name",
    ),
    "code": (lambda f: seal(f, files={"model.py": {"size": 1, "sha256": "0" * 64}}), r"model\.py is not a file that"),
    "no component": (lambda f: seal(f, components={}), "components"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    hurt, words = DAMAGES[damage]
    hurt(write(tmp_path))
    with pytest.raises(ContractError, match=words):
        load_pipeline(tmp_path)


def test_the_bytes_of_engines_are_those_of_the_targets_that_run(tmp_path: Path) -> None:
    """Not the portable model's, nor what is no engine's."""
    whole = load_pipeline(write(tmp_path))
    size = (tmp_path / "transformer/cpu/model.onnx").stat().st_size
    assert whole.components["transformer"].engine_bytes("cpu") == size
    assert whole.engine_bytes("cpu") == len(COMPONENTS) * size


GIB = 2**30


@pytest.mark.parametrize(("free", "kept"), [(10 * GIB, False), (14 * GIB, True)])
def test_a_server_keeps_all_parts_where_memory_suffices(
    free: int, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two engines of 3 GiB; and what is asked for is what is done."""
    whole = load_pipeline(write(tmp_path))
    made: list[bool] = []
    monkeypatch.setattr(Bundle, "engine_bytes", lambda self, target: 3 * GIB)
    monkeypatch.setattr(machine, "free_memory", lambda: machine.FreeMemory(free))
    monkeypatch.setattr(text_to_image, "load_pipeline", lambda *_: whole)
    monkeypatch.setattr(PipelineBundle, "source", lambda self, target: nullcontext())
    monkeypatch.setattr(text_to_image, "LatentModel", lambda source, keep_loaded: made.append(keep_loaded))
    monkeypatch.setattr(text_to_image.Pipeline, "__init__", lambda self, *_: None)
    monkeypatch.setattr(memory, "refuse_too_large", lambda *_: None)
    caplog.set_level("INFO")
    text_to_image.Pipeline.load(tmp_path, keep_loaded=None)
    sizes = f"(6.00 GiB of weights, {free / GIB:.1f} GiB of memory are free)"
    assert made == [kept] and sizes in caplog.text
    assert ("all parts stay in memory" in caplog.text) == kept == ("--keep-loaded" not in caplog.text)
    for asked in (False, True):
        text_to_image.Pipeline.load(tmp_path, keep_loaded=asked)
        assert made.pop() == asked
