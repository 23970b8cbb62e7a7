"""`verify` as a check of CI: what its flags write, what it exits with, and what it refuses before any work."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from export.errors import ContractError, RecipeError
from pipeline.verify import __main__ as verb
from pipeline.verify.record import read_record
from pipeline.verify.report import Gate, Report
from tests.support.bundles import make_reported, measured
from tests.verify.test_baseline import GATES, pipeline

WORSE = [replace(GATES[0], value=20.0), *GATES[1:]]
FAILED = [replace(GATES[1], value=1.0), *GATES[2:]]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_reported(tmp_path / "small", GATES, ratio=10.0)


@pytest.fixture
def gates(monkeypatch: pytest.MonkeyPatch) -> list[Gate]:
    """What a verification finds, in place of one; to be changed by a test."""
    found = list(GATES)
    asked: list[Any] = []

    def verified(path: Path, report_dir: Path, *more: Any) -> Report:
        asked.append(more)
        return Report(list(found), notes=["quick verification"] if more[-1] else [])

    monkeypatch.setattr(verb, "verify_bundle", verified)
    monkeypatch.setattr(verb, "verify_pipeline", verified)
    return found


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    code = verb.main([str(word) for word in args])
    out, log = capsys.readouterr()
    assert "Traceback" not in log
    return code, out, log


def becomes(gates: list[Gate], others: Sequence[Gate]) -> None:
    gates[:] = others


def test_all_that_a_pull_request_needs(
    bundle: Path, gates: list[Gate], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ("--junit", tmp_path / "j.xml", "--summary", tmp_path / "s.md", "--write-baseline", tmp_path / "b.json")
    code, out, _ = run(capsys, bundle, *files)
    assert code == 0 and out.splitlines()[-1] == f"PASSED {bundle}"
    assert len(list(ElementTree.parse(tmp_path / "j.xml").iter("testcase"))) == len(GATES)
    assert (tmp_path / "s.md").read_text().startswith("### PASSED: small")
    assert read_record(tmp_path / "b.json").numbers["gates/quant_sqnr_db"].value == 29.5
    becomes(gates, WORSE)
    code, out, log = run(capsys, bundle, "--baseline", tmp_path / "b.json", *files)
    reason = "worse than the baseline: gates/quant_sqnr_db = 20 dB, baseline 29.5 dB: worse by 9.5, 0.38 is tolerated"
    assert code == 6 and out.splitlines()[-1].startswith(f"FAILED {reason}") and reason in log
    assert "worse   gates/quant_sqnr_db = 20 dB" in out
    assert (tmp_path / "s.md").read_text().count("###") == 2, "summaries are added up"
    [failure] = ElementTree.parse(tmp_path / "j.xml").iter("failure")
    assert failure.attrib["type"] == "RegressionError"
    assert read_record(tmp_path / "b.json").numbers["gates/quant_sqnr_db"].value == 29.5
    assert "b.json stays as it is; --write-baseline without --baseline takes the worse numbers for good" in log


def test_a_bundle_is_a_baseline_too_and_tolerances_hold(
    bundle: Path, gates: list[Gate], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_reported(tmp_path / "other", WORSE, ratio=10.0)
    assert run(capsys, bundle, "--baseline", other)[0] == 0
    becomes(gates, WORSE)
    assert run(capsys, bundle, "--baseline", bundle)[0] == 6
    tolerances = tmp_path / "t.toml"
    tolerances.write_text('schema_version = 1\n[[tolerance]]\nof = "gates/quant*"\nabsolute = 9.5\nwhy = "w"\n')
    assert run(capsys, bundle, "--baseline", bundle, "--tolerances", tolerances)[0] == 0


def test_a_failed_gate_comes_before_a_worse_number_and_makes_no_baseline(
    bundle: Path, gates: list[Gate], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    becomes(gates, FAILED)
    code, _, log = run(capsys, bundle, "--baseline", bundle, "--write-baseline", tmp_path / "b.json")
    assert code == 4 and "parity gate failed: cpu/gemm_exact = 1" in log and not (tmp_path / "b.json").exists()


def test_speed_is_compared_where_it_was_measured_now(
    bundle: Path, gates: list[Gate], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bench.json"
    rows = measured(10.0)
    rows["ratios"]["cpu"] = {"onnxruntime_fp32": 2.0}
    path.write_text(json.dumps(rows))
    assert run(capsys, bundle, "--bench", path, "--write-baseline", tmp_path / "b.json")[0] == 0
    rows["ratios"]["cpu"]["onnxruntime_fp32"] = 1.0
    path.write_text(json.dumps(rows))
    code, _, log = run(capsys, bundle, "--bench", path, "--baseline", tmp_path / "b.json")
    assert code == 6 and "speed/cpu/onnxruntime_fp32 = 1 x, baseline 2 x" in log
    path.write_text(json.dumps(rows | {"threads": 1}))
    code, _, log = run(capsys, bundle, "--bench", path, "--baseline", tmp_path / "b.json")
    assert code == 0 and "speed is not compared: threads was 2, is 1" in log


def test_the_answer_in_json_is_json(
    bundle: Path, gates: list[Gate], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, bundle, "--baseline", bundle, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row["event"] for row in rows].count("gate") == len(GATES)
    compared = [row for row in rows if row["event"] == "baseline"]
    assert {row["verdict"] for row in compared} <= {"as good", "not compared"}
    assert rows[-1] == {"event": "result", "passed": True, "exit_code": 0, "path": str(bundle)}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--quick", "--baseline", "BUNDLE"], "is of a whole verification; leave --quick out"),
        (["--tolerances", "FILE"], "give that, too"),
        (["--bench", "FILE"], "give one of them, too"),
    ],
)
def test_flags_without_an_effect_are_refused(
    flags: list[str], sentence: str, bundle: Path, gates: list[Gate], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"BUNDLE": str(bundle), "FILE": str(tmp_path / "file")}
    code, _, log = run(capsys, bundle, *(places.get(flag, flag) for flag in flags))
    assert code == RecipeError.exit_code and sentence in log


def test_what_cannot_be_verified_is_in_every_file(
    bundle: Path, gates: list[Gate], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*_: object) -> Report:
        raise ContractError("a file differs")

    monkeypatch.setattr(verb, "verify_bundle", damaged)
    code, _, _ = run(capsys, bundle, "--junit", tmp_path / "j.xml", "--summary", tmp_path / "s.md")
    [error] = ElementTree.parse(tmp_path / "j.xml").iter("error")
    assert code == 2 and error.attrib["message"] == "a file differs"
    assert (tmp_path / "s.md").read_text() == f"### FAILED: {bundle}\n\na file differs\n"


def test_whole_pipelines_are_compared_and_measured_elsewhere(
    gates: list[Gate], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = pipeline(tmp_path / "whole")
    becomes(
        gates, [Gate("tokenizer/ids_differing", 0, 0, "", "equal"), Gate("transformer/cpu/finite", 0, 0, "", "all")]
    )
    code, out, _ = run(capsys, whole, "--baseline", whole)
    assert code == 6 and "gates/text_encoder/cpu/finite: the baseline has it, this bundle does not" in out
    becomes(gates, [*gates, Gate("text_encoder/cpu/finite", 0, 0, "", "all")])
    assert run(capsys, whole, "--baseline", whole)[0] == 0
    code, _, log = run(capsys, whole, "--bench", tmp_path / "bench.json", "--write-baseline", tmp_path / "b.json")
    assert code == 2 and "is a pipeline, whose components are measured one by one; leave out --bench" in log


@pytest.mark.parametrize("flag", ["--junit", "--summary", "--write-baseline"])
def test_what_cannot_be_written_is_refused_before_work(
    flag: str, bundle: Path, gates: list[Gate], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "verify_bundle", lambda *_: pytest.fail("work has started"))
    code, _, log = run(capsys, bundle, flag, bundle / "out")
    assert code == 2 and f"choose another {flag}" in log
    code, _, log = run(capsys, bundle, "--baseline", bundle / "none")
    assert code == 2 and "none is missing" in log


@pytest.mark.parametrize("flag", ["--junit", "--summary", "--tolerances", "--bench", "--baseline"])
def test_one_file_for_two_flags_is_refused(
    flag: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "verify_bundle", lambda *_: pytest.fail("work has started"))
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_text("kept")
    link.symlink_to(path)
    needed = ["--baseline", bundle] if flag == "--tolerances" else []
    result = "--summary" if flag in ("--junit", "--baseline") else "--write-baseline"
    code, _, log = run(capsys, bundle, flag, path, result, link, *needed)
    assert code == 2 and "are one file" in log and path.read_text() == "kept"


def test_a_baseline_may_be_renewed(
    bundle: Path, gates: list[Gate], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "b.json"
    assert run(capsys, bundle, "--write-baseline", path)[0] == 0
    assert run(capsys, bundle, "--baseline", path, "--write-baseline", path)[0] == 0
    before = path.read_bytes()
    becomes(gates, WORSE)
    for _ in range(2):
        assert run(capsys, bundle, "--baseline", path, "--write-baseline", path)[0] == 6
    assert path.read_bytes() == before, "what is worse does not become the measure of the next"


def test_a_date_among_tolerances_is_refused(
    bundle: Path, gates: list[Gate], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.toml"
    path.write_text('schema_version = 1\n[[tolerance]]\nof = "*"\nwhy = "w"\nabsolute = 1979-01-01\n')
    code, _, log = run(capsys, bundle, "--baseline", bundle, "--tolerances", path)
    assert code == 2 and "absolute is '1979-01-01'" in log
