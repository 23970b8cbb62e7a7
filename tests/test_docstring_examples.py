"""The examples in docstrings give what they say they give; those of benchmarks are run by their own tests."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [
    str(path.relative_to(ROOT))
    for package in ("export", "pipeline", "plugins")
    for path in sorted((ROOT / package).rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("path", FILES)
def test_examples(path: str) -> None:
    result = doctest.testmod(importlib.import_module(path.removesuffix(".py").replace("/", ".")))
    assert result.attempted > 0 and result.failed == 0
