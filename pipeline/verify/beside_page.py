"""`compare A B -o FILE.html`: one page without any link to the outside that shows two bundles side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from export.documents import whole_file
from pipeline.bundle.bundle import Bundle
from pipeline.verify.baseline import Comparison
from pipeline.verify.beside import Beside, Drawn, drawn, drawn_from_equal_noise
from pipeline.verify.page import TEMPLATES
from pipeline.verify.record import BYTES, GATES, SPEED, AnyBundle, components

KINDS = {GATES: "Gates", BYTES: "Bytes", SPEED: "Speed"}
# Columns that stand before the targets'.
FIRST = ("float", "reference")
EQUAL = "The same prompts from the same noise."
OTHER = "Model, size, steps, seed or guidance differ, so the pictures need not be alike."


def write_beside_page(path: Path, a: AnyBundle, b: AnyBundle, parts: Sequence[Beside], comparison: Comparison) -> None:
    """Write the page to `path`; folders on the way to it are made."""
    rows = {title: [row for row in comparison.rows if row.name.startswith(f"{kind}/")] for kind, title in KINDS.items()}
    failed = [len(record.failures) for record in (comparison.baseline, comparison.record)]
    page = TEMPLATES.get_template("page_beside.html").render(
        a=a,
        b=b,
        title=a.name if a.name == b.name else f"{a.name} and {b.name}",
        parts=[(part, _gallery(a, b, part.component)) for part in parts],
        numbers={title: listed for title, listed in rows.items() if listed},
        notes=comparison.notes,
        worse=comparison.worse,
        cards=_cards(comparison, failed),
    )
    with whole_file(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8")


def _cards(comparison: Comparison, failed: Sequence[int]) -> list[tuple[str, str]]:
    verdicts = [row.verdict for row in comparison.rows]
    counts = {word: verdicts.count(word) for word in ("worse", "better", "as good", "not compared")}
    return [
        *((f"{count}", f"numbers {'' if word == 'not compared' else 'of B '}{word}") for word, count in counts.items()),
        *((f"{count}", f"gates of {side} failed") for side, count in zip("AB", failed, strict=True)),
    ]


@dataclass(frozen=True)
class Gallery:
    """columns: of the reports. rows: by number, a picture of each column, None where no report has it."""

    columns: Sequence[str]
    rows: Mapping[int, Sequence[Drawn | None]]
    note: str


def _gallery(a: AnyBundle, b: AnyBundle, component: str) -> Gallery | None:
    """None where a side has no such component, or no report a picture."""
    ours, theirs = components(a).get(component), components(b).get(component)
    if ours is None or theirs is None:
        return None
    every = {(picture.column, picture.row): picture for picture in drawn(ours, theirs)}
    found = dict.fromkeys(column for column, _ in every)
    columns = [*(column for column in FIRST if column in found), *(column for column in found if column not in FIRST)]
    numbers = sorted({row for _, row in every})
    rows = {row + 1: [every.get((column, row)) for column in columns] for row in numbers}
    return Gallery(columns, rows, _note(ours, theirs)) if rows else None


def _note(a: Bundle, b: Bundle) -> str:
    return EQUAL if drawn_from_equal_noise(a, b) else OTHER
