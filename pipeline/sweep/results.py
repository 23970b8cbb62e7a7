"""What a sweep has found: sweep.json while it runs, tables of all builds when it ends."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from export.documents import plain, whole_file
from export.errors import ContractError
from pipeline import machine
from pipeline.backends import tool_versions
from pipeline.bundle.bundle import Bundle, load_bundle
from pipeline.command import Table
from pipeline.files import write_json
from pipeline.jobs.jobs import Ended
from pipeline.sweep.plan import Build
from pipeline.sweep.work import STATE, Checked, Place
from pipeline.verify.record import SPEED, Number, Record, rejected_gates, stored_record
from pipeline.verify.report import number

SCHEMA_VERSION = 1
Status = Literal["waiting", "built", "kept", "failed"]
# Of the numbers of a bundle, those that the table for people has: by name, and what stands over them.
SHOWN = {
    "bytes/quantized_weights": "weights, bytes",
    "gates/quant_sqnr_db": "SQNR to float, dB",
    "gates/final_psnr_fp_db": "PSNR to float, dB",
}
# Times as fast as the float model in PyTorch, of each target.
FLOAT = "torch_fp32"
ABSENT = "-"


@dataclass(frozen=True)
class Row:
    """One build. status: kept is one that an earlier run of the sweep has built. seconds: of the build alone. bundle,
    record: what came of it, and its numbers; None of one that failed or waits. rejected: what the gates of one that
    failed them measured."""

    build: Build
    status: Status = "waiting"
    calibration: str = ""
    ended: Ended | None = None
    bundle: Bundle | None = None
    record: Record | None = None
    rejected: Mapping[str, Number] = field(default_factory=dict)

    @property
    def numbers(self) -> Mapping[str, Number]:
        """By the names of `pipeline.verify.record`."""
        return self.rejected if self.record is None else self.record.numbers

    @property
    def formats(self) -> str:
        """Weights x activations of its linears."""
        return ABSENT if self.bundle is None else ", ".join(self.bundle.manifest["counts"]["formats"]) or "float"

    def document(self) -> dict[str, object]:
        """For JSON."""
        ended = self.ended or Ended(self.build.name, tries=0)
        how = {key: value for key, value in asdict(ended).items() if key not in ("name", "result")}
        numbers = {name: plain(one.value) for name, one in self.numbers.items()}
        own = {"name": self.build.name, "axes": dict(self.build.axes), "targets": list(self.build.targets)}
        return {**own, "status": self.status, "calibration": self.calibration, **how, "numbers": numbers}


def first_rows(builds: Sequence[Build], checked: Mapping[str, Checked]) -> dict[str, Row]:
    """By name, before any job has ended."""
    return {
        build.name: Row(build, "kept" if checked[build.name].done else "waiting", checked[build.name].calibration)
        for build in builds
    }


def with_end(row: Row, ended: Ended) -> Row:
    """The row of a build whose job has ended."""
    return replace(row, status="built" if ended.passed else "failed", ended=ended)


def with_result(row: Row, place: Place) -> Row:
    """The row with its bundle, whose files are verified; one that was damaged meanwhile has failed. Of one that failed
    its gates, what they measured."""
    name = row.build.name
    if row.status == "failed":
        return replace(row, rejected=rejected_gates(place.rejected(name)))
    try:
        bundle = load_bundle(place.bundle(name))
        return replace(row, bundle=bundle, record=stored_record(bundle))
    except ContractError as error:
        return replace(row, status="failed", ended=Ended(name, None, error.exit_code, str(error)))


def write_state(rows: Mapping[str, Row], place: Place) -> None:
    """Write sweep.json."""
    made_by = {"tools": tool_versions(), "code": machine.code_version()}
    documents = [row.document() for row in rows.values()]
    write_json(place.folder / STATE, {"schema_version": SCHEMA_VERSION, "builds": documents, **made_by})


def summary(rows: Iterable[Row]) -> Table:
    """For people: every build, and what of its numbers decides."""
    listed = list(rows)
    speeds = _speeds(listed)
    header = ["", "status", "formats", *SHOWN.values(), *speeds.values(), "seconds", "tries"]
    return Table(header, [_cells(row, [*SHOWN, *speeds]) for row in listed])


def _speeds(rows: Sequence[Row]) -> dict[str, str]:
    names = dict.fromkeys(name for row in rows for name in row.numbers if name.startswith(f"{SPEED}/"))
    return {name: f"{name.split('/')[1]}, x float" for name in names if name.endswith(f"/{FLOAT}")}


def _cells(row: Row, names: Sequence[str]) -> list[str]:
    values = [number(row.numbers[name].value) if name in row.numbers else ABSENT for name in names]
    seconds, tries = (f"{row.ended.seconds:.0f}", str(row.ended.tries)) if row.ended else (ABSENT, ABSENT)
    return [row.build.name, row.status, row.formats, *values, seconds, tries]


def write_tables(rows: Mapping[str, Row], place: Place) -> None:
    """table.md, which is `summary`; table.csv: a column for each axis and each number of any bundle, empty where a
    bundle has none."""
    table = summary(rows.values())
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    text = "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)
    failed = [f"- {row.build.name}: {row.ended.reason}" for row in failures(rows.values()) if row.ended]
    with whole_file(place.folder / "table.md") as part:
        part.write_text("\n".join([text, *([""] if failed else []), *failed]) + "\n", encoding="utf-8")
    with whole_file(place.folder / "table.csv") as part, part.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows(_csv_rows(list(rows.values())))


def _csv_rows(rows: Sequence[Row]) -> Iterator[list[object]]:
    axes = list(dict.fromkeys(axis for row in rows for axis in row.build.axes))
    names = list(dict.fromkeys(name for row in rows for name in row.numbers))
    yield ["name", *axes, "status", "exit_code", "reason", "seconds", "tries", "machine", *names]
    for row in rows:
        ended = row.ended or Ended(row.build.name, tries=0)
        how = [row.status, ended.exit_code, ended.reason, ended.seconds, ended.tries, ended.machine]
        values = [row.numbers[name].value if name in row.numbers else "" for name in names]
        yield [row.build.name, *(row.build.axes[axis] for axis in axes), *how, *values]


def failures(rows: Iterable[Row]) -> list[Row]:
    """The builds that failed."""
    return [row for row in rows if row.status == "failed"]
