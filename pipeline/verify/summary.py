"""`verify --summary FILE`: the verdict, what failed or got worse, and all gates, in Markdown for a pull request."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from export.documents import open_file
from pipeline.verify.baseline import Compared, Comparison
from pipeline.verify.report import Gate, Report, number

# What Markdown and GitHub read as more than a letter.
MARKS = frozenset("|<`[]@\\")
# GitHub shows nothing of a step's summary that is longer than 1 MiB; so many rows of a table stay far below.
MOST_ROWS = 500
GATE_HEAD = ("", "gate", "value", "limit", "why this limit")
BASELINE_HEAD = ("", "number", "baseline", "now", "worse by", "tolerated")


def summary(engine: str, report: Report, comparison: Comparison | None = None) -> str:
    """A section of Markdown, as GitHub and GitLab show it: what is wrong first, all numbers folded away."""
    failed, worse = report.failures(), [] if comparison is None else comparison.worse
    passed = f"{len(report.gates) - len(failed)} of {len(report.gates)} gates passed"
    verdict = "FAILED" if failed or not report.gates else "WORSE than the baseline" if worse else "PASSED"
    parts = [f"### {verdict}: {_cell(engine)}", f"{passed}{_beside(comparison)}."]
    if failed:
        parts.append(_table(GATE_HEAD, map(_gate_row, failed)))
    if comparison is not None:
        moved = [*worse, *(row for row in comparison.rows if row.verdict == "better")]
        if moved:
            parts.append(_table(BASELINE_HEAD, map(_compared_row, moved)))
        parts += [f"- {_cell(note)}" for note in comparison.notes]
    parts += [f"> {_cell(note)}" for note in report.notes]
    if report.gates:
        table = _table(GATE_HEAD, map(_gate_row, report.gates))
        parts.append(f"<details><summary>All gates</summary>\n\n{table}\n\n</details>")
    return "\n\n".join(parts) + "\n"


def failure_summary(engine: str, error: Exception) -> str:
    """The section where nothing could be verified."""
    return f"### FAILED: {_cell(engine)}\n\n{_cell(str(error))}\n"


def add_summary(path: Path, text: str) -> None:
    """Put a section at the end of a file, which is made where it is not there: CI systems hand one file to all commands
    of a step. Raises ContractError where the name is that of no plain file."""
    if os.path.lexists(path):
        open_file(path).close()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(("\n" if stream.tell() else "") + text)


def _beside(comparison: Comparison | None) -> str:
    if comparison is None:
        return ""
    compared = [row for row in comparison.rows if row.verdict != "not compared"]
    count = f"{len(comparison.worse)} of {len(compared)} numbers are worse than the baseline's"
    return f"; {count}, {len(comparison.rows) - len(compared)} were not compared"


def _gate_row(gate: Gate) -> Sequence[str]:
    side = "&le;" if gate.at_most else "&ge;"
    value = f"{number(gate.value)} {gate.unit}".rstrip()
    return "ok" if gate.passed else "**FAILED**", gate.name, value, f"{side} {number(gate.limit)}", gate.why


def _compared_row(row: Compared) -> Sequence[str]:
    before, now = (
        "-" if side is None else f"{number(side.value)} {side.unit}".rstrip() for side in (row.baseline, row.value)
    )
    verdict = "**worse**" if row.verdict == "worse" else row.verdict
    return verdict, row.name, before, now, number(row.worse_by), number(row.allowed)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    listed = list(rows)
    lines = [head, ["---"] * len(head), *listed[:MOST_ROWS]]
    text = "\n".join(f"| {' | '.join(map(_cell, cells))} |" for cells in lines)
    return text if len(listed) <= MOST_ROWS else f"{text}\n\nand {len(listed) - MOST_ROWS} more"


def _cell(text: str) -> str:
    """On one line, and as plain text: nothing ends a cell, begins HTML, a link or code, or calls anybody."""
    return "".join(f"&#{ord(letter)};" if letter in MARKS else letter for letter in " ".join(text.split()))
