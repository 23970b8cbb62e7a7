"""`python -m tests.support.quick_build`: pipeline.build with the fewest measurements, for tests of everything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline import build
from pipeline.bench import measure
from pipeline.signals import leave


def measure_little(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Three rounds of calls, pictures derived from them, no fresh processes for memory. put: monkeypatch.setattr to
    have it undone."""
    put(measure, "CALLS_BUDGET_S", 0.0)
    put(measure, "IMAGES_BUDGET_S", 0.0)
    put(measure, "peak_memory", lambda *_: None)


if __name__ == "__main__":
    measure_little()
    leave(build.main)
