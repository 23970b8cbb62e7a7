"""Pythons for tests of packages that the project's environment is without."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from benchmarks.tools.environments import python_environment, without_xdist

__all__ = ["python_with", "without_xdist"]


def python_with(module: str, requirement: str) -> str | Path:
    """A Python that imports `module` and all that this one does: itself, or one of an environment with `requirement`
    beside. Raises CannotBeHadError, with the reason, where that cannot be installed."""
    if importlib.util.find_spec(module):
        return sys.executable
    return python_environment(module, (requirement,), beside=True)
