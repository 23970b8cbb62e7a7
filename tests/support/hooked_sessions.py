"""Threads that meet where a test wants them to: sessions of a `cpu` engine that call back before and after they run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pipeline.backends.sessions import Sessions

TIMEOUT_S = 60


class Worker(threading.Thread):
    """Runs a function and keeps what it gives or raises."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.work, self.error, self.found = work, None, None
        self.start()

    def run(self) -> None:
        try:
            self.found = self.work()
        except Exception as error:
            self.error = error

    def result(self) -> Any:
        self.join(TIMEOUT_S)
        assert not self.is_alive(), "the call did not end"
        if self.error:
            raise self.error
        return self.found


def once(work: Callable[[], object]) -> Callable[[], None]:
    """A hook that acts the first time only."""
    left = [work]
    return lambda: left.pop()() if left else None


def _nothing() -> None:
    pass


class Hooked:
    """A session with `before` and `after` around each of its runs; with None in its place there is no session."""

    def __init__(self, session: Any, before: Callable[[], object], after: Callable[[], object]) -> None:
        self.session, self.before, self.after = session, before, after
        self.get_inputs, self.get_outputs = session.get_inputs, session.get_outputs
        self.io_binding, self.get_session_options = session.io_binding, session.get_session_options

    def run(self, names: list[str], fed: dict[str, Any], options: Any = None) -> list[Any]:
        self.before()
        outputs: list[Any] = self.session.run(names, fed, options)
        self.after()
        return outputs

    def run_with_iobinding(self, binding: Any, options: Any = None) -> None:
        self.before()
        self.session.run_with_iobinding(binding, options)
        self.after()


def hooked(
    sessions: Sessions,
    condition: Callable[[], object] = _nothing,
    after_condition: Callable[[], object] = _nothing,
    step: Callable[[], object] = _nothing,
) -> Sessions:
    """The sessions with hooks before and after the condition's part, and before the rest."""
    result = replace(sessions, step=Hooked(sessions.step, step, _nothing))
    if sessions.condition is None:
        return result
    session = Hooked(sessions.condition.session, condition, after_condition)
    return replace(result, condition=replace(sessions.condition, session=session))
