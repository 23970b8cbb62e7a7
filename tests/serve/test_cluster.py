"""How the server joins a Ray cluster and leaves it, with a stand-in for Ray; the real one: test_ray.py."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from export.errors import ContractError, EnvironmentLacksError
from pipeline.bundle.manifest import MANIFEST_FILE
from pipeline.bundle.pipeline_bundle import manifest_sha256
from pipeline.serve.cluster import Replicas, ReplicaStream, joined, replicas
from pipeline.serve.replica import Replica
from pipeline.serve.scale import Scale


class RayTaskError(Exception):
    def __init__(self, cause: Any) -> None:
        super().__init__("a trace of another process")
        self.cause = cause


class Ray:
    """What is asked of the modules `ray` and `ray.serve`."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.clusters = {"auto", "head:6379"}
        self.cpus, self.applications, self.problem = 4, {}, ""

    def init(self, address: str, **options: Any) -> None:
        self.calls.append(("init", address, options.get("include_dashboard")))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if address not in self.clusters | {"local"}:
            raise ConnectionError(f"no cluster\nat {address}")

    def shutdown(self) -> None:
        self.calls.append("ray.shutdown")

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": self.cpus}

    def deployment(self, what: type, **options: Any) -> Any:
        self.calls.append((what, options))
        return SimpleNamespace(bind=lambda *arguments: arguments)

    def run(self, application: Any, name: str, route_prefix: None) -> Any:
        self.calls.append((application, name))
        if self.problem:
            raise RuntimeError(self.problem)
        return SimpleNamespace(options=lambda stream: SimpleNamespace(draw=None))

    def serve_shutdown(self) -> None:
        self.calls.append("serve.shutdown")


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    one = Ray()
    kinds = ("RayActorError", "NodeDiedError", "ObjectLostError", "WorkerCrashedError")
    exceptions = {name: type(name, (Exception,), {}) for name in kinds} | {"RayTaskError": RayTaskError}
    serve = {
        "start": lambda **options: one.calls.append(("serve.start", options["proxy_location"])),
        "deployment": one.deployment,
        "run": one.run,
        "delete": lambda name: one.calls.append(("delete", name)),
        "status": lambda: SimpleNamespace(applications=one.applications),
        "shutdown": one.serve_shutdown,
    }
    modules: dict[str, dict[str, Any]] = {
        "ray": {"init": one.init, "shutdown": one.shutdown, "cluster_resources": one.cluster_resources},
        "ray.exceptions": exceptions,
        "ray.serve": serve,
        "ray.serve.exceptions": {"ReplicaUnavailableError": type("ReplicaUnavailableError", (Exception,), {})},
    }
    for name, values in modules.items():
        module = ModuleType(name)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["ray"].serve = sys.modules["ray.serve"]  # type: ignore[attr-defined]
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    return one


def test_the_cluster_of_this_machine_is_joined_and_signals_stay_ours(ray: Ray) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with joined(None, Scale()):
        assert ray.calls == [("init", "auto", None)] and signal.getsignal(signal.SIGTERM) is before
    assert ray.calls[-1] == "ray.shutdown"


def test_without_a_cluster_one_is_started_here(ray: Ray) -> None:
    ray.clusters.clear()
    with joined(None, Scale(least=2, most=8, cpus=2)):
        assert ray.calls == [("init", "auto", None), ("init", "local", False)]


def test_a_machine_that_is_too_small_is_refused(ray: Ray) -> None:
    ray.clusters.clear()
    words = "3 replicas take 6 CPUs, this machine has 4"
    with pytest.raises(EnvironmentLacksError, match=words), joined(None, Scale(least=3, most=3, cpus=2)):
        pass
    with pytest.raises(EnvironmentLacksError, match="take 1 GPUs, this machine has 0"), joined(None, Scale(gpus=1)):
        pass
    assert ray.calls[-1] == "ray.shutdown"


@pytest.mark.parametrize("by", ["flag", "variable"])
def test_a_named_cluster_that_is_not_there_is_refused(by: str, ray: Ray, monkeypatch: pytest.MonkeyPatch) -> None:
    """And none is started in its place."""
    if by == "variable":
        monkeypatch.setenv("RAY_ADDRESS", "gone:1")
        ray.clusters.clear()
    words = r"the Ray cluster at gone:1 cannot be joined \(no cluster at (gone:1|auto)\); start it, and join it"
    with pytest.raises(EnvironmentLacksError, match=words), joined("gone:1" if by == "flag" else None, Scale()):
        pass
    assert len(ray.calls) == 1
    ray.clusters.add("head:6379")
    with joined("head:6379", Scale()):
        assert ray.calls[-1] == ("init", "head:6379", None)


def bundle(folder: Path) -> Any:
    (folder / MANIFEST_FILE).write_text("{}")
    return SimpleNamespace(path=folder)


def test_replicas_are_started_under_a_name_and_taken_away(ray: Ray, tmp_path: Path) -> None:
    with replicas(bundle(tmp_path), "cpu", Scale(1, 3, 2), "mine", keep_loaded=False) as started:
        assert isinstance(started, Replicas)
        start, (what, options), (application, name) = ray.calls
        assert start == ("serve.start", "Disabled") and what is Replica and name == "mine"
        assert options["autoscaling_config"]["max_replicas"] == 3 and options["ray_actor_options"]["num_cpus"] == 2
        assert application == (str(tmp_path), manifest_sha256(tmp_path), "cpu", 2, False)
    assert ray.calls[-2:] == [("delete", "mine"), "serve.shutdown"]


def test_applications_of_others_stay(ray: Ray, tmp_path: Path) -> None:
    ray.applications = {"theirs": 1}
    with replicas(bundle(tmp_path), "cpu", Scale(), "mine"):
        pass
    assert ray.calls[-1] == ("delete", "mine")


def test_replicas_that_do_not_start_say_why(ray: Ray, tmp_path: Path) -> None:
    ray.problem = "Deploying application mine failed:\n  trace\nexport.errors.RecipeError: another bundle\n\n"
    words = "the replicas do not start: export.errors.RecipeError: another bundle"
    with pytest.raises(EnvironmentLacksError, match=words), replicas(bundle(tmp_path), "cpu", Scale(), "mine"):
        pass
    assert ray.calls[-2] == ("delete", "mine")


def test_what_a_replica_raises_is_raised_here(ray: Ray) -> None:
    def failing(error: Exception) -> Any:
        raise RayTaskError(error)
        yield

    with pytest.raises(ContractError, match=r"^the graph fails$"):
        next(ReplicaStream(failing(ContractError("the graph fails"))))
