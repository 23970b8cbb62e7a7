"""What of a bundle may get worse, as numbers by name: gates, bytes, and how many times as fast as others an engine is.

A record comes from a verification, from the files of a bundle, or from the small file that `verify --write-baseline`
writes, which a repository can hold where it cannot hold a bundle.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NotRequired

from typing_extensions import TypedDict

from export.documents import Rules, number_of, plain, read_json
from export.errors import ContractError, RecipeError
from pipeline import machine
from pipeline.backends import tool_versions
from pipeline.bench.measure import SCHEMA_VERSION as BENCH_VERSION
from pipeline.bundle.bundle import Bundle, load_bundle
from pipeline.bundle.card import REPORT, GateRow, Parity
from pipeline.bundle.hub import located
from pipeline.bundle.pipeline_bundle import PipelineBundle, is_pipeline, load_pipeline
from pipeline.bundle.snapshot import verified_copy
from pipeline.files import is_bundle, write_json
from pipeline.verify.report import SCHEMA_VERSION as REPORT_VERSION
from pipeline.verify.report import Gate, within

SCHEMA_VERSION = 1
BENCH = "bench.json"
REMEDY = "write it again with verify --write-baseline FILE"
# How the names of numbers begin, behind the component of a pipeline.
GATES, BYTES, SPEED = "gates", "bytes", "speed"
JsonNumber = float | Literal["inf", "-inf"] | None
AnyBundle = Bundle | PipelineBundle


@dataclass(frozen=True)
class Number:
    """at_most: is less of it better? limit: of a gate, None of any other number."""

    value: float
    unit: str
    at_most: bool
    limit: float | None = None

    @property
    def passed(self) -> bool:
        """Whether it is within its limit, if it has one."""
        return self.limit is None or within(self.value, self.limit, self.at_most)


class Timing(TypedDict):
    """What the ratios of times depend on, beside the engine."""

    cpu: str
    threads: int
    batch_size: int
    shapes: dict[str, list[int]]


@dataclass(frozen=True)
class Record:
    """What a bundle is compared by.

    numbers: by names such as gates/cpu/gemm_exact, bytes/cpu and speed/cpu/torch_fp32, of a pipeline's components
    gates/transformer/cpu/gemm_exact and so on. timings, models: by component, "" of a bundle of one model; models: the
    sha256 of the float model's weights. quick: whether the gates are those of `verify --quick`.
    """

    engine: str
    numbers: Mapping[str, Number]
    timings: Mapping[str, Timing]
    models: Mapping[str, str]
    quick: bool = False

    @property
    def failures(self) -> list[str]:
        """The gates that failed."""
        return [name for name, number in self.numbers.items() if not number.passed]


class NumberRow(TypedDict):
    """A number of the file; limit: of a gate."""

    value: JsonNumber
    unit: str
    at_most: bool
    limit: NotRequired[JsonNumber]


class RecordFile(TypedDict):
    """The file that `verify --write-baseline` writes."""

    schema_version: int
    engine: str
    quick: bool
    numbers: dict[str, NumberRow]
    timings: dict[str, Timing]
    models: dict[str, str]


class MeasuredMachine(TypedDict):
    """What is read here of the machine that was measured on."""

    cpu: str


class Measured(TypedDict):
    """What is read here of bench.json."""

    engine: str
    batch_size: int
    threads: int
    shapes: dict[str, list[int]]
    ratios: dict[str, dict[str, float]]
    machine: MeasuredMachine


# --- from a bundle ----------------------------------------------------------------------------------------------------


def record_of(
    bundle: AnyBundle, gates: Iterable[Gate], measured: Measured | None = None, quick: bool = False
) -> Record:
    """Of a bundle that was verified just now. gates: as `verify_bundle` or `verify_pipeline` names them. measured: of a
    bundle of one model, in place of what its build measured."""
    rows = {gate.name: Number(gate.value, gate.unit, gate.at_most, gate.limit) for gate in gates}
    return _record(bundle, rows, measured, quick)


def read_bench(path: Path, bundle: Path) -> Measured:
    """What `bench -o` wrote to `path`. Raises RecipeError for another file, for one of another engine than `bundle`,
    and for a pipeline, whose components are measured one by one."""
    if is_pipeline(bundle):
        raise RecipeError(f"{bundle} is a pipeline, whose components are measured one by one; leave out --bench")
    remedy = "write it with bench BUNDLE -o FILE.json"
    measured = read_json(path, Measured, Rules(RecipeError, remedy, BENCH_VERSION, f"{remedy} of this version"))
    if measured["engine"] != (engine := load_bundle(bundle).name):
        raise RecipeError(f"{path} is of engine {measured['engine']}, {bundle} is {engine}; {remedy}")
    return measured


def stored_record(bundle: AnyBundle) -> Record:
    """Of a bundle as its report says. Raises ContractError where it has none."""
    if isinstance(bundle, Bundle):
        return _record(bundle, _of_rows(_bundle_gates(bundle)))
    rows = _of_rows(_pipeline_gates(bundle))
    for name, component in bundle.components.items():
        rows |= _of_rows(_bundle_gates(component), f"{name}/")
    return _record(bundle, rows)


def open_any(place: str | Path) -> AnyBundle:
    """A bundle or a pipeline of bundles, verified; hf://OWNER/NAME too. Raises what `load_bundle` does."""
    with located(place) as folder:
        return load_pipeline(folder) if is_pipeline(folder) else load_bundle(folder)


def components(bundle: AnyBundle) -> Mapping[str, Bundle]:
    """The bundles in it by name; one of a single model by the name ""."""
    return {"": bundle} if isinstance(bundle, Bundle) else bundle.components


