"""One rule for where results are kept that can be made again, and everybody keeps to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.cache_folder import cache_folder
from pipeline.backends.rtx.engine import cache_path
from pipeline.bundle import snapshot
from plugins.cpu import library
from plugins.gpu import compile

ROOT = Path(__file__).parents[2]
METADATA = {"onnx_sha256": "a", "onnx_data_sha256": "b", "tensorrt_rtx": "1.7.1"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "home/.cache/ditc"),
        ({"DITC_CACHE": "", "XDG_CACHE_HOME": ""}, "home/.cache/ditc"),
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/ditc"),
        ({"DITC_CACHE": "own"}, "own"),
        ({"DITC_CACHE": "own", "XDG_CACHE_HOME": "xdg"}, "own"),
    ],
)
def test_where_everybody_keeps_things(
    variables: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("DITC_CACHE", "XDG_CACHE_HOME"):
        value = variables.get(name)
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value and str(tmp_path / value))
    root = tmp_path / expected
    assert cache_folder() == root and cache_folder("a", "b") == root / "a/b"
    assert compile.kernels_folder() == root / "kernels"
    assert library.library_folder().parent == root / "native"
    assert cache_path(METADATA, 89).parent == root / "rtx"
    assert snapshot._place() == root


def test_no_other_module_knows_the_rule() -> None:
    sources = {path for package in ("export", "plugins", "pipeline") for path in (ROOT / package).rglob("*.py")}
    knowing = {path.name for path in sources if "XDG_CACHE_HOME" in path.read_text(encoding="utf-8")}
    assert knowing == {"cache_folder.py"}
