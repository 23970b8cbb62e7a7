"""Marks of cost, read from the text of files of tests."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

# The dearest first.
COSTS = ("slow", "torch", "rtx", "kernels", "process")
# Cases of a test that are fast: what the others of one that costs little would add is seconds, and seldom news.
FEW = 3
T = TypeVar("T")


def costs_among(nodes: list[ast.expr]) -> set[str]:
    """The marks of cost in decorators, or in the value of `pytestmark`; none where one of them is `fast`."""
    names = {part.attr for node in nodes for part in ast.walk(node) if isinstance(part, ast.Attribute)}
    return set() if "fast" in names else names & set(COSTS)


def has_fast_tests(path: Path) -> bool:
    """Whether any test of a file is called fast, or bears no mark of cost, neither of its own nor of the file."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    assigned = [node for node in body if isinstance(node, ast.Assign)]
    of_file = [node.value for node in assigned if getattr(node.targets[0], "id", "") == "pytestmark"]
    tests = [node for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return any(not costs_among([*of_file, *test.decorator_list]) for test in tests)


def few(cases: Sequence[T]) -> list[T]:
    """The cases of a test that are fast: all of up to FEW, else so many, the first and the last among them.

    >>> few("ab"), few("abcdefg")
    (['a', 'b'], ['a', 'd', 'g'])
    """
    last = len(cases) - 1
    return list(cases) if last < FEW else [cases[i * last // (FEW - 1)] for i in range(FEW)]
