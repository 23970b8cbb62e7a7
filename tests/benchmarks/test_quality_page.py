"""The quality page: tables, verdicts, sentences and plots from given records."""

import json
from pathlib import Path

import pytest

from benchmarks import record
from benchmarks.quality import answers as quality_answers
from benchmarks.quality import tables as quality_tables
from benchmarks.quality.plots import draw_all
from benchmarks.quality.results import FAILED, FLOAT, MEASURED, Results
from benchmarks.quality.rows import TABLES, nearest_rows

pytestmark = pytest.mark.torch


def estimate(value):
    return {"value": value, "low": 0.9 * value, "high": 1.1 * value}


def made_up(distance, psnr=30.0, size=1000):
    names = ("frechet_to_real", "frechet_increase", "accuracy", "ssim")
    return {
        "status": MEASURED,
        **{name: estimate(0.5) for name in names},
        "frechet_to_float": estimate(distance),
        "psnr_db": estimate(psnr),
        "weight_bytes": size,
        "weights": 1.9 * size,  # scales take bytes as well
        "calibration_minutes": 0.1,
        "step_sqnr_db": [20.0, 10.0],
        "drawn_by": "cpu engine, stock",
        "proof": {"engine_against_reference_sqnr_db": psnr + 10},
    }


def sensitivity_rows():
    """Two kinds at W4A4, the second the worse one but for the first step."""
    steps = {"a": [5.0, 40, 40, 40], "b": [10.0, 20, 20, 20], "all": [20.0, 30, 20, 10]}
    shown = {"a": (30.0, 22.0, 20.0), "b": (25.0, 15.0, 10.0), "all": (24.0, 14.0, 9.0)}
    parts = ("weights", "activations", "both")
    return [
        {"row": "fp-w4a4", "kind": kind, "part": part, "sqnr_db": value, "step_sqnr_db": steps[kind]}
        for kind, values in shown.items()
        for part, value in zip(parts, values, strict=True)
    ]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)


@pytest.fixture
def results(tmp_path):
    store = Results("dit_mini", tmp_path)
    facts = {"count": 4, "prompts": "p", "n_steps": 2, "sampler": "s", "guidance_scale": 2.0, "seed": 0}
    store.add(FLOAT, made_up(0.0), facts)
    store.add("rtn-fp-channel-w4a6", made_up(1.0), facts)
    store.add("rtn-int-channel-w4a6", made_up(3.0, 25.0), facts)
    store.add("rtn-fp-exact64-w4a6", made_up(1.05), facts)
    store.add("fp4dit-mixed-exact64-w4a6", {"status": FAILED, "reason": "ValueError: x | y"}, facts)
    store.put("sensitivity", sensitivity_rows(), facts)
    return store


def test_records_stand_beside_each_other(results):
    document = results.read()
    assert len(document["rows"]) == 5 and document["sensitivity"] and document["subject"]["count"] == 4
    assert not list(results.folder.glob("*.part"))


@pytest.mark.usefixtures("results")
def test_a_page_has_the_numbers_and_says_what_is_missing():
    page = quality_tables.page()
    assert "| round to nearest, FP | 1.05 (0.945 to 1.16) |" in page
    assert "Engine and reference agree on their call to 35.0 dB or better." in page
    assert "| failed: ValueError: x / y |" in page and "not measured yet" in page
    assert "- W4A6, channel: distance x 0.33 (better), PSNR +5.0 dB (within chance)" in page
    assert "E3M0 before GELU against" not in page  # neither row is measured: nothing is said
    assert all(table.question in page for table in TABLES.values())
    short = quality_tables.short_table()
    assert "| round to nearest, FP | - | - | - | - | 1.05; 30.0 dB | - |" in short


def test_without_results_the_readme_says_so():
    assert quality_tables.short_table().startswith("Not measured yet")


@pytest.mark.parametrize(("first", "second", "verdict"), [(1, 2, "better"), (2, 1, "worse"), (1, 1.1, "within chance")])
def test_estimates_are_compared_by_their_intervals(first, second, verdict):
    assert quality_answers.compare(estimate(first), estimate(second), less_is_better=True) == verdict


@pytest.mark.parametrize(
    ("value", "verdict"),
    [(0.2, "reached"), (0.245, "reached within chance"), (0.255, "missed within chance"), (0.4, "missed")],
)
def test_the_aim_is_a_quarter_of_round_to_nearest_in_the_same_formats(value, verdict):
    row, base, other = "fp4dit-mixed-exact64-w4a6", "rtn-mixed-exact64-w4a6", "rtn-fp-exact64-w4a6"
    rows = {row: made_up(value), base: made_up(1.0), other: made_up(0.5)}
    cells = [f"`{row}`", f"`{base}`", f"{value:.3g} of 1, x {value:.2f} (better)", "+0.0 dB (within chance)", verdict]
    assert quality_answers.against_nearest(rows, row, base)[:5] == cells
    assert quality_answers.against_nearest(rows, row, base)[5].startswith(f"x {value / 0.5:.2f}")
    assert quality_answers.aim_to_float(rows, [(row, base)]) == f"{verdict} by `fp4dit-mixed-exact64` ({value:.2f})"


def test_without_its_round_to_nearest_no_row_is_judged():
    row, base = "fp4dit-mixed-exact64-w4a6", "rtn-mixed-exact64-w4a6"
    rows = {row: made_up(0.1), "rtn-fp-exact64-w4a6": made_up(1.0)}
    assert quality_answers.against_nearest(rows, row, base)[1:5] == [f"`{base}`: not measured yet", "", "", ""]
    assert quality_answers.aim_to_float(rows, [(row, base)]) == ""
    assert quality_answers.aim_to_real(rows, [(row, base)]) == {}
    assert quality_answers.methods({}) == []


