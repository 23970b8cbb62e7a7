"""The examples in docstrings of all packages give what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [path for top in ("export", "pipeline", "plugins") for path in sorted((ROOT / top).rglob("*.py"))]
WITH_EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in SOURCES
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_in_docstrings_hold(name: str) -> None:
    if name.startswith("plugins.gpu."):
        pytest.importorskip("triton", reason="the GPU kernels need triton")
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0 and result.attempted > 0


def test_packages_have_examples() -> None:
    assert len(WITH_EXAMPLES) > 20
