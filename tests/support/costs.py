"""Marks of cost, read from the text of files of tests."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

# The dearest first.
COSTS = ("slow", "torch", "kernels")


def costs_among(nodes: list[ast.expr]) -> set[str]:
    """The marks of cost in decorators, or in the value of `pytestmark`; none where one of them is `fast`."""
    names = {part.attr for node in nodes for part in ast.walk(node) if isinstance(part, ast.Attribute)}
    return set() if "fast" in names else names & set(COSTS)


def has_fast_tests(path: Path) -> bool:
    """Whether any test of a file is called fast, or bears no mark of cost, neither of its own nor of the file."""
    return any(not costs for costs in _costs_of_tests(path))


def has_dear_tests(path: Path) -> bool:
    """Whether any test of a file bears a mark of cost, and is not called fast."""
    return any(_costs_of_tests(path))


def _costs_of_tests(path: Path) -> Iterator[set[str]]:
    """The marks of cost of each test of a file, those of the file among them."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    assigned = [node for node in body if isinstance(node, ast.Assign)]
    of_file = [node.value for node in assigned if getattr(node.targets[0], "id", "") == "pytestmark"]
    tests = [node for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return (costs_among([*of_file, *test.decorator_list]) for test in tests)
