"""Stages: done work is taken up again, changed or damaged work is done again, nothing is left after user errors."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from export.errors import ModelError, RecipeError
from pipeline.bundle import stages
from pipeline.bundle.stages import WorkFolder
from pipeline.command import judge

OUTPUT = "bundle/a.bin"


class Counter:
    """A stage that counts how often it is done."""

    def __init__(self, work: WorkFolder) -> None:
        self.work, self.count = work, 0

    def __call__(self, depends: Any = None) -> bytes:
        def do() -> bytes:
            self.count += 1
            (self.work.path / OUTPUT).write_bytes(b"result")
            return b"result"

        return self.work.run("a", (OUTPUT,), do, (self.work.path / OUTPUT).read_bytes, depends)


class Stop(BaseException):
    """Stands for an interruption."""


def interrupted(path: Path, key: str = "key", depends: Any = None) -> None:
    """Do stage a, then stop."""
    with pytest.raises(Stop), WorkFolder(path, key) as work:
        Counter(work)(depends)
        raise Stop


def resumed_count(path: Path, key: str = "key", depends: Any = None) -> int:
    """How often stage a is done on resume; its result is right in any case."""
    with WorkFolder(path, key, resume=True) as work:
        stage = Counter(work)
        assert stage(depends) == b"result"
        assert [row.name for row in work.times] == ["a"]
    return stage.count


def test_a_finished_stage_is_not_done_again(tmp_path: Path) -> None:
    interrupted(tmp_path / "x.partial")
    assert resumed_count(tmp_path / "x.partial") == 0


@pytest.mark.parametrize(("key", "depends"), [("other", None), ("key", ["rtx"])])
def test_what_matters_changed(tmp_path: Path, key: str, depends: Any) -> None:
    interrupted(tmp_path / "x.partial")
    assert resumed_count(tmp_path / "x.partial", key, depends) == 1


@pytest.mark.parametrize("content", [None, b"", b"resulT"])
def test_damaged_files_are_made_again(tmp_path: Path, content: bytes | None) -> None:
    interrupted(tmp_path / "x.partial")
    target = tmp_path / "x.partial" / OUTPUT
    target.unlink() if content is None else target.write_bytes(content)
    assert resumed_count(tmp_path / "x.partial") == 1


def test_a_changed_key_clears_everything(tmp_path: Path) -> None:
    interrupted(tmp_path / "x.partial")
    (tmp_path / "x.partial/calibrate").mkdir()
    with WorkFolder(tmp_path / "x.partial", "other", resume=True) as work:
        assert not (work.path / "calibrate").exists() and not (work.path / OUTPUT).exists()


def test_an_old_work_folder_is_refused_without_resume(tmp_path: Path) -> None:
    interrupted(tmp_path / "x.partial")
    with (
        pytest.raises(RecipeError, match="add --resume to finish it, or --force"),
        WorkFolder(tmp_path / "x.partial", "key"),
    ):
        pytest.fail("entered")
    assert resumed_count(tmp_path / "x.partial") == 0, "the refusal must not touch the saved state"


def test_force_starts_again(tmp_path: Path) -> None:
    interrupted(tmp_path / "x.partial")
    with WorkFolder(tmp_path / "x.partial", "key", force=True) as work:
        assert not (work.path / OUTPUT).exists()


def test_success_removes_the_folder(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "x.partial", "key") as work:
        Counter(work)()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ModelError("bad weights"), OSError(errno.ENOSPC, "No space left on device")])
def test_user_errors_and_a_full_disk_leave_nothing(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)), WorkFolder(tmp_path / "deep/er/x.partial", "key") as work:
        Counter(work)()
        raise error
    assert list(tmp_path.iterdir()) == [], "parents that the build made are removed too"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), AssertionError("a bug")])
def test_interruptions_and_bugs_keep_the_state(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), WorkFolder(tmp_path / "x.partial", "key") as work:
        Counter(work)()
        raise error
    assert "x.partial; run the same command again with --resume" in judge(error)[1]
    assert resumed_count(tmp_path / "x.partial") == 0


def test_a_full_disk_at_the_start_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stages, "write_json", full)
    with pytest.raises(OSError, match="No space"), WorkFolder(tmp_path / "deep/x.partial", "key"):
        pytest.fail("entered")
    assert list(tmp_path.iterdir()) == []


def test_two_builds_of_one_output(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "x.partial", "key") as work:
        Counter(work)()
        other = WorkFolder(tmp_path / "x.partial", "key", resume=True)
        with pytest.raises(RecipeError, match=r"another build.* is writing"), other:
            pytest.fail("entered")
        assert (work.path / OUTPUT).read_bytes() == b"result"


def test_unwritable_parent(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RecipeError, match=r"cannot write to .*choose another"),
        WorkFolder(tmp_path / "file/x.partial", "key"),
    ):
        pytest.fail("entered")


def test_a_marker_is_whole_or_absent(tmp_path: Path) -> None:
    interrupted(tmp_path / "x.partial")
    marker = json.loads((tmp_path / "x.partial/stages/a.json").read_text())
    assert list(marker["files"]) == [OUTPUT] and not list((tmp_path / "x.partial").rglob("*.part"))


def test_stage_events_tell_seconds_and_memory(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    with WorkFolder(tmp_path / "x.partial", "key", listener=events.append) as work:
        Counter(work)()
    assert [event["status"] for event in events] == ["started", "finished"]
    assert events[1]["seconds"] >= 0 and events[1]["peak_memory_bytes"] > 2**20
