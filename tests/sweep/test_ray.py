"""`sweep --ray` on a cluster of two nodes, of which a worker is killed in the middle of a job."""

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


def workers(parent: psutil.Process) -> list[psutil.Process]:
    """Processes of the cluster that do a job."""
    found = []
    for process in parent.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if " ".join(process.cmdline()).startswith(WORKER):
                found.append(process)
    return found


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
            until(lambda: started.poll() is not None or any(out.glob("bundles/*.partial/stages/export.json")))
            assert started.poll() is None, log.read_text()
            [path] = list(out.glob("bundles/*.partial/stages/export.json"))[:1]
            name = path.parents[1].name.removesuffix(".partial")
            killed = [one for one in workers(parent) if name in " ".join(one.cmdline())]
            assert len(killed) == 1, [one.cmdline() for one in workers(parent)]
            (killed[0] if lost == "worker" else killed[0].parent()).kill()  # a node's processes end with it
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
