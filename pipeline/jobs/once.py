"""What jobs have in common and each process makes for itself."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Generic, TypeVar, cast

T = TypeVar("T")


class Once(Generic[T]):
    """What a process makes when the first of its jobs asks for it, a model for example, and has for all that follow.

    make: a partial of a module's function, where it goes to other processes. There it is that process's own, kept until
    another one comes.
    """

    def __init__(self, make: Callable[[], T], name: str = "") -> None:
        self.make, self.name = make, name or uuid.uuid4().hex
        self._made: list[T] = []

    def __call__(self) -> T:
        if not self._made:
            self._made.append(self.make())
        return self._made[0]

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return _of_this_process, (self.name, self.make)


_sent: dict[str, Once[object]] = {}


def _of_this_process(name: str, make: Callable[[], T]) -> Once[T]:
    if name not in _sent:
        _sent.clear()
        _sent[name] = Once(make, name)
    return cast("Once[T]", _sent[name])
