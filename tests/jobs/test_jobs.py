"""Jobs of this process: what fails ends itself and what waits for it, and no more."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import pytest

from export.errors import ParityError
from pipeline.jobs.jobs import Job, in_turn

logger = logging.getLogger("pipeline.tests")


def say(word: str) -> str:
    logger.warning("said %s", word)
    return word


def fail(error: BaseException) -> None:
    raise error


def test_one_that_fails_ends_what_waits_for_it_and_no_other(tmp_path: Path) -> None:
    jobs = [
        Job("a", partial(fail, ParityError("a gate"))),
        Job("b", partial(say, "b"), after="a"),
        Job("c", partial(say, "c"), after="b"),
        Job("d", partial(say, "d"), log=tmp_path / "logs/d.log"),
        Job("e", partial(say, "e"), after="d"),
    ]
    ended = {row.name: row for row in in_turn(jobs)}
    assert [row.passed for row in ended.values()] == [False, False, False, True, True]
    assert (ended["a"].exit_code, ended["a"].reason, ended["a"].tries) == (4, "a gate", 1)
    assert (ended["c"].exit_code, ended["c"].reason, ended["c"].tries) == (4, "b: a: a gate", 0)
    assert ended["d"].result == "d" and ended["e"].result == "e"
    assert (tmp_path / "logs/d.log").read_text().endswith("WARNING pipeline.tests: said d\n")
    assert not logging.getLogger().handlers or "d.log" not in str(logging.getLogger().handlers)


def test_a_log_that_cannot_be_written_ends_its_job_alone(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    jobs = [Job("a", partial(say, "a"), log=tmp_path / "file" / "a.log"), Job("b", partial(say, "b"))]
    first, second = in_turn(jobs)
    assert not first.passed and second.passed
    assert first.reason == f"its log {tmp_path}/file/a.log cannot be written (File exists); choose another folder"


def test_a_bug_is_an_end_like_others_and_its_trace_is_logged(tmp_path: Path) -> None:
    [ended] = in_turn([Job("a", partial(fail, KeyError("x")), log=tmp_path / "a.log")])
    assert ended.exit_code == 1 and ended.reason.startswith("internal error, KeyError")
    assert "Traceback" in (tmp_path / "a.log").read_text()


def test_an_interruption_ends_all() -> None:
    with pytest.raises(KeyboardInterrupt):
        list(in_turn([Job("a", partial(fail, KeyboardInterrupt())), Job("b", partial(say, "b"))]))