def _record(
    bundle: AnyBundle, gates: Mapping[str, Number], measured_now: Measured | None = None, quick: bool = False
) -> Record:
    parts = components(bundle)
    numbers = {f"{GATES}/{name}": number for name, number in gates.items()}
    measured = {name: measured_now or _measured(part) for name, part in parts.items()}
    for name, part in parts.items():
        numbers |= {_named(BYTES, name, of): Number(size, "bytes", True) for of, size in sizes(part).items()}
    for name, document in measured.items():
        numbers |= {_named(SPEED, name, pair): Number(ratio, "x", False) for pair, ratio in _ratios(document).items()}
    return Record(
        engine=bundle.name,
        numbers=numbers,
        timings={name: _timing(document) for name, document in measured.items() if document is not None},
        models={name: part.manifest["model"]["sha256"] for name, part in parts.items()},
        quick=quick,
    )


def _named(kind: str, component: str, name: str) -> str:
    return "/".join(filter(None, (kind, component, name)))


def _of_rows(rows: Iterable[GateRow], prefix: str = "") -> dict[str, Number]:
    def of(row: GateRow) -> Number:
        return Number(number_of(row["value"]), row["unit"], row["at_most"], number_of(row["limit"]))

    return {f"{prefix}{row['name']}": of(row) for row in rows}


def sizes(bundle: Bundle) -> dict[str, int]:
    """Bytes of the quantized weights, and of what the engine of each target loads. The pages of a report are no part
    of what is deployed, and are left out."""
    files, targets = bundle.manifest["files"], bundle.manifest["targets"]
    of_targets = {target: sum(files[name]["size"] for name in row["files"]) for target, row in targets.items()}
    return {"quantized_weights": bundle.manifest["bytes"]["quantized_weights"], **of_targets}


def _bundle_gates(bundle: Bundle) -> list[GateRow]:
    if REPORT not in bundle.manifest["files"]:
        raise ContractError(f"{bundle.path} has no {REPORT}, so nothing says what its gates found; build it again")
    with bundle.copied({REPORT}.__contains__) as private:
        return read_json(private.path / REPORT, Parity, Rules(version=REPORT_VERSION))["gates"]


def _pipeline_gates(whole: PipelineBundle) -> list[GateRow]:
    files = whole.manifest["files"]
    if REPORT not in files:
        raise ContractError(f"{whole.path} has no {REPORT}, so nothing says what its gates found; build it again")
    with verified_copy(whole.path, {REPORT: files[REPORT]}) as private:
        return read_json(private / REPORT, Parity, Rules(version=REPORT_VERSION))["gates"]


def rejected_gates(folder: Path) -> dict[str, Number]:
    """What the gates of an engine measured that failed some, by names as in a Record; none where there is no report.

    folder: what a build keeps of such an engine.
    """
    if not (folder / REPORT).is_file():
        return {}
    gates = read_json(folder / REPORT, Parity, Rules(version=REPORT_VERSION))["gates"]
    return {f"{GATES}/{name}": number for name, number in _of_rows(gates).items()}


def _measured(bundle: Bundle) -> Measured | None:
    if BENCH not in bundle.manifest["files"]:
        return None
    with bundle.copied({BENCH}.__contains__) as private:
        return read_json(private.path / BENCH, Measured, Rules(version=BENCH_VERSION))


def _ratios(document: Measured | None) -> dict[str, float]:
    """By "ENGINE/OTHER", how many times as fast as the other the engine is."""
    ratios = {} if document is None else document["ratios"]
    return {f"{engine}/{other}": ratio for engine, row in ratios.items() for other, ratio in row.items()}


def _timing(document: Measured) -> Timing:
    return {
        "cpu": document["machine"]["cpu"],
        "threads": document["threads"],
        "batch_size": document["batch_size"],
        "shapes": document["shapes"],
    }


# --- the file ---------------------------------------------------------------------------------------------------------


def write_record(record: Record, path: Path) -> None:
    """Write the file that `read_record` reads, with what it was made by."""
    rows = {name: plain(_row(number)) for name, number in record.numbers.items()}
    stated = {"engine": record.engine, "quick": record.quick, "numbers": rows, "timings": dict(record.timings)}
    made_by = {"tools": tool_versions(), "code": machine.code_version(), "machine": machine.facts()}
    write_json(path, {"schema_version": SCHEMA_VERSION, **stated, "models": dict(record.models), **made_by})


def _row(number: Number) -> dict[str, object]:
    row: dict[str, object] = {"value": number.value, "unit": number.unit, "at_most": number.at_most}
    return row if number.limit is None else {**row, "limit": number.limit}


def read_record(place: str | Path) -> Record:
    """What a baseline says: a bundle's folder, hf://OWNER/NAME, or a file that `write_record` wrote.

    Raises ContractError for a damaged one, RecipeError for what is neither, and what opening a bundle does.
    """
    path = Path(place)
    if str(place).startswith("hf:") or is_bundle(path):
        return stored_record(open_any(place))
    if path.is_dir():
        raise RecipeError(f"{path} is a folder without a bundle; give one that build wrote, or a file of a baseline")
    rules = Rules(RecipeError, REMEDY, SCHEMA_VERSION, f"{REMEDY}, or install the version that made it")
    document = read_json(path, RecordFile, rules)
    numbers = {
        name: Number(
            number_of(row["value"]),
            row["unit"],
            row["at_most"],
            number_of(row["limit"]) if "limit" in row else None,
        )
        for name, row in document["numbers"].items()
    }
    return Record(document["engine"], numbers, document["timings"], document["models"], document["quick"])
