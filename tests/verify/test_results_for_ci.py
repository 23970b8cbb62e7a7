"""What CI systems read of a verification: JUnit's XML, and a summary in Markdown."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.tools.environments import CannotBeHadError
from export.errors import ContractError
from pipeline.verify.baseline import compare, load_tolerances
from pipeline.verify.junit import write_error, write_junit
from pipeline.verify.report import Gate, Report
from pipeline.verify.summary import MOST_ROWS, add_summary, failure_summary, summary
from tests.support.environments import python_with, without_xdist
from tests.verify.test_baseline import GATES, record

BAD = Gate("cpu/finite", 3, 0, "values", 'first in a <layer> & a "name"\x00')
COMPARISON = compare(record(), record(bytes_cpu=2000, speed_cpu_onnxruntime_fp32=20), load_tolerances())


def written(path: Path, gates: list[Gate]) -> ElementTree.Element:
    write_junit(path, "pixart", gates, COMPARISON, 12.5)
    return ElementTree.parse(path).getroot()


def test_every_gate_and_every_compared_number_is_a_test_case(tmp_path: Path) -> None:
    root = written(tmp_path / "sub/out.xml", [*GATES, BAD])
    assert root.tag == "testsuites" and root.attrib["time"] == "12.500"
    assert [suite.attrib["name"] for suite in root] == ["pixart", "pixart/cpu", "pixart/baseline"]
    cases = {(case.attrib["classname"], case.attrib["name"]): case for case in root.iter("testcase")}
    assert len(cases) == len(GATES) + 1 + len(COMPARISON.rows)
    failed = {name: case.find("failure") for name, case in cases.items() if case.find("failure") is not None}
    assert failed.keys() == {("pixart.cpu", "finite"), ("pixart.baseline", "bytes/cpu")}
    assert root.attrib["failures"] == "2" and root.attrib["tests"] == str(len(cases))
    message = cases["pixart.cpu", "finite"].find("failure")
    assert message is not None and message.attrib["type"] == "ParityError"
    assert message.attrib["message"] == '3 values, limit: at most 0; first in a <layer> & a "name"?'
    skipped = cases["pixart.baseline", "gates/cpu/median_sqnr_db"].find("skipped")
    assert skipped is not None and "median jumps" in skipped.attrib["message"]
    assert cases["pixart.cpu", "gemm_exact"].findtext("system-out") == "0, limit: at most 0; exact"


def test_what_could_not_be_verified_is_an_error(tmp_path: Path) -> None:
    write_error(tmp_path / "out.xml", "a name\udcff", ContractError("a file\nis missing"), 1.0)
    root = ElementTree.parse(tmp_path / "out.xml").getroot()
    assert root.attrib["errors"] == root.attrib["tests"] == "1"
    [error] = root.iter("error")
    assert error.attrib == {"message": "a file is missing", "type": "ContractError"}


READER = """
import json, sys
from junitparser import JUnitXml
xml = JUnitXml.fromfile(sys.argv[1])
cases = [case for suite in xml for case in suite]
print(json.dumps([xml.tests, xml.failures, len(cases), sum(bool(case.result) for case in cases)]))
"""


@pytest.mark.slow
def test_no_gate_is_an_error(tmp_path: Path) -> None:
    write_junit(tmp_path / "out.xml", "pixart", [])
    [error] = ElementTree.parse(tmp_path / "out.xml").iter("error")
    assert error.attrib["message"] == "no parity gate was run"


def test_a_reader_of_junit_reads_it(tmp_path: Path) -> None:
    try:
        python = python_with("junitparser", "junitparser>=4,<5")
    except CannotBeHadError as error:
        pytest.skip(str(error))
    written(tmp_path / "out.xml", [*GATES, BAD])
    command = [str(python), "-c", READER, str(tmp_path / "out.xml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=without_xdist())
    count = len(GATES) + 1 + len(COMPARISON.rows)
    assert json.loads(done.stdout) == [count, 2, count, 3]


# --- Markdown ---------------------------------------------------------------------------------------------------------


def test_a_summary_says_first_what_is_wrong() -> None:
    text = summary("pixart", Report([*GATES, BAD], notes=["quick | verification"]), COMPARISON)
    lines = text.splitlines()
    assert lines[0] == "### FAILED: pixart"
    assert "5 of 6 gates passed; 1 of 6 numbers are worse than the baseline's, 1 were not compared." in lines
    failed = next(i for i, line in enumerate(lines) if "**FAILED**" in line)
    worse = next(i for i, line in enumerate(lines) if "**worse**" in line)
    assert failed < worse < lines.index("<details><summary>All gates</summary>")
    assert "&#60;layer>" in lines[failed] and "| 3 values | &le; 0 |" in lines[failed]
    assert "| **worse** | bytes/cpu | 1000 bytes | 2000 bytes | 1000 | 10 |" in lines
    assert "| better | speed/cpu/onnxruntime_fp32 | 10 x | 20 x | -10 | 3 |" in lines
    assert "> quick &#124; verification" in lines
    rows = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in rows} == {6, 7}


def test_names_from_outside_are_plain_text() -> None:
    text = failure_summary("a` ![t](http://x) <b> @who | \\", ContractError("one\n::error::two"))
    assert not set("`[]<@|\\") & set(text) and "one ::error::two" in text


def test_the_verdict_of_a_summary() -> None:
    assert summary("e", Report(list(GATES))).startswith("### PASSED: e\n\n5 of 5 gates passed.\n")
    assert summary("e", Report(list(GATES)), COMPARISON).startswith("### WORSE than the baseline: e\n")
    assert summary("e", Report()).startswith("### FAILED: e\n\n0 of 0 gates passed.\n")
    assert failure_summary("e", ContractError("no\nbundle")) == "### FAILED: e\n\nno bundle\n"


def test_a_long_table_is_cut_and_says_so() -> None:
    text = summary("e", Report([Gate(f"cpu/{i}", 0, 0, "", "") for i in range(MOST_ROWS + 7)]))
    assert "and 7 more" in text and text.count("\n| ok |") == MOST_ROWS


def test_summaries_are_added_to_the_file_of_a_step(tmp_path: Path) -> None:
    path = tmp_path / "sub/step.md"
    add_summary(path, "### a\n")
    add_summary(path, "### b\udcff\n")
    assert path.read_text() == "### a\n\n### b\\udcff\n"
    with pytest.raises(ContractError, match="is a folder, not a file"):
        add_summary(tmp_path, "### a\n")
