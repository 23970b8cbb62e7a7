"""`pytest -m fast --reach`: the tests that are run reach every module of the compiler, or the run fails and names those
that they do not. Of a module that is reached a function was entered, or it was imported if it is a table, without
functions for others."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("export", "plugins", "pipeline")
_entered: set[str] = set()  # files whose functions were entered
_reached: set[str] = set()  # by the processes that have ended
_noted: set[Any] = set()  # (function of a test, name of a parameter, number of its value) of the cases that were run


def _note(frame: FrameType, event: str, argument: object) -> None:
    """Called at every call of a function of Python, and not again within it."""
    if frame.f_code.co_name != "<module>":
        _entered.add(frame.f_code.co_filename)


@contextmanager
def noted() -> Iterator[None]:
    """Within, functions that are entered are noted, in this thread and those that it starts."""
    before: Any = sys.gettrace()
    sys.settrace(_note)
    threading.settrace(_note)
    try:
        yield
    finally:
        sys.settrace(before)
        threading.settrace(before)


def reached() -> set[str]:
    """Files below ROOT whose functions were entered, and all without functions that are imported by now."""
    imported = {str(getattr(module, "__file__", "")) for module in list(sys.modules.values())}
    below = {path for path in imported if path.startswith(f"{ROOT}/") and path.endswith(".py")}
    return {path for path in _entered | below if path in _entered or not _has_functions(Path(path))}


def unreached(paths: set[str]) -> list[str]:
    """The modules of PACKAGES that are not among `paths`, but for empty ones."""
    modules = [path for top in PACKAGES for path in (ROOT / top).rglob("*.py") if path.read_text(encoding="utf-8")]
    return sorted(str(path.relative_to(ROOT)) for path in modules if str(path) not in paths)


def _has_functions(path: Path) -> bool:
    return re.search(r"^ *(async )?def (?!_)|lambda", path.read_text(encoding="utf-8"), re.MULTILINE) is not None


# --- hooks, imported by conftest.py -----------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if not item.config.option.reach or not _has_new_value(item):
        return (yield)
    with noted():
        return (yield)


def _has_new_value(item: pytest.Item) -> bool:
    """Whether no earlier case of the same test had some value of this one: combinations enter the same modules."""
    values = getattr(getattr(item, "callspec", None), "indices", {"": 0})
    new = {(getattr(item, "function", item), *value) for value in values.items()} - _noted
    _noted.update(new)
    return bool(new)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """A process of xdist has ended: take over what it reached."""
    _reached.update(getattr(node, "workeroutput", {}).get("reached", ()))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput["reached"] = sorted(reached())
    elif config.option.reach and exitstatus == pytest.ExitCode.OK and (left := unreached(_reached | reached())):
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        reporter.write_line(f"\nno test reaches {', '.join(left)}: write one, see tests/support/reach.py", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
