"""`sweep --ray` on a cluster of two nodes, of which a worker, or one node, is killed in the middle of a build."""

from __future__ import annotations

import contextlib
import csv
import json
import subprocess
from pathlib import Path

import psutil
import pytest

from pipeline.bundle.bundle import load_bundle
from tests.support import hostile
from tests.support.environments import without_xdist
from tests.support.ray_started import ROOT, cluster, python, until  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.process]
WORKER = "ray::ditc"
SWEEP = """
schema_version = 1
recipes = ["recipe.toml"]
targets = "cpu"
[options.one]
sampling.n_steps = 1
[options.two]
sampling.n_steps = 2
"""
NAMES = ["fuzzed-one", "fuzzed-two"]


def workers(parent: psutil.Process) -> dict[psutil.Process, str]:
    """Processes of the cluster that do a job, each with its title, which names the job."""
    found = {}
    for process in parent.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            title = " ".join(process.cmdline())
            if title.startswith(WORKER):
                found[process] = title
    return found


def half_way(parent: psutil.Process, out: Path, lost: str) -> list[tuple[psutil.Process, str]]:
    """Workers that have made an engine's model and not yet the engine, with its name. lost: "node" for those of the
    second node alone: the sweep is a process of the first one."""
    nodes = [one for one in parent.children(recursive=True) if one.name() == "raylet"]
    last = max(nodes, key=psutil.Process.create_time)
    names = [path.parents[1].name.removesuffix(".partial") for path in out.glob("bundles/*.partial/stages/export.json")]
    return [
        (worker, name)
        for name in names
        for worker, title in workers(parent).items()
        if name in title and (lost == "worker" or worker.parent() == last)
    ]


@pytest.mark.parametrize("lost", ["worker", "node"])
def test_a_job_of_a_lost_process_is_done_again(lost: str, tmp_path: Path, python: str) -> None:  # noqa: F811
    hostile.make_models(tmp_path)
    (tmp_path / "recipe.toml").write_text(hostile.RECIPE.format(model=tmp_path / "model"))
    (tmp_path / "sweep.toml").write_text(SWEEP)
    log, out = tmp_path / "log", tmp_path / "out"
    with cluster(python) as (address, parent):
        command = [python, "-m", "pipeline.sweep", str(tmp_path / "sweep.toml"), "-o", str(out), "--ray", address]
        own = {"PYTHONPATH": str(ROOT)}
        with log.open("w") as stream:
            started = subprocess.Popen(
                command,
                cwd=tmp_path,
                env={**without_xdist(), **own},
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
            )
        try:
            until(lambda: started.poll() is not None or half_way(parent, out, lost))
            assert started.poll() is None, log.read_text()
            worker, name = half_way(parent, out, lost)[0]
            if lost == "node":
                worker.parent().kill()
            worker.kill()
            answer, _ = started.communicate(timeout=900)
        finally:
            started.kill()
        until(lambda: not workers(parent))
    said = log.read_text()
    assert started.returncode == 0, said
    assert answer.splitlines()[-1] == f"PASSED {out}"
    assert f"{name}: its process was lost" in said and "Traceback" not in said
    tries = {row["name"]: row["tries"] for row in json.loads((out / "sweep.json").read_text())["builds"]}
    assert tries == {one: 2 if one == name else 1 for one in NAMES}
    assert "export: done before" in (out / f"logs/{name}.log").read_text(), "the second try went on with the first"
    with (out / "table.csv").open(newline="") as stream:
        assert [row["status"] for row in csv.DictReader(stream)] == ["built", "built"]
    assert len(list((out / "calibrations").iterdir())) == 1, "both builds share one"
    assert sorted(path.name for path in (out / "bundles").iterdir()) == NAMES
    for one in NAMES:
        assert load_bundle(out / "bundles" / one).targets
