"""index.html of a sweep: every build, the pictures of each model's beside each other, and a page for each pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from jinja2 import ChoiceLoader, PackageLoader

from export.documents import whole_file
from pipeline.bundle.bundle import Bundle
from pipeline.compiler import REPORT_PAGE
from pipeline.sweep.results import Row, failures, summary
from pipeline.sweep.work import Place
from pipeline.verify.baseline import compare, load_tolerances
from pipeline.verify.beside import beside, drawn_from_equal_noise, report_pictures
from pipeline.verify.beside_page import EQUAL, OTHER, write_beside_page
from pipeline.verify.page import TEMPLATES

PAGE = "index.html"
FLOAT = "float"
# Rows of pictures: what more of them show stands in the report of each bundle.
MOST_PICTURES = 4

_FOLDERS = [PackageLoader("pipeline", name) for name in ("sweep", "verify")]
_TEMPLATES = TEMPLATES.overlay(loader=ChoiceLoader(_FOLDERS))


@dataclass(frozen=True)
class Gallery:
    """Pictures of one model's builds. columns: the float model, then each build; rows: a PNG of each, None where its
    report has none."""

    model: str
    columns: Sequence[str]
    rows: Sequence[Sequence[bytes | None]]
    note: str


@dataclass(frozen=True)
class Line:
    """A row of the table, with the pages that it leads to, "" where there is none."""

    cells: Sequence[object]
    reason: str
    report: str
    beside: str


def write_page(rows: Mapping[str, Row], place: Place) -> None:
    """Write index.html and compare/NAME.html: each bundle beside the first of the same model."""
    by_model: dict[str, dict[str, Bundle]] = {}
    for name, row in rows.items():
        if row.bundle is not None:
            by_model.setdefault(row.bundle.manifest["model"]["sha256"], {})[name] = row.bundle
    pairs = {
        name: f"compare/{name}.html" for named in by_model.values() for position, name in enumerate(named) if position
    }
    for named in by_model.values():
        first, *others = (rows[name] for name in named)
        for row in others:
            _write_pair(place.folder / pairs[row.build.name], first, row)
    table = summary(rows.values())
    lines = [
        Line(cells, row.ended.reason if row.ended else "", _report(row, place), quote(pairs.get(row.build.name, "")))
        for row, cells in zip(rows.values(), table.rows, strict=True)
    ]
    page = _TEMPLATES.get_template("page_sweep.html").render(
        title=place.folder.absolute().name,
        header=table.header,
        lines=lines,
        cards=[(str(sum(row.status == word for row in rows.values())), word) for word in ("built", "kept", "failed")],
        passed=not failures(rows.values()),
        galleries=[gallery for named in by_model.values() if (gallery := _gallery(named)).rows],
    )
    with whole_file(place.folder / PAGE) as part:
        part.write_text(page, encoding="utf-8")


def _write_pair(path: Path, first: Row, other: Row) -> None:
    assert first.bundle and first.record and other.bundle and other.record
    comparison = compare(first.record, other.record, load_tolerances())
    write_beside_page(path, first.bundle, other.bundle, beside(first.bundle, other.bundle), comparison)


def _report(row: Row, place: Place) -> str:
    """The address of a build's own report, of one that failed its gates, too."""
    folder = place.bundle(row.build.name) if row.bundle else place.rejected(row.build.name)
    path = folder / REPORT_PAGE
    return quote(path.relative_to(place.folder).as_posix()) if path.is_file() else ""


def _gallery(named: Mapping[str, Bundle]) -> Gallery:
    """The first pictures of each build's first target, beside the float model's."""
    first = next(iter(named.values()))
    pictures_of = {name: report_pictures(bundle) for name, bundle in named.items()}
    floats = {row: png for (column, row), png in pictures_of[next(iter(named))].items() if column == FLOAT}
    drawn = {
        name: {row: png for (column, row), png in pictures_of[name].items() if column == bundle.targets[0]}
        for name, bundle in named.items()
    }
    numbers = sorted({row for pictures in (floats, *drawn.values()) for row in pictures})[:MOST_PICTURES]
    rows = [[floats.get(row), *(pictures.get(row) for pictures in drawn.values())] for row in numbers]
    equal = all(drawn_from_equal_noise(first, bundle) for bundle in named.values())
    return Gallery(first.manifest["model"]["source"], [FLOAT, *named], rows, EQUAL if equal else OTHER)
