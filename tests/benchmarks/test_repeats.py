"""The default tolerances of a baseline lie above what equally right engines differ by, and not far above."""

from __future__ import annotations

from itertools import permutations

import pytest

from benchmarks import record
from benchmarks.record import Json
from benchmarks.repeats import NAME, document
from export.documents import number_of
from pipeline.verify.baseline import compare, load_tolerances
from pipeline.verify.record import Number, Record


def records(stated: Json) -> list[Record]:
    """One of each seed, as its bundle stated it."""

    def number(row: Json, place: int) -> Number:
        limit = row["limits"][place]
        stated_limit = None if limit is None else number_of(limit)
        return Number(number_of(row["values"][place]), row["unit"], row["at_most"], stated_limit)

    def numbers(place: int) -> dict[str, Number]:
        return {name: number(row, place) for name, row in stated["numbers"].items()}

    machine = {"": "of all"}
    return [
        Record(stated["recipe"], numbers(place), stated["timings"], machine, False) for place in range(stated["seeds"])
    ]


def test_no_seed_is_worse_than_another() -> None:
    stated = record.read(record.RESULTS / f"{NAME}.json")
    rows = records(stated)
    assert len(rows) >= 3 and document(rows)["numbers"] == stated["numbers"]
    for before, after in permutations(rows, 2):
        comparison = compare(before, after, load_tolerances())
        assert not comparison.worse, comparison.sentence()


@pytest.mark.parametrize("name", ["quant_sqnr_db", "final_psnr_fp_db"])
def test_what_quantization_may_lose_is_twice_what_seeds_differ_by(name: str) -> None:
    values = record.read(record.RESULTS / f"{NAME}.json")["numbers"][f"gates/{name}"]["values"]
    [tolerance] = [row for row in load_tolerances() if row.of == f"gates/*{name}"]
    assert tolerance.absolute == pytest.approx(2 * (max(values) - min(values)), rel=0.01)
