"""Jobs of a cluster whose processes are lost, with a stand-in for Ray; the real one: tests/sweep/test_ray.py."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from export.errors import EnvironmentLacksError
from pipeline.jobs.jobs import Job
from pipeline.jobs.ray_jobs import Cluster, Share, whole_machines
from tests.support.ray_stand_in import LOST, Ray, stand_in  # noqa: F401


@pytest.mark.parametrize("name", LOST)
def test_a_job_whose_process_is_lost_is_done_again(name: str, ray: Ray) -> None:
    ray.losses["first"] = [ray.errors[name]("gone")] * 2
    jobs = [
        Job("first", partial(int, 1)),
        Job("second", partial(int, 2), after="first"),
        Job("third", partial(int, 3), alone=True),
    ]
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
    jobs = [Job("first", partial(int, 1), log=tmp_path / "log"), Job("second", partial(int, 2), after="first")]
    first, second = Cluster(Share(2))(jobs)
    assert first.exit_code == EnvironmentLacksError.exit_code and first.tries == 3
    assert first.reason.startswith("its process was lost 3 times (") and str(tmp_path / "log") in first.reason
    assert second.tries == 0 and second.reason.startswith("first: its process was lost")


def test_a_machine_that_cannot_begin_is_not_asked_again(ray: Ray) -> None:
    ray.losses["first"] = [ray.errors["RayError"]("No module named 'pipeline'")]
    [first] = Cluster(Share(2))([Job("first", partial(int, 1))])
    assert first.tries == 1 and "cannot begin it (No module named 'pipeline')" in first.reason


def test_a_job_that_waits_for_none_of_them_is_a_fault_and_no_endless_wait(ray: Ray) -> None:
    with pytest.raises(AssertionError, match="second waits for first, which is none of these jobs"):
        list(Cluster(Share(2))([Job("second", partial(int, 2), after="first")]))


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
