"""Jobs of a cluster whose processes are lost, with a stand-in for Ray; the real one: tests/sweep/test_ray.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from export.errors import EnvironmentLacksError
from pipeline.jobs.jobs import Ended, Job
from pipeline.jobs.ray_jobs import Cluster, Share, whole_machines

LOST = ("WorkerCrashedError", "NodeDiedError", "ObjectLostError", "LocalRayletDiedError", "OutOfMemoryError")


class Ray:
    """What is asked of the module `ray`. losses: of a job by name, the errors of its first tries, in order."""

    def __init__(self) -> None:
        self.losses: dict[str, list[Exception]] = {}
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.machines: list[dict[str, Any]] = []
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
        return Ended(job.name, job.work())

    def nodes(self) -> list[dict[str, Any]]:
        return self.machines


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    one = Ray()
    modules: dict[str, dict[str, Any]] = {
        "ray": {"remote": one.remote, "wait": one.wait, "get": one.get, "nodes": one.nodes},
        "ray.exceptions": one.errors,
    }
    for name, values in modules.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    return one


@pytest.mark.parametrize("name", LOST)
def test_a_job_whose_process_is_lost_is_done_again(name: str, ray: Ray) -> None:
    ray.losses["first"] = [ray.errors[name]("gone")] * 2
    jobs = [Job("first", lambda: 1), Job("second", lambda: 2, after="first"), Job("third", lambda: 3, alone=True)]
    ended = {one.name: one for one in Cluster(Share(2))(jobs)}
    assert {name: (one.result, one.tries) for name, one in ended.items()} == {
        "first": (1, 3),
        "second": (2, 1),
        "third": (3, 1),
    }
    assert [name for name, _ in ray.sent].count("first") == 3 and ray.sent[-1][0] == "second"
    calls = {name: options["max_calls"] for name, options in ray.sent}
    assert calls == {"first": 0, "third": 1, "second": 0}, "one that is alone has a process of its own"


def test_the_third_loss_is_its_end_and_that_of_what_waits_for_it(ray: Ray, tmp_path: Path) -> None:
    ray.losses["first"] = [ray.errors["WorkerCrashedError"]("killed\nby nobody known")] * 3
    jobs = [Job("first", lambda: 1, log=tmp_path / "log"), Job("second", lambda: 2, after="first")]
    first, second = Cluster(Share(2))(jobs)
    assert first.exit_code == EnvironmentLacksError.exit_code and first.tries == 3
    assert first.reason.startswith("its process was lost 3 times (") and str(tmp_path / "log") in first.reason
    assert second.tries == 0 and second.reason.startswith("first: its process was lost")


def test_a_machine_that_cannot_begin_is_not_asked_again(ray: Ray) -> None:
    ray.losses["first"] = [ray.errors["RayError"]("No module named 'pipeline'")]
    [first] = Cluster(Share(2))([Job("first", lambda: 1)])
    assert first.tries == 1 and "cannot begin it (No module named 'pipeline')" in first.reason


def test_a_job_takes_the_whole_of_the_smallest_machine(ray: Ray, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(EnvironmentLacksError, match="no machine is in the Ray cluster yet"):
        whole_machines(None, 0.0)
    ray.machines = [
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}},
        {"Alive": True, "Resources": {"CPU": 2.0}},
        {"Alive": False, "Resources": {"CPU": 1.0}},
        {"Alive": True, "Resources": {"memory": 1.0}},
    ]
    assert whole_machines(None, 0.0) == Share(2) and whole_machines(None, 1.0) == Share(8, 1.0)
    assert not caplog.records
    assert whole_machines(16, 0.0) == Share(16) and "no machine of the cluster has 16 processors" in caplog.text
