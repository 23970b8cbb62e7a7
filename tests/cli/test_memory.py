"""How much memory new work may take: the machine's, within the limits of the container that this process runs in."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from export.errors import ResourceError
from pipeline import machine

V2 = {"proc/self/cgroup": "0::/pod/box\n"}
BOX = "sys/fs/cgroup/pod/box"
FREE = 10_000
WITHIN_CONTAINER = (" within the container's limit", "give the container more memory, or close other programs in it")
TREES: dict[str, tuple[dict[str, str], int]] = {
    "no groups": ({}, FREE),
    "version 2, no limit": (V2 | {f"{BOX}/memory.max": "max\n", f"{BOX}/memory.current": "5\n"}, FREE),
    "version 2": (V2 | {f"{BOX}/memory.max": "4000\n", f"{BOX}/memory.current": "1000\n"}, 3000),
    "what holds files is given up when asked for": (
        V2
        | {
            f"{BOX}/memory.max": "4000\n",
            f"{BOX}/memory.current": "3900\n",
            f"{BOX}/memory.stat": "anon 400\nfile 3500\nfile_mapped 10\n",
        },
        3600,
    ),
    "more than there is": (V2 | {f"{BOX}/memory.max": "90000\n", f"{BOX}/memory.current": "0\n"}, FREE),
    "used up": (V2 | {f"{BOX}/memory.max": "4000\n", f"{BOX}/memory.current": "4100\n"}, 0),
    "the group above decides": (
        V2
        | {
            f"{BOX}/memory.max": "max\n",
            f"{BOX}/memory.current": "1000\n",
            "sys/fs/cgroup/pod/memory.max": "7000\n",
            "sys/fs/cgroup/pod/memory.current": "2000\n",
        },
        5000,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/box\n3:memory:/box\n",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "6000\n",
            "sys/fs/cgroup/memory/box/memory.usage_in_bytes": "2000\n",
            "sys/fs/cgroup/memory/box/memory.stat": "cache 300\ntotal_cache 500\n",
        },
        4500,
    ),
    "not understood": (V2 | {f"{BOX}/memory.max": "much\n", f"{BOX}/memory.current": "1000\n"}, FREE),
}


@pytest.mark.parametrize("name", TREES)
def test_what_a_container_leaves_is_free(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, expected = TREES[name]
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    row = psutil.virtual_memory()._replace(available=FREE)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: row)
    free = machine.free_memory()
    assert free.size_bytes == expected
    assert (free.within, free.remedy) == (WITHIN_CONTAINER if expected < FREE else ("", "close other programs"))


def test_what_the_process_may_not_map_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    mapped = 2 * psutil.Process().memory_info().vms  # more by then than it has now
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (mapped, mapped))
    assert 0 < machine.free_memory().size_bytes <= mapped / 2
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (1, 1))
    assert machine.free_memory() == (0, " within the limit of `ulimit -v`", "raise that limit")
    with pytest.raises(ResourceError, match=r"work takes .*, 0\.0 GiB are free within .*`; raise that limit, or wait$"):
        machine.refuse_too_large(1, "work takes", "wait")
