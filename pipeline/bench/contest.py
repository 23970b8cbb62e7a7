"""Contestants measured in turn, each in a process of its own: time, error against float32, load time, peak memory.

Each round calls every contestant once, so that whatever else the machine does hits all of them alike.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired

import numpy as np
from typing_extensions import TypedDict

from export.models.description import Description, sample_inputs
from pipeline import machine
from pipeline.backends import BACKENDS, tool_versions
from pipeline.backends.base import Arrays
from pipeline.bench.convert import FloatModel
from pipeline.bench.measure import CALL_ROUNDS, CALLS_BUDGET_S, Spread, Timing, shown_milliseconds, shown_times
from pipeline.bench.peers import Entry, entries, reference
from pipeline.bench.runners import Spec
from pipeline.bench.worker import Worker, WorkerError, load_arrays, save_arrays, save_case
from pipeline.distance import sqnr_db
from pipeline.generate.case import Case, described_case
from pipeline.recipe import Recipe

logger = logging.getLogger(__name__)
SCHEMA_VERSION = 1
FIRST_STEP = "_first_step"  # what the row of an engine's calls that keep nothing of the condition adds to its name


class Facts(TypedDict):
    """One contestant but for its time. peak_rss_bytes: of its process after it was opened and called once;
    drawing_peak_rss_bytes: and has drawn a picture with guidance. sqnr_db: of its first call against the float model in
    float32, None without one and for equal numbers."""

    sqnr_db: float | None
    load_s: float
    peak_rss_bytes: int
    drawing_peak_rss_bytes: NotRequired[int]
    weights_bytes: int


class Row(Facts):
    """One contestant."""

    call_ms: Spread


class Contest(TypedDict):
    """contestants: by name, in the order in which they were named; failed: name -> its last words."""

    contestants: dict[str, Row]
    failed: dict[str, str]


@dataclass(frozen=True)
class Given:
    """What all contestants get: files of worker.save_arrays and save_case (None: nothing is drawn), and the float
    model's outputs for the inputs (None: no error is measured)."""

    inputs: Path
    case: Path | None
    expected: Arrays | None


@dataclass
class Running:
    """A contestant whose process runs."""

    entry: Entry
    worker: Worker
    facts: Facts
    warm_s: float
    seconds: dict[str, list[float]]


def contest(entrants: Sequence[Entry], given: Given, rounds: int | None, folder: Path, loads: int = 1) -> Contest:
    """Open all, then call each once per round, every other round in the opposite order.

    rounds: None for as many as fit into CALLS_BUDGET_S, within CALL_ROUNDS. folder: of logs and outputs. loads:
    processes that open each contestant, of whose seconds the median counts; the last of them is the one that is called.
    """
    folder.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        running: list[Running] = []
        for entry in entrants:
            try:
                running.append(_started(entry, given, folder, loads, rounds is None, stack))
                logger.info("%s: opened in %.2f s", entry.name, running[-1].facts["load_s"])
            except WorkerError as error:
                failed[entry.name] = str(error)
                logger.warning("%s failed: %s", entry.name, error)
        for index in range(_affordable(running) if rounds is None else rounds):
            for one in running if index % 2 == 0 else running[::-1]:
                if one.entry.name not in failed:
                    try:
                        _call(one)
                    except WorkerError as error:
                        failed[one.entry.name] = str(error)
                        logger.warning("%s failed: %s", one.entry.name, error)
    rows: dict[str, Row] = {
        name: {**one.facts, "call_ms": Timing(tuple(seconds)).to_row()}
        for one in running if one.entry.name not in failed
        for name, seconds in one.seconds.items()
    }  # fmt: skip
    return {"contestants": rows, "failed": failed}


def _affordable(running: Iterable[Running]) -> int:
    round_s = sum(one.warm_s * len(one.seconds) for one in running)
    return int(np.clip(CALLS_BUDGET_S / max(round_s, 1e-9), *CALL_ROUNDS))


def _started(entry: Entry, given: Given, folder: Path, loads: int, warm: bool, stack: ExitStack) -> Running:
    """Open and call once. warm: call a second time, to know how long a call takes that compiles nothing."""
    log, output = folder / f"{entry.name}.log", folder / f"{entry.name}.npz"
    opening: list[float] = []
    for _ in range(loads - 1):
        worker = Worker(entry.spec, given.inputs, log)
        opening.append(worker.opened["s"])
        worker.close()
    worker = Worker(entry.spec, given.inputs, log)
    stack.callback(worker.close)
    opening.append(worker.opened["s"])
    called = worker.call(output=output)
    facts: Facts = {
        "sqnr_db": _sqnr_db(given.expected, load_arrays(output)),
        "load_s": float(np.median(opening)),
        "peak_rss_bytes": called["peak_rss_bytes"],
        "weights_bytes": entry.spec.size_bytes(),
    }
    if entry.draws and given.case is not None:
        facts["drawing_peak_rss_bytes"] = worker.draw(given.case)["peak_rss_bytes"]
        warm = True  # what is kept belongs to another condition
    warm_s = worker.call()["s"] if warm else called["s"]
    names = [entry.name, *([entry.name + FIRST_STEP] if entry.is_ours else [])]
    return Running(entry, worker, facts, warm_s, {name: [] for name in names})


