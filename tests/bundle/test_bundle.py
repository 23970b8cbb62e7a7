"""A bundle is opened only if every byte is as the manifest says; each kind of damage has its sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.errors import ContractError, EnvironmentLacksError, RecipeError
from pipeline import load, machine
from pipeline.bundle import bundle as bundles
from pipeline.bundle import manifest
from pipeline.files import publish
from tests.support import hub
from tests.support.bundles import make_bundle


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "small")


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((folder / "manifest.json").read_text())
    change(document)
    (folder / "manifest.json").write_text(json.dumps(document))


def test_an_intact_bundle_opens(folder: Path) -> None:
    bundle = load(folder)
    assert (bundle.name, bundle.targets, bundle.recipe.name) == ("small", ("cpu",), "small")
    assert bundle.manifest["counts"] == {"quantized": 1, "kept": 1, "formats": {"E2M1 x E2M3": 1}}
    # 8 x 64 codes of 4 bits, 8 scales of 4 bytes, 8 x 2 multipliers of 4 bits; and 8 x 64 halves
    assert bundle.manifest["bytes"]["quantized_weights"] == 256 + 32 + 8
    assert bundle.manifest["bytes"]["same_weights_fp16"] == 1024


def test_manifest_of_the_same_files_differs_in_created_only(folder: Path, tmp_path: Path) -> None:
    first, second = (manifest.read(path) for path in (folder, make_bundle(tmp_path / "again")))
    assert {key for key in first if first[key] != second[key]} <= {"created"}


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed byte": (lambda folder: flip_byte(folder / "cpu/model.onnx"), r"cpu/model.onnx differs .*sha256"),
    "truncated": (lambda folder: (folder / "model.onnx").write_bytes(b"port"), r"has 4 bytes, the manifest says 8"),
    "missing file": (lambda folder: (folder / "config.json").unlink(), r"config.json is missing"),
    "unlisted file": (lambda folder: (folder / "cpu/extra.so").write_bytes(b""), r"extra.so is not in the manifest"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), r"is not a bundle"),
    "not JSON": (lambda folder: (folder / "manifest.json").write_text("{"), r"is not valid JSON"),
    "a list": (lambda folder: (folder / "manifest.json").write_text("[]"), r"schema version None"),
    "newer schema": (
        lambda folder: edit(folder, lambda d: d.update(schema_version=2)),
        r"schema version 2, .* reads 1",
    ),
    "no files table": (lambda folder: edit(folder, lambda d: d.pop("files")), r"'files' is missing"),
    "no hash": (
        lambda folder: edit(folder, lambda d: d["files"]["model.onnx"].pop("sha256")),
        r"sha256' is missing",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_and_named(folder: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(ContractError, match=message):
        load(folder)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "cpu/../../outside", "C:\\outside", "cpu\\model", "", "./a"]
)
def test_a_path_that_leaves_the_folder_is_refused(folder: Path, name: str) -> None:
    (folder.parent / "outside").write_bytes(b"x")
    edit(folder, lambda d: d["files"].update({name: {"size": 1, "sha256": "0" * 64}}))
    with pytest.raises(ContractError, match="leaves the folder"):
        load(folder)


def link_file(folder: Path) -> None:
    (folder.parent / "elsewhere").write_bytes(b"lowered")
    (folder / "cpu/model.onnx").unlink()
    (folder / "cpu/model.onnx").symlink_to(folder.parent / "elsewhere")


def link_folder(folder: Path) -> None:
    (folder / "cpu").rename(folder.parent / "cpu")
    (folder / "cpu").symlink_to(folder.parent / "cpu")


@pytest.mark.parametrize("link", [link_file, link_folder])
def test_links_are_refused_even_to_the_right_bytes(folder: Path, link: Callable[[Path], None]) -> None:
    link(folder)
    with pytest.raises(ContractError, match="a link"):
        load(folder)


def test_a_linked_manifest_is_refused(folder: Path) -> None:
    (folder / "manifest.json").rename(folder.parent / "manifest.json")
    (folder / "manifest.json").symlink_to(folder.parent / "manifest.json")
    with pytest.raises(ContractError, match="is not a bundle"):
        load(folder)


def test_nothing_is_deserialized_before_verification(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles.Bundle, "engine", lambda *_: pytest.fail("the engine was loaded"))
    flip_byte(folder / "model.onnx")
    with pytest.raises(ContractError):
        load(folder).engine()


def test_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="is not a folder"):
        load(tmp_path / "nowhere")


def with_versions(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    monkeypatch.setattr(machine, "tool_version", lambda name: versions.get(name, ""))


def opened(tools: dict[str, str], *targets: str) -> bundles.Bundle:
    built = {"tensorrt_rtx": tools.get("tensorrt_rtx"), "compute_capabilities": [89, 120]}
    rows = {name: {"metadata": built if name == "rtx" else {}} for name in targets}
    document = {"targets": rows, "tools": tools, "recipe": {"name": "small", "model": "here"}}
    return bundles.Bundle(Path("small"), document)


CPU, BOTH = {"onnxruntime": "1.31.1"}, {"onnxruntime": "1.31.1", "tensorrt_rtx": "1.7.1.116"}


def test_an_older_runtime_is_refused_with_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, onnxruntime="1.29.0")
    with pytest.raises(EnvironmentLacksError, match=r"onnxruntime 1\.31, this is 1\.29"):
        opened(CPU, "cpu").choose()


def test_no_runtime_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch)
    with pytest.raises(EnvironmentLacksError, match="pip install onnxruntime"):
        opened(CPU, "cpu").choose()


def test_a_target_that_was_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, **CPU)
    with pytest.raises(RecipeError, match="no target rtx, only cpu"):
        opened(CPU, "cpu").choose("rtx")


@pytest.mark.parametrize(
    ("sm", "version", "chosen"),
    [
        (89, "1.7.1.116", "rtx"),
        (120, "1.7.9", "rtx"),
        (86, "1.7.1.116", "cpu"),
        (0, "1.7.1.116", "cpu"),
        (89, "1.8.0", "cpu"),
    ],
)
def test_auto_takes_the_fastest_target_that_fits(
    monkeypatch: pytest.MonkeyPatch, sm: int, version: str, chosen: str
) -> None:
    with_versions(monkeypatch, onnxruntime="1.31.1", tensorrt_rtx=version)
    monkeypatch.setattr(bundles.machine, "cuda_sm", lambda: sm)
    assert opened(BOTH, "cpu", "rtx").choose() == chosen


@pytest.mark.parametrize(
    ("sm", "message"), [(0, "needs an NVIDIA RTX GPU"), (86, "this GPU is SM 86; build again with --target-sm 86")]
)
def test_a_named_target_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch, sm: int, message: str) -> None:
    with_versions(monkeypatch, **BOTH)
    monkeypatch.setattr(bundles.machine, "cuda_sm", lambda: sm)
    with pytest.raises(EnvironmentLacksError, match=message):
        opened(BOTH, "cpu", "rtx").choose("rtx")


def test_publish_replaces_a_whole_folder(tmp_path: Path) -> None:
    old, new = make_bundle(tmp_path / "engine"), make_bundle(tmp_path / "work/bundle")
    (old / "stale").write_text("from the old one")
    publish(new, old, aside=tmp_path / "work/replaced")
    assert not (old / "stale").exists() and not new.exists() and not (tmp_path / "work/replaced").exists()
    assert load(old).name == "small"


@pytest.mark.parametrize("survived", [0, 1])
def test_a_stop_while_publishing_leaves_no_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survived: int
) -> None:
    old, new = make_bundle(tmp_path / "engine"), make_bundle(tmp_path / "work/bundle")
    (old / "stale").write_text("from the old one")
    renames = iter([os.rename] * survived)

    def stopped(source: Path, target: Path) -> None:
        next(renames)(source, target)

    monkeypatch.setattr(os, "rename", stopped)
    with pytest.raises(StopIteration):
        publish(new, old, aside=tmp_path / "work/replaced")
    assert not old.exists() if survived else (old / "stale").exists()
    assert load(new).name == "small", "the new bundle is still whole, for --resume to publish"


def test_links_of_the_hubs_cache_are_followed_into_its_blobs_only(folder: Path, tmp_path: Path) -> None:
    """The manifest, too, is a link there."""
    repository = tmp_path / "models--someone--engine"
    laid_out = hub.snapshot(folder, repository, "engines/small")
    assert (laid_out / "manifest.json").is_symlink()
    assert load(laid_out).config() == load(folder).config()  # read through its link
    (tmp_path / "again").symlink_to(laid_out)  # reached through a link of the user's own
    assert load(tmp_path / "again").name == load(folder).name
    part = laid_out / "cpu/model.onnx"
    blob = part.resolve()
    for outside in (folder / "cpu/model.onnx", repository / "refs" / "model.onnx"):
        part.unlink()
        if not outside.exists():
            outside.write_bytes(blob.read_bytes())
        part.symlink_to(outside)
        with pytest.raises(ContractError, match=r"model\.onnx' leaves the folder by a link"):
            load(laid_out)
    part.unlink()
    part.symlink_to(blob)
    held = blob.read_bytes()
    blob.unlink()
    blob.symlink_to(folder / "cpu/model.onnx")  # a blob that is a link itself
    with pytest.raises(ContractError, match=r"model\.onnx' leaves the folder by a link"):
        load(laid_out)
    blob.unlink()
    blob.write_bytes(held + b"x")
    with pytest.raises(ContractError, match="bytes, the manifest says"):
        load(laid_out)


def test_blobs_that_are_elsewhere_are_not_followed(folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--someone--engine"
    laid_out = hub.snapshot(folder, repository)
    (repository / "blobs").rename(tmp_path / "elsewhere")
    (repository / "blobs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ContractError, match="is not a bundle"):
        load(laid_out)
