"""The study of learned rounding: its file, what is not run again, and that it measures what it says."""

from __future__ import annotations

import json

import pytest

from benchmarks import record
from benchmarks.quality import adaround_study
from benchmarks.quality.adaround_study import ARMS, BlockCase, Results, run_arm, shortened
from benchmarks.quality.adaround_table import study_text
from pipeline import recipe as recipes
from tests.calibrate.test_reconstruct import observed_block, plans_of

pytestmark = pytest.mark.torch


@pytest.fixture
def case() -> BlockCase:
    observed = observed_block()
    return BlockCase("block", plans_of(observed), observed, observed)


def test_learned_arms_beat_nearest_and_say_what_they_did(case):
    recipe = recipes.load("pixart_w4a6")
    results = {name: run_arm(case, shortened(ARMS[name], 0.5), recipe) for name in ("nearest", "scale_aware_fast")}
    assert results["scale_aware_fast"]["loss"] < results["nearest"]["loss"] == results["nearest"]["held_out_loss"]
    assert results["nearest"]["codes_changed"] == 0 < results["scale_aware_fast"]["codes_changed"] < 1
    assert results["scale_aware_fast"]["iterations"] == ARMS["scale_aware_fast"].iterations // 2


def test_finished_arms_are_not_run_again_unless_they_differ(case, tmp_path):
    arms = {"nearest": ARMS["nearest"], "plain_fast": shortened(ARMS["plain_fast"], 0.01)}
    results = Results(tmp_path)
    for name, arm in arms.items():
        results.add("key", "block", name, run_arm(case, arm, recipes.load("pixart_w4a6")))
    again = Results(tmp_path)
    assert again.missing("key", "block", arms) == {}
    assert list(again.missing("key", "block", ARMS)) == [name for name in ARMS if name != "nearest"]
    assert again.missing("key", "other", arms) == arms
    assert json.loads((tmp_path / "adaround_study.json").read_text())["machine"]


def test_arms_that_are_unknown_are_refused(capsys):
    with pytest.raises(SystemExit):
        adaround_study.main(["no_such_arm"])
    assert "'no_such_arm' is unknown" in capsys.readouterr().err


def arm(iterations, loss, held_out, rate=1e-4):
    row = {"iterations": iterations, "learning_rate": rate, "loss": loss, "held_out_loss": held_out}
    return row | {"commit": "abc", "cpu": "X"}


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)

    def of(blocks):
        (tmp_path / "adaround_study.json").write_text(json.dumps({"recipes": {"r": blocks}, "commit": "abc"}))
        return study_text()

    return of


def test_the_page_shows_what_was_measured_and_says_what_was_not(page):
    blocks = {
        "b.0": {"nearest": arm(0, 3, 3), "scale_aware_2500": arm(2500, 1, 2), "plain_20000_same": arm(20000, 1.5, 1.5)},
        "b.1": {"nearest": arm(0, 4, 4), "scale_aware_2500": arm(2500, 2, 2)},
    }
    assert study_text() == ""
    text = page(blocks)
    assert "X, commit abc." in text
    assert "| b.0 | 3.0000 (3.0000) | 1.0000 (2.0000) | 1.5000 (1.5000) |" in text
    assert "| b.1 | 4.0000 (4.0000) | 2.0000 (2.0000) | not measured yet |" in text
    title = "scale-aware, full preset: 2,500 iterations at 0.0001"
    assert f"{title}, against plain, full preset: not measured yet" in text
    assert f"- {title}, against round to nearest: wins in all 2 blocks, 0.41 times the loss (geometric mean)" in text


def test_the_page_says_where_scale_awareness_loses_at_either_rate(page):
    learned = {"scale_aware_2500": arm(2500, 2, 2), "plain_20000_same": arm(20000, 3, 1)}
    other = {"scale_aware_2500": arm(2500, 2, 2), "plain_20000_same": arm(20000, 1, 1)}
    text = page({"b.0": learned | {"plain_20000": arm(20000, 1, 1, 1e-3)}, "b.1": other})
    title = "- scale-aware, full preset: 2,500 iterations at 0.0001, against plain"
    assert f"{title}: 20,000 iterations at 0.0001: wins in 1 of 2 blocks, loses in 1, 1.15 times the loss" in text
    lost = "loses in the one block, 2.00 times the loss"
    assert f"{title}, full preset: 20,000 iterations at 0.001: {lost}; on held-out calls it {lost}" in text
