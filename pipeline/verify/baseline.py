"""Is a bundle worse than its baseline? Number by number, each with a tolerance out of a file, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal, NotRequired

from annotated_types import Ge, Le, MinLen
from typing_extensions import TypedDict

from export.documents import MOST_TOML_BYTES, Rules, check_version, listed, parse_toml, plain, read_text, validated
from export.errors import RecipeError
from pipeline.verify.record import GATES, SPEED, Number, Record
from pipeline.verify.report import number

FILE = Path(__file__).with_name("tolerances.toml")
SCHEMA_VERSION = 1
RULES = Rules(
    RecipeError,
    "see docs/ci.md for what stands in it",
    SCHEMA_VERSION,
    "write it by this version's docs/ci.md, or install the version that it is for",
    extra="forbid",
)
Verdict = Literal["worse", "better", "as good", "not compared"]
Amount = Annotated[float, Ge(0), Le(1e12)]


class ToleranceRow(TypedDict):
    """One `[[tolerance]]` of the file, as `Tolerance`."""

    of: Annotated[str, MinLen(1)]
    why: Annotated[str, MinLen(1)]
    absolute: NotRequired[Amount]
    relative: NotRequired[Amount]
    enough: NotRequired[Annotated[float, Ge(-1e12), Le(1e12)] | Literal["limit"]]
    ignore: NotRequired[bool]


class TolerancesFile(TypedDict):
    """The whole file."""

    schema_version: int
    tolerance: NotRequired[list[ToleranceRow]]


@dataclass(frozen=True)
class Tolerance:
    """By how much the numbers called `of` (a name, with * for any letters) may be worse than the baseline's.

    absolute: by so much, in their unit. relative: by this share of the baseline's. Both add up. enough: a number that
    is at least as good as this one is not asked to be any better; "limit": as the one that the baseline's gate had.
    ignore: they are not compared at all.
    """

    of: str
    why: str
    absolute: float = 0.0
    relative: float = 0.0
    enough: float | Literal["limit"] | None = None
    ignore: bool = False

    def enough_beside(self, baseline: Number) -> float | None:
        """What is good enough, None where nothing is but the baseline's own value."""
        return baseline.limit if self.enough == "limit" else self.enough

    def allowed(self, baseline: float) -> float:
        """What a number may be worse by; an infinite one has no share."""
        return self.absolute + (self.relative * abs(baseline) if math.isfinite(baseline) else 0.0)


NOTHING = Tolerance("*", "it may not be worse at all")


@dataclass(frozen=True)
class Compared:
    """One number of both. worse_by: negative where it is better, nan where it was not compared. allowed: the most that
    it may be; within as much either way the verdict is "as good". why: of the tolerance, or why it was not compared."""

    name: str
    baseline: Number | None
    value: Number | None
    worse_by: float
    allowed: float
    verdict: Verdict
    why: str

    def sentence(self) -> str:
        """What was found, in words."""
        if self.value is None or self.baseline is None:
            return f"{self.name}: {self.why}"
        unit = f" {self.value.unit}".rstrip()
        return (
            f"{self.name} = {number(self.value.value)}{unit}, baseline {number(self.baseline.value)}{unit}: worse by "
            f"{number(self.worse_by)}, {number(self.allowed)} is tolerated"
        )

    def document(self) -> dict[str, object]:
        """For JSON, see `report.plain`."""
        document = plain(asdict(self))
        assert isinstance(document, dict)
        return document


@dataclass(frozen=True)
class Comparison:
    """All numbers of a bundle beside its baseline's, in the order of the baseline. notes: what bears on all of them."""

    baseline: Record
    record: Record
    rows: Sequence[Compared]
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def worse(self) -> list[Compared]:
        return [row for row in self.rows if row.verdict == "worse"]

    def sentence(self) -> str:
        """The verdict in one line, with the first numbers that are worse."""
        if not self.worse:
            compared = sum(row.verdict != "not compared" for row in self.rows)
            return f"no worse than the baseline in {compared} numbers"
        return f"worse than the baseline: {listed([row.sentence() for row in self.worse])}"

    def document(self) -> dict[str, object]:
        """For JSON."""
        numbers = [row.document() for row in self.rows]
        return {"worse": len(self.worse), "notes": list(self.notes), "numbers": numbers}


def load_tolerances(path: Path | None = None) -> list[Tolerance]:
    """Those of a file before the default ones: of several that fit a number the first holds. None: the default alone.

    Raises RecipeError for a file that is missing or wrong.
    """
    own = [] if path is None else _read(path)
    return [*own, *_read(FILE)]


