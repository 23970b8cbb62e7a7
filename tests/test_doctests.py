"""The examples in docstrings of all packages give what they say."""

from __future__ import annotations

import ast
import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    path for top in ("export", "pipeline", "plugins", "benchmarks") for path in sorted((ROOT / top).rglob("*.py"))
]
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def examples(path: Path) -> int:
    """How many examples the docstrings of a file hold, whatever they are docstrings of."""
    if ">>>" not in (text := path.read_text(encoding="utf-8")):
        return 0
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, DOCUMENTED)]
    parser = doctest.DocTestParser()
    return sum(len(parser.get_examples(ast.get_docstring(node) or "")) for node in nodes)


WITH_EXAMPLES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): count
    for path in SOURCES
    if (count := examples(path))
}


@pytest.mark.fast
@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_in_docstrings_hold(name: str) -> None:
    """All of them: doctest passes over docstrings of what it takes for imported, without a word."""
    if name.startswith(("plugins.gpu.", "benchmarks.gpu.")):
        pytest.importorskip("triton", reason="the GPU kernels need triton")
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0 and result.attempted == WITH_EXAMPLES[name]


def test_packages_have_examples() -> None:
    assert len(WITH_EXAMPLES) > 30
