"""What stands for Ray in tests without it: jobs are done by this process, after a job's way to another one."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pipeline.jobs.jobs import Ended, Job, attempt

LOST = ("WorkerCrashedError", "NodeDiedError", "ObjectLostError", "LocalRayletDiedError", "OutOfMemoryError")


class Ray:
    """What is asked of the module `ray`. losses: of a job by name, the errors of its first tries, in order."""

    def __init__(self) -> None:
        self.losses: dict[str, list[Exception]] = {}
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.machines: list[dict[str, Any]] = []
        self.joined: list[str] = []
        base = type("RayError", (Exception,), {})
        self.errors = {"RayError": base, **{name: type(name, (base,), {}) for name in LOST}}

    def remote(self, **options: Any) -> Callable[[Any], Any]:
        def send(job: Job) -> tuple[Job]:
            self.sent.append((job.name, options))
            return (job,)

        return lambda function: SimpleNamespace(options=lambda name: SimpleNamespace(remote=send))

    def wait(self, places: list[tuple[Job]], timeout: float) -> tuple[list[tuple[Job]], list[tuple[Job]]]:
        return places[:1], places[1:]

    def get(self, place: tuple[Job]) -> Ended:
        (job,) = place
        if self.losses.get(job.name):
            raise self.losses[job.name].pop(0)
        ended: Ended = pickle.loads(pickle.dumps(attempt(pickle.loads(pickle.dumps(job)))))
        return ended

    def init(self, address: str, **_: Any) -> None:
        self.joined.append(address)

    def nodes(self) -> list[dict[str, Any]]:
        return self.machines


@pytest.fixture(name="ray")
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Ray:
    one = Ray()
    modules: dict[str, dict[str, Any]] = {
        "ray": {
            **{name: getattr(one, name) for name in ("remote", "wait", "get", "nodes", "init")},
            "shutdown": lambda: None,
            "__spec__": ModuleSpec("ray", None),  # is installed, for who asks
        },
        "ray.exceptions": one.errors,
    }
    for name, values in modules.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    return one
