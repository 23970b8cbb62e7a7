"""Latency and memory of engines against what a user would run without them, measured interleaved in one run.

Each round calls every contestant once, so that whatever else the machine does hits all of them alike: the ratios are
the result, an absolute time says little without its machine. `python -m pipeline.bench BUNDLE` measures again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np

from export.models.description import Description, sample_inputs
from pipeline import machine
from pipeline.backends import BACKENDS, tool_versions
from pipeline.backends.base import Engine
from pipeline.bench.baselines import Contestant, peak_memory
from pipeline.generate.case import AnyCase, Case, described_case
from pipeline.recipe import Recipe

SCHEMA_VERSION = 1
# Rounds are as many as fit into the time, within these bounds: a median of three is the least that ignores an outlier.
CALLS_BUDGET_S, CALL_ROUNDS = 20.0, (3, 30)
PICTURES_BUDGET_S, PICTURE_ROUNDS = 40.0, (3, 10)
# bfloat16 of 600 M parameters takes 15 s a call where the processor lacks it, 50 times the engine's.
ALONE_SHARE = 0.4
MILLISECONDS = 1e3


class Spread(TypedDict):
    """Times of one contestant in ms. derived: how they were computed, where they were not measured."""

    median: float
    p10: float
    p90: float
    rounds: int
    derived: NotRequired[str]


class ContestantRow(TypedDict):
    """peak_rss_bytes: None where memory could not be measured."""

    call_ms: Spread
    image_ms: Spread
    weights_bytes: int
    peak_rss_bytes: int | None


class Document(TypedDict):
    """bench.json. image: what is drawn where a whole picture is timed; shapes: of a call's inputs; ratios: how many
    times as fast as others each engine is."""

    schema_version: int
    engine: str
    batch_size: int
    image: dict[str, float]
    shapes: dict[str, list[int]]
    interleaved: bool
    threads: int
    contestants: dict[str, ContestantRow]
    ratios: dict[str, dict[str, float]]
    tools: dict[str, str]
    code: str
    machine: machine.Facts


@dataclass(frozen=True)
class Timing:
    """Seconds of the timed runs of one contestant; derived: computed from other timings, not measured itself."""

    seconds: tuple[float, ...]
    derived: bool = False

    def to_row(self) -> Spread:
        """Median, 10th and 90th percentile."""
        p10, median, p90 = map(float, np.percentile(self.seconds, (10, 50, 90)) * MILLISECONDS)
        row: Spread = {"median": median, "p10": p10, "p90": p90, "rounds": len(self.seconds)}
        if self.derived:
            row["derived"] = "steps x median call"
        return row


def bench(
    model: Description,
    engines: Mapping[str, Engine],
    recipe: Recipe,
    bundle: Path,
    others: Sequence[Contestant],
    threads: int,
) -> Document:
    """Measure `engines` (of the folder `bundle`) beside `others`: one denoiser call, and a whole picture with guidance.

    Returns the document of bench.json. Engines that do not run on this machine are simply not in it. others: the
    baselines, or none; they are closed at the end. threads: what engines and baselines were opened with.
    """
    size = recipe.sampling
    inputs = sample_inputs(model, size.batch_size, size.seed, size.height, size.width)
    case = described_case(model, recipe, 1)
    runners = [Contestant.of_engine(name, engine, bundle, threads) for name, engine in engines.items()] + list(others)
    calls = interleaved({row.name: partial(row.run, inputs) for row in runners}, CALLS_BUDGET_S, CALL_ROUNDS)
    pictures = picture_timings(runners, case, calls)
    rows: dict[str, ContestantRow] = {
        row.name: {
            "call_ms": calls[row.name].to_row(),
            "image_ms": pictures[row.name].to_row(),
            "weights_bytes": row.weights_bytes,
            "peak_rss_bytes": peak_memory(row, inputs),
        }
        for row in runners
    }
    for row in runners:
        row.close()
    return {
        "schema_version": SCHEMA_VERSION,
        "engine": recipe.name,
        "batch_size": size.batch_size,
        "image": _image(case),
        "shapes": {name: list(value.shape) for name, value in inputs.items()},
        "interleaved": True,
        "threads": threads,
        "contestants": rows,
        "ratios": ratios(rows, tuple(engines)),
        "tools": tool_versions(),
        "code": machine.code_version(),
        "machine": machine.facts(),
    }


def _image(case: AnyCase) -> dict[str, float]:
    """Of a text encoder no picture."""
    if not isinstance(case, Case):
        return {"pictures": 0, "n_steps": 1, "guidance_scale": 1.0}
    return {"pictures": len(case.noise), "n_steps": case.n_steps, "guidance_scale": case.guidance_scale}


def measured(targets: Iterable[str]) -> tuple[str, ...]:
    """The targets of a bundle that are measured unless others are named: slow ones, as the portable model, only where
    there is nothing else.

    >>> measured(["cpu", "onnx"]), measured(["onnx"])
    (('cpu',), ('onnx',))
    """
    listed = tuple(targets)
    return tuple(target for target in listed if not BACKENDS[target].slow) or listed


def interleaved(
    work: Mapping[str, Callable[[], object]], budget_s: float, bounds: tuple[int, int]
) -> dict[str, Timing]:
    """Time every item of `work` once per round, after one round to warm up; rounds as many as fit into `budget_s`.

    What takes ALONE_SHARE of the budget by itself is timed in that first round alone.
    """
    warm = {name: _seconds(call) for name, call in work.items()}
    timed = {name: [warm[name]] if budget_s and warm[name] > ALONE_SHARE * budget_s else [] for name in work}
    quick = [name for name in work if not timed[name]]
    rounds = int(np.clip(budget_s / max(sum(warm[name] for name in quick), 1e-9), *bounds))
    for _ in range(rounds):
        for name in quick:
            timed[name].append(_seconds(work[name]))
    return {name: Timing(tuple(seconds)) for name, seconds in timed.items()}


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def picture_timings(runners: list[Contestant], case: AnyCase, calls: Mapping[str, Timing]) -> dict[str, Timing]:
    """Whole pictures. Where a round of them would burst the budget, steps times the median call stands in, marked so.

    A guided call has twice the rows of a plain one, which is counted. A text encoder's call is all there is.
    """
    if not isinstance(case, Case):
        return dict(calls)
    guided = 2 if case.guidance_scale != 1.0 else 1
    expected = {name: float(np.median(row.seconds)) * case.n_steps * guided for name, row in calls.items()}
    if sum(expected.values()) * (PICTURE_ROUNDS[0] + 1) > PICTURES_BUDGET_S:
        return {name: Timing((seconds,), derived=True) for name, seconds in expected.items()}
    draws = {row.name: partial(case.draw, row.run) for row in runners}
    return interleaved(draws, PICTURES_BUDGET_S, PICTURE_ROUNDS)


def ratios(rows: Mapping[str, ContestantRow], engines: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """How many times faster each engine's call is than each baseline's, by medians of the same rounds."""
    medians = {name: row["call_ms"]["median"] for name, row in rows.items()}
    others = [name for name in medians if name not in engines]
    return {name: {other: medians[other] / medians[name] for other in others} for name in engines}


# --- for people -----------------------------------------------------------------------------------------------------


def summary(document: Document) -> tuple[list[str], list[list[str]]]:
    """The document of `bench` as a table: its header, and a row for each contestant, engines first.

    Times are medians in ms; the last columns say how many times as fast as the row each engine's call is.
    """
    engines = document["ratios"]
    draws = document["image"].get("pictures") != 0
    header = ["", "call, ms", "p10-p90", *(["picture, ms"] * draws), "weights, MB", "peak memory, MB"]
    header += [f"{engine} faster by" for engine in engines]
    return header, [
        [name, *_figures(row, draws), *(shown_times(engines[engine].get(name)) for engine in engines)]
        for name, row in document["contestants"].items()
    ]


def _figures(row: ContestantRow, draws: bool) -> list[str]:
    call, picture, peak = row["call_ms"], row["image_ms"], row["peak_rss_bytes"]
    spread = f"{shown_milliseconds(call['p10'])}-{shown_milliseconds(call['p90'])}"
    times = [shown_milliseconds(call["median"]), spread, *([shown_milliseconds(picture["median"])] * draws)]
    return [*times, f"{row['weights_bytes'] / 1e6:.1f}", "-" if peak is None else f"{peak / 1e6:.0f}"]


def shown_milliseconds(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def shown_times(ratio: float | None) -> str:
    """A ratio for people."""
    return "-" if ratio is None else f"{ratio:.2f} x"


def conditions(document: Document) -> str:
    """What was measured, how, and where, in a few words."""
    picture, here = document["image"], document["machine"]
    if picture.get("pictures") == 0:
        return (
            f"{document['engine']}, batch size {document['batch_size']}, {document['threads']} threads on "
            f"{here['cpu']}: medians of rounds that call all in turn."
        )
    guided = f", guidance {picture['guidance_scale']:g}" if picture["guidance_scale"] != 1 else ""
    derived = any("derived" in row["image_ms"] for row in document["contestants"].values())
    timed = "the time of its calls" if derived else "drawn"
    return (
        f"{document['engine']}, batch size {document['batch_size']}, {document['threads']} threads on {here['cpu']}: "
        f"medians of rounds that call all in turn; a picture of {picture['n_steps']} steps{guided}, {timed}."
    )