@pytest.mark.parametrize(
    ("low", "high", "kind"), [(-4.5, -2.8, "SHRANK"), (-0.1, 2.0, "UNSURE"), (0.0, 2.0, "UNSURE"), (0.2, 2.0, "GREW")]
)
def test_the_distance_to_real_data_judges_only_where_it_grew(low, high, kind):
    row, base = "fp4dit-mixed-exact64-w4a6", "rtn-mixed-exact64-w4a6"
    growth = {"value": (low + high) / 2, "low": low, "high": high}
    rows = {base: made_up(1.0) | {"frechet_increase": growth}}
    rows[row] = made_up(0.1) | {"frechet_increase": {"value": 0.01, "low": 0.005, "high": 0.02}}
    ((verdict, text),) = quality_answers.aim_to_real(rows, [(row, base)]).items()
    assert verdict == getattr(quality_answers, kind)
    assert text.startswith(f"`{base}` {growth['value']:+.2f} ({low:+.2f} to {high:+.2f})")
    assert text.endswith(f"with `{row}` +0.01, reached") == (kind == "GREW")


def test_each_row_has_the_round_to_nearest_of_its_own_formats():
    nearest = nearest_rows()
    assert nearest["fp4dit-fp-exact64-w4a6"] == nearest["fp4dit-fp-full-w4a6"] == "rtn-fp-exact64-w4a6"
    assert nearest["fp4dit-mixed-group128-w4a8"] == "rtn-mixed-group128-w4a8"
    assert nearest["brecq-int-channel-w4a4"] == "rtn-int-channel-w4a4"
    assert nearest["msfp-fp-w4a6"] == "rtn-fp-channel-w4a6"
    assert "qdit-int-group128-w6a8" not in nearest  # nobody rounds it to nearest
    assert not any(name.startswith("rtn") for name in nearest) and not any("power" in name for name in nearest.values())


def test_rows_of_modelopt_are_told_with_their_version_bytes_and_ours_of_the_same_name():
    rows = {"rtn-fp-exact64-w4a6": made_up(1.0), "awq-fp-exact64-w4a6": made_up(0.5, size=1010)}
    rows |= {"modelopt-awq-exact64-w4a6": made_up(0.2, 40.0, 1010) | {"modelopt": "0.47.0"}}
    text = quality_tables.table_text(TABLES["equal_formats"], "dit_mini", rows)
    assert "Measured with ModelOpt 0.47.0." in text.replace("\n", " ")
    assert "- AWQ, ModelOpt's, 4.21 and 4.21 bits per weight: distance x 0.20 (better), PSNR +10.0 dB (better)" in text
    against_ours = text.partition("ModelOpt's against ours of the same name:")[2]
    assert "- AWQ, 4.21 and 4.21 bits per weight: distance x 0.40 (better)" in against_ours
    rows = {"rtn-fp-exact16-w4a6": made_up(1.0), "svdquant-fp-rank2-w4a6": made_up(0.5, size=1010)}
    text = quality_tables.table_text(TABLES["equal_bytes"], "dit_mini", rows)
    assert "The bytes of these rows differ by at most 1.0%." in text
    assert "Measured with ModelOpt" not in text and "bytes of these" not in "".join(
        part for answer in quality_answers.ANSWERS["equal_bytes"] for part in answer({})
    )


def test_sensitivity_is_told_from_the_noise_of_kinds_parts_and_steps():
    text = "\n".join(quality_answers.sensitivity_answers(sensitivity_rows()))
    assert (
        "- FP W4A4: `b` 10.0 dB, `a` 20.0 dB; all together 9.0 dB, with 10.0 times the noise from activations" in text
    )
    # noise 0.01, 0.001, 0.01, 0.1: of 0.121 the last of four steps has 83 %
    assert "20.0 dB in the first, 30.0 dB at best (step 1), 10.0 dB in the last; the last 1 of 4 steps hold 83%" in text
    assert "costliest: `a` in 1, `b` in 3" in text
    assert quality_answers.sensitivity_answers([]) == []


@pytest.mark.parametrize("without", ["", "sensitivity"])
def test_plots_are_drawn_from_what_there_is(without, results, tmp_path):
    document = results.read()
    results.path.write_text(json.dumps({key: value for key, value in document.items() if key != without}))
    paths = draw_all(tmp_path / "docs")
    assert {path.name for path in paths} >= {"quality_methods.png", "quality_groups.png", "quality_sensitivity.png"}
    assert all(Path(path).read_bytes()[:4] == b"\x89PNG" for path in paths)


@pytest.mark.parametrize(("own", "ending"), [(0.5, "bytes 0.5, so x 0.500."), (None, "bytes not scored.")])
def test_a_search_by_pictures_is_told_with_what_it_started_from(own, ending, tmp_path):
    assert quality_tables.search_text() == ""
    record = {"recipe": "r", "origin": {"score": "frechet from float", "count": 9}, "scored": 7, "seconds": 120.0}
    record |= {"machine": {"cpu": "c"}, "commit": "abc", "cost": 0.25, "group_sizes": "64*2", "unsearched_cost": own}
    (tmp_path / "search_groups.json").write_text(json.dumps(record | {"size_bytes": 1000, "budget_bytes": 2000}))
    shown = quality_tables.search_text()
    assert "7 candidates, 2 min" in shown and "0.25 with 64*2 in 1,000 bytes" in shown and shown.endswith(ending)