def _sqnr_db(expected: Arrays | None, outputs: Arrays) -> float | None:
    """Of the first output, which is all that peers are asked for."""
    if not all(np.isfinite(output).all() for output in outputs.values()):
        raise WorkerError("its outputs are not all finite")
    value = math.inf if expected is None else sqnr_db(*(next(iter(of.values())) for of in (expected, outputs)))
    return value if math.isfinite(value) else None


def _call(one: Running) -> None:
    for name, seconds in one.seconds.items():
        seconds.append(one.worker.call(forget=name != one.entry.name)["s"])


# --- a bundle beside peers ------------------------------------------------------------------------------------------


class Document(TypedDict):
    """Of `bench --peers`. ratios: engine -> contestant -> how many times as fast as that its call is."""

    schema_version: int
    engine: str
    batch_size: int
    shapes: dict[str, list[int]]
    threads: int
    contestants: dict[str, Row]
    failed: dict[str, str]
    left_out: dict[str, str]
    ratios: dict[str, dict[str, float]]
    tools: dict[str, str]
    code: str
    machine: machine.Facts


def beside_peers(
    model: Description, sha256: str | None, recipe: Recipe, bundle: Path, targets: Sequence[str], names: Sequence[str],
    work_dir: Path, threads: int,
) -> Document:  # fmt: skip
    """Measure the engines of `targets` in the folder `bundle` beside the peers called `names`.

    sha256: of the float model's weights; None without the compiler: then there is nothing to measure an error against.
    What peers run is kept in `work_dir`. Raises WorkerError if the float model itself cannot be run.
    """
    size, source = recipe.sampling, FloatModel.of_recipe(recipe)
    inputs = sample_inputs(model, size.batch_size, size.seed, size.height, size.width)
    work_dir.mkdir(parents=True, exist_ok=True)
    fed = save_arrays(work_dir / "inputs.npz", inputs)
    described = described_case(model, recipe, 1)
    case = save_case(work_dir / "case.npz", described) if isinstance(described, Case) else None
    # Slow targets draw for minutes.
    ours = [
        Entry(name, Spec("engine", threads, str(bundle), name), is_ours=True, draws=not BACKENDS[name].slow)
        for name in targets
    ]
    others, absences = entries(names, source, sha256 or "", work_dir, threads)
    expected = None
    if sha256 is not None:
        output = work_dir / "reference.npz"
        output.unlink(missing_ok=True)  # of other inputs
        expected = reference(source, fed, output, threads)
    contested = contest([*ours, *others], Given(fed, case, expected), None, work_dir / "logs")
    rows = contested["contestants"]
    medians = {name: row["call_ms"]["median"] for name, row in rows.items()}
    engines = [name for name in rows if name.removesuffix(FIRST_STEP) in targets]
    return {
        "schema_version": SCHEMA_VERSION,
        "engine": recipe.name,
        "batch_size": size.batch_size,
        "shapes": {name: list(value.shape) for name, value in inputs.items()},
        "threads": threads,
        "contestants": rows,
        "failed": absences["failed"] | contested["failed"],
        "left_out": absences["left_out"],
        "ratios": {
            name: {other: medians[other] / medians[name] for other in medians if other not in engines}
            for name in engines
        },
        "tools": tool_versions(),
        "code": machine.code_version(),
        "machine": machine.facts(),
    }


def summary(document: Document) -> tuple[list[str], list[list[str]]]:
    """The document as a table: its header, and a row for each contestant, engines first."""
    engines = document["ratios"]
    header = ["", "call, ms", "p10-p90", "error, dB", "load, s", "peak memory, MB", "drawing, MB", "weights, MB"]
    header += [f"{engine} faster by" for engine in engines if not engine.endswith(FIRST_STEP)]
    return header, [
        [
            name,
            *figures(row),
            *(shown_times(engines[one].get(name)) for one in engines if not one.endswith(FIRST_STEP)),
        ]
        for name, row in document["contestants"].items()
    ]


def figures(row: Row) -> list[str]:
    """Cells of a contestant: milliseconds of a call, their spread, dB, seconds, megabytes."""
    call, distance, drawing = row["call_ms"], row["sqnr_db"], row.get("drawing_peak_rss_bytes")
    return [
        shown_milliseconds(call["median"]),
        f"{shown_milliseconds(call['p10'])}-{shown_milliseconds(call['p90'])}",
        "-" if distance is None else f"{distance:.1f}",
        f"{row['load_s']:.2f}",
        f"{row['peak_rss_bytes'] / 1e6:.0f}",
        "-" if drawing is None else f"{drawing / 1e6:.0f}",
        f"{row['weights_bytes'] / 1e6:.1f}" if row["weights_bytes"] else "-",
    ]


def conditions(document: Document) -> str:
    """What was measured, how and where, and what was not, in a few words."""
    absent = [f"{name} was not measured: {why}" for name, why in (document["left_out"] | document["failed"]).items()]
    return "\n".join(
        [
            f"{document['engine']}, batch size {document['batch_size']}, {document['threads']} threads on "
            f"{document['machine']['cpu']}: each in a process of its own, medians of rounds that call all in turn.",
            *absent,
        ]
    )
