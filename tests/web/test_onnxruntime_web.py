"""Where the page's runtime comes from: npm, once, or a folder; and what is refused."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from pathlib import Path

import pytest

from export.errors import EnvironmentLacksError
from pipeline.web import onnxruntime_web

CONTENTS = {"dist/a.mjs": b"export {}", "dist/b.wasm": b"\0asm"}


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of two files, and an empty cache."""
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in CONTENTS.items()}
    monkeypatch.setattr(onnxruntime_web, "FILES", hashes)
    monkeypatch.setenv("DITC_CACHE", str(tmp_path / "cache"))


def folder(place: Path) -> Path:
    """The package, installed."""
    for name, data in CONTENTS.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    return place


def stand_in_for_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """An npm that runs a shell script, and notes that it did."""
    place = tmp_path / "bin"
    place.mkdir(exist_ok=True)
    (place / "npm").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n{script}\n')
    (place / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(place), prepend=os.pathsep)


def archive(path: Path, names: tuple[str, ...] = tuple(CONTENTS)) -> Path:
    """What npm packs."""
    with tarfile.open(path, "w:gz") as packed:
        for name in names:
            row = tarfile.TarInfo(f"package/{name}")
            row.size = len(CONTENTS[name])
            packed.addfile(row, io.BytesIO(CONTENTS[name]))
    return path


@pytest.mark.process
def test_npm_fetches_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = archive(tmp_path / "p.tgz")
    stand_in_for_npm(tmp_path, monkeypatch, f"cp {packed} onnxruntime-web-1.tgz")
    for _ in range(2):
        files = onnxruntime_web.find(None)
        assert {name: path.read_bytes() for name, path in files.items()} == {"a.mjs": b"export {}", "b.wasm": b"\0asm"}
    assert (tmp_path / "calls").read_text() == f"pack onnxruntime-web@{onnxruntime_web.VERSION} --silent\n"
    files["b.wasm"].write_bytes(b"other")
    with pytest.raises(EnvironmentLacksError, match=r"b.wasm is not that of onnxruntime-web .*; remove .* to have it"):
        onnxruntime_web.find(None)


@pytest.mark.process
@pytest.mark.parametrize(
    ("script", "words"),
    [
        (
            "echo getaddrinfo EAI_AGAIN >&2; exit 1",
            r"npm cannot fetch onnxruntime-web \(getaddrinfo EAI_AGAIN\); check",
        ),
        ("exit 3", r"npm cannot fetch onnxruntime-web \(exit code 3\)"),
        ("true", r"npm cannot fetch onnxruntime-web \(exit code 0\)"),
    ],
)
def test_npm_fails(script: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_npm(tmp_path, monkeypatch, script)
    with pytest.raises(EnvironmentLacksError, match=f"{words}.*or give --onnxruntime-web the folder"):
        onnxruntime_web.find(None)


@pytest.mark.process
def test_a_package_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = archive(tmp_path / "p.tgz", ("dist/a.mjs",))
    stand_in_for_npm(tmp_path, monkeypatch, f"cp {packed} .")
    with pytest.raises(EnvironmentLacksError, match=r"has no dist/b\.wasm; report it, or give --onnxruntime-web"):
        onnxruntime_web.find(None)


def test_without_npm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(EnvironmentLacksError, match="which npm fetches; install npm, or give --onnxruntime-web"):
        onnxruntime_web.find(None)


def test_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    place = folder(tmp_path / "package")
    assert onnxruntime_web.find(place) == {"a.mjs": place / "dist/a.mjs", "b.wasm": place / "dist/b.wasm"}
    (place / "dist/a.mjs").write_bytes(b"export default 1")
    with pytest.raises(EnvironmentLacksError, match=r"a.mjs is not that of onnxruntime-web .* \(sha256\); give --onnx"):
        onnxruntime_web.find(place)
    (place / "dist/a.mjs").unlink()
    with pytest.raises(EnvironmentLacksError, match=r"a\.mjs is missing; give --onnxruntime-web the folder of"):
        onnxruntime_web.find(place)
