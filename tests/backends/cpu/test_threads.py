"""How many threads an engine's call takes: affinity, the container's limit in made-up trees of control groups, OMP."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from export.errors import RecipeError
from pipeline import load, machine
from pipeline.backends import BACKENDS
from pipeline.backends.cpu import engine as cpu_engine
from pipeline.bundle import bundle as bundles
from tests.support.bundles import make_bundle


@pytest.fixture(autouse=True)
def sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen processors, no OMP_NUM_THREADS."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def tree(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = {"proc/self/cgroup": "0::/\n"}
TREES: dict[str, tuple[dict[str, str], int]] = {
    "no groups": ({}, 16),
    "version 2, no limit": (V2 | {"sys/fs/cgroup/cpu.max": "max 100000\n"}, 16),
    "version 2": (V2 | {"sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
    "a part of a processor": (V2 | {"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
    "two and a half": (V2 | {"sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2),
    "more than there are": (V2 | {"sys/fs/cgroup/cpu.max": "6400000 100000\n"}, 16),
    "the group above decides": (
        {
            "proc/self/cgroup": "0::/pod/box\n",
            "sys/fs/cgroup/pod/box/cpu.max": "max 100000\n",
            "sys/fs/cgroup/pod/cpu.max": "300000 100000\n",
        },
        3,
    ),
    "seen from inside, its path from outside": (
        {"proc/self/cgroup": "0::/kubepods/box\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"},
        2,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/box\n3:memory:/docker/box\n0::/\n",
            "sys/fs/cgroup/cpu,cpuacct/docker/box/cpu.cfs_quota_us": "150000\n",
            "sys/fs/cgroup/cpu,cpuacct/docker/box/cpu.cfs_period_us": "50000\n",
        },
        3,
    ),
    "version 1, the box's own root": (
        {
            "proc/self/cgroup": "5:cpu:/docker/box\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "50000\n",
        },
        2,
    ),
    "version 1, no limit": (
        {
            "proc/self/cgroup": "5:cpu:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        16,
    ),
    "not understood": (V2 | {"sys/fs/cgroup/cpu.max": "a few\n"}, 16),
    "two hyperthreads a core": (
        {f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list": f"{i % 8},{i % 8 + 8}\n" for i in range(16)},
        8,
    ),
}


@pytest.mark.parametrize("name", TREES)
def test_the_default_respects_the_container(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, expected = TREES[name]
    monkeypatch.setattr(machine, "ROOT", tree(tmp_path, **files))
    assert machine.threads() == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("3", 3), ("64", 16), ("4,2", 4), ("", 16), ("0", 16), ("many", 16), (" 5 ", 5)]
)
def test_omp_num_threads_bounds_it(text: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.threads() == expected


def test_affinity_bounds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 7}, raising=False)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.threads() == 2


def test_what_is_asked_for_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(machine, "ROOT", tree(tmp_path, **TREES["version 2"][0]))
    assert machine.threads(24) == 24


@pytest.mark.parametrize("count", [0, -1, 10**9])
def test_wrong_numbers_are_refused(count: int, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=rf"{count} threads were asked for; use 1 to 1024"):
        load(make_bundle(tmp_path / "small"), threads=count)


def test_sessions_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(cpu_engine, "opened", lambda path, options: seen.append(options.intra_op_num_threads))
    monkeypatch.setattr(machine, "threads", lambda: 7)
    cpu_engine.open_session(Path("model.onnx"), 3)
    cpu_engine.open_session(Path("model.onnx"))
    assert seen == [3, 7]


def test_load_hands_them_to_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(BACKENDS["cpu"], "load", lambda folder, threads: seen.append(threads))
    monkeypatch.setattr(bundles.Bundle, "choose", lambda self, target: "cpu")
    folder = make_bundle(tmp_path / "small")
    load(folder, threads=3).engine()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    load(folder).engine()
    assert seen == [3, 1]


@pytest.mark.parametrize("verb", ["generate", "bench", "verify"])
def test_verbs_refuse_a_wrong_number(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline.__main__ import main

    folder = make_bundle(tmp_path / "small")
    flags = ["--prompt", "a red circle"] if verb == "generate" else []
    assert main([verb, str(folder), "--threads", "0", "--json", *flags]) == 2
    assert "0 threads were asked for" in json.loads(capsys.readouterr().out.splitlines()[-1])["reason"]
