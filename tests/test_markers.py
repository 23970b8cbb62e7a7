"""Marks of cost: `pytest -m fast` has something to say about every module."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

from tests.conftest import COSTS
from tests.test_layering import FILES, ROOT, imports, module_of

TESTS = ROOT / "tests"


def cost_of(nodes: list[ast.expr]) -> set[str]:
    """The marks of cost among decorators or in the value of `pytestmark`."""
    names = {part.attr for node in nodes for part in ast.walk(node) if isinstance(part, ast.Attribute)}
    return names & set(COSTS)


def has_fast_tests(tree: ast.Module) -> bool:
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    of_file = [node.value for node in assigned if getattr(node.targets[0], "id", "") == "pytestmark"]
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return not cost_of(of_file) and any(not cost_of(function.decorator_list) for function in functions)


@cache
def modules_of(path: Path) -> set[str]:
    """What a file of tests imports, and what its helpers do."""
    names = {module_of(name) for name, _ in imports(ast.parse(path.read_text(encoding="utf-8")))}
    helpers = [ROOT / f"{name.replace('.', '/')}.py" for name in names if name.startswith("tests.support.")]
    return names.union(*(modules_of(helper) for helper in helpers))


def test_fast_tests_take_every_module_into_their_hands() -> None:
    """Each is imported by name in a file of tests some of which are fast, or by a helper of it."""
    files = [path for path in TESTS.rglob("test_*.py") if has_fast_tests(ast.parse(path.read_text(encoding="utf-8")))]
    taken = set().union(*(modules_of(path) for path in files))
    modules = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in FILES}
    empty = {
        name
        for name in modules
        if (path := ROOT / name.replace(".", "/") / "__init__.py").is_file() and not path.read_text()
    }
    assert modules - taken - empty == set()
