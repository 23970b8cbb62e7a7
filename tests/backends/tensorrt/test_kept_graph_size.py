"""When the builder's ONNX is kept beside an engine."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from pipeline.backends.base import DATA, MODEL
from pipeline.backends.tensorrt import kept_graph
from pipeline.backends.tensorrt.engine import KeepOnnx


@pytest.mark.parametrize(
    ("wanted", "size", "kept"),
    [("auto", 0, True), ("auto", 1, False), ("yes", 1, True), ("no", 0, False)],
)
def test_it_is_kept_where_it_is_small_or_asked_for(
    wanted: KeepOnnx, size: int, kept: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """size: bytes above those of a small one. The graph's own name does not matter, that of its weights is in it."""
    (tmp_path / "rtx").mkdir()
    (tmp_path / "engine.onnx").write_bytes(b"graph")
    with (tmp_path / DATA).open("wb") as file:
        file.truncate(kept_graph.SMALL_BYTES + size - len(b"graph"))
    with caplog.at_level(logging.INFO, kept_graph.__name__):
        kept_graph.keep(tmp_path / "engine.onnx", tmp_path / "rtx", wanted)
    assert kept_graph.kept_names(tmp_path / "rtx") == ((MODEL, DATA) if kept else ())
    assert not kept or (tmp_path / "rtx" / MODEL).read_bytes() == b"graph"
    assert ("--set rtx.keep_onnx=yes keeps it" in caplog.text) == (wanted == "auto" and not kept)
