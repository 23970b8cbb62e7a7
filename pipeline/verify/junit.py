"""`verify --junit FILE`: every gate as a test case, in the XML that CI systems read.

Elements and attributes are those that Jenkins, GitLab and GitHub's readers of JUnit share: testsuites, testsuite,
testcase with failure, error or skipped, and system-out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree import ElementTree

from export.documents import whole_file
from pipeline.verify.baseline import Compared, Comparison
from pipeline.verify.report import Gate

# Characters that XML 1.0 has not.
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
BASELINE = "baseline"
COUNTED = ("failure", "error", "skipped")


def write_junit(
    path: Path, engine: str, gates: Iterable[Gate], comparison: Comparison | None = None, seconds: float = 0.0
) -> None:
    """Write a suite for each part of the gates' names before the last "/" (a target, a component), and one for the
    comparison with a baseline. seconds: what all took."""
    suites: dict[str, list[ElementTree.Element]] = {}
    for gate in gates:
        suite, _, name = gate.name.rpartition("/")
        suites.setdefault(suite, []).append(_gate_case(f"{engine}.{suite}".rstrip("."), name, gate))
    if not suites:
        suites[""] = [_case(engine, "verify", "error", "no parity gate was run", "ParityError")]
    if comparison is not None:
        suites[BASELINE] = [_compared_case(f"{engine}.{BASELINE}", row) for row in comparison.rows]
    _write(path, engine, suites, seconds)


def write_error(path: Path, engine: str, error: Exception, seconds: float = 0.0) -> None:
    """Write one case that says why there is no gate: what was to be verified could not be."""
    text = " ".join(str(error).split())
    _write(path, engine, {"": [_case(engine, "verify", "error", text, type(error).__name__)]}, seconds)


def _gate_case(classname: str, name: str, gate: Gate) -> ElementTree.Element:
    side = "at most" if gate.at_most else "at least"
    numbers = f"{gate.value:g} {gate.unit}".rstrip() + f", limit: {side} {gate.limit:g}"
    if not gate.passed:
        return _case(classname, name, "failure", f"{numbers}; {gate.why}", "ParityError")
    return _case(classname, name, "system-out", f"{numbers}; {gate.why}")


def _compared_case(classname: str, row: Compared) -> ElementTree.Element:
    if row.verdict == "not compared":
        return _case(classname, row.name, "skipped", row.why)
    kind = "failure" if row.verdict == "worse" else "system-out"
    return _case(classname, row.name, kind, f"{row.sentence()}; {row.why}", "RegressionError")


def _case(classname: str, name: str, kind: str, text: str, of_type: str = "") -> ElementTree.Element:
    classname, name, text = (NOT_XML.sub("?", part) for part in (classname, name, text))
    case = ElementTree.Element("testcase", classname=classname, name=name, time="0")
    child = ElementTree.SubElement(case, kind)
    if kind in COUNTED:
        child.set("message", text)
    if kind in ("failure", "error"):
        child.set("type", of_type)
    if kind != "skipped":
        child.text = text
    return case


def _write(path: Path, engine: str, suites: dict[str, list[ElementTree.Element]], seconds: float) -> None:
    every = [case for cases in suites.values() for case in cases]
    root = ElementTree.Element("testsuites", {"name": "ditc verify", "time": f"{seconds:.3f}", **_counts(every)})
    for suite, cases in suites.items():
        # Who adds up suites gets the whole time once.
        time = f"{seconds if suite == next(iter(suites)) else 0:.3f}"
        skipped = sum(case.find("skipped") is not None for case in cases)
        name = NOT_XML.sub("?", f"{engine}/{suite}".rstrip("/"))
        attributes = {"name": name, "time": time, "skipped": str(skipped)}
        ElementTree.SubElement(root, "testsuite", attributes | _counts(cases)).extend(cases)
    ElementTree.indent(root)
    with whole_file(path) as part:
        ElementTree.ElementTree(root).write(part, encoding="utf-8", xml_declaration=True)


def _counts(cases: Sequence[ElementTree.Element]) -> dict[str, str]:
    return {
        "tests": str(len(cases)),
        "failures": str(sum(case.find("failure") is not None for case in cases)),
        "errors": str(sum(case.find("error") is not None for case in cases)),
    }