def _read(path: Path) -> list[Tolerance]:
    document = parse_toml(read_text(path, RULES, MOST_TOML_BYTES), str(path), RULES)
    stated = validated(document, str(path), TolerancesFile, RULES)
    check_version(stated, str(path), RULES)
    return [Tolerance(**row) for row in stated.get("tolerance", [])]


def compare(baseline: Record, record: Record, tolerances: Sequence[Tolerance]) -> Comparison:
    """Every number of `record` beside the one of the same name in `baseline`.

    A number that the baseline has and the bundle lacks is worse, but for what was not measured here: gates of another
    extent of verification, and times on another machine, are not compared.
    """
    names = [*baseline.numbers, *(name for name in record.numbers if name not in baseline.numbers)]
    rows = [_compared(name, baseline, record, tolerances) for name in names]
    return Comparison(baseline, record, rows, tuple(_notes(baseline, record)))


def _notes(baseline: Record, record: Record) -> Iterator[str]:
    shared = baseline.models.keys() & record.models.keys()
    if other := sorted(name for name in shared if baseline.models[name] != record.models[name]):
        of = " and ".join(name or "the bundle" for name in other)
        yield f"the float model of {of} has other weights than the baseline's: gates compare models, not engines"
    if baseline.quick != record.quick:
        kinds = ("of a whole verification", "of a quick one")
        yield f"gates are not compared: the baseline's are {kinds[baseline.quick]}, these {kinds[record.quick]}"
    for name in sorted(baseline.timings):
        if difference := _timings_differ(baseline, record, name):
            yield f"speed{f' of {name}' if name else ''} is not compared: {difference}"


def _timings_differ(baseline: Record, record: Record, component: str) -> str | None:
    """In what the conditions of measurement differ, None for nothing; ratios of times are of a processor and a size."""
    theirs, ours = baseline.timings.get(component), record.timings.get(component)
    if theirs is None or ours is None:
        return "it was not measured in both"
    keys = ("cpu", "threads", "batch_size", "shapes")
    differing = [key for key in keys if theirs[key] != ours[key]]  # type: ignore[literal-required]
    if not differing:
        return None
    key = differing[0]
    return f"{key} was {theirs[key]}, is {ours[key]}"  # type: ignore[literal-required]


def _compared(name: str, baseline: Record, record: Record, tolerances: Sequence[Tolerance]) -> Compared:
    before, now = baseline.numbers.get(name), record.numbers.get(name)
    tolerance = next((row for row in tolerances if fnmatchcase(name, row.of)), NOTHING)

    def left_out(why: str) -> Compared:
        return Compared(name, before, now, math.nan, math.nan, "not compared", why)

    if before is None and now is not None and not now.passed:
        return Compared(name, None, now, math.inf, 0.0, "worse", "it fails, and the baseline does not have it")
    if before is None:
        return left_out("the baseline does not have it")
    kind, *parts = name.split("/")
    if kind == GATES and baseline.quick != record.quick:
        return left_out("one verification was quick, the other was whole")
    if kind == SPEED and (difference := _timings_differ(baseline, record, "/".join(parts[:-2]))):
        return left_out(difference)
    if now is None and (kind == SPEED or tolerance.ignore):
        return left_out(tolerance.why if tolerance.ignore else "it was not measured")
    if now is None:
        return Compared(name, before, None, math.inf, 0.0, "worse", "the baseline has it, this bundle does not")
    fails_now = before.passed and not now.passed
    if (tolerance.ignore or math.isnan(before.value)) and not fails_now:
        return left_out(tolerance.why if tolerance.ignore else "the baseline has no number")
    worse_by, allowed = _worse_by(before, now, tolerance), tolerance.allowed(before.value)
    verdict: Verdict = "better" if worse_by < -allowed else "as good" if worse_by <= allowed else "worse"
    return Compared(name, before, now, worse_by, allowed, verdict, tolerance.why)


def _worse_by(before: Number, now: Number, tolerance: Tolerance) -> float:
    """By how much, with both no better than what is enough; a failed gate is never right."""
    if math.isnan(now.value) or (before.passed and not now.passed):
        return math.inf
    sign = 1.0 if now.at_most else -1.0
    good, value = sign * before.value, sign * now.value  # less is better
    if (enough := tolerance.enough_beside(before)) is not None:
        good, value = max(good, sign * enough), max(value, sign * enough)
    return 0.0 if value == good else value - good
