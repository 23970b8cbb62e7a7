"""The table of classes that are learned from their pipelines: a row is what was built, or the words that refuse it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import readme
from benchmarks.families import __main__ as families
from benchmarks.families.models import MODELS
from benchmarks.record import RESULTS, read
from pipeline.bench import measure
from tests.support.quick_build import measure_little


@pytest.mark.torch
def test_a_class_that_is_understood_is_built_and_drawn_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure_little(monkeypatch.setattr)
    row = families.measured("Stable Diffusion 3.5", ("rtn",), tmp_path)
    assert row["refused"] is None and row["pipeline"] == "StableDiffusion3Pipeline"
    assert 0 < row["quantized_parameters"] < row["parameters"] and row["linears"] > 0
    built = row["methods"]["rtn"]
    assert built["exit_code"] == 0 and built["gates"] > 10
    assert measure.CALLS_BUDGET_S == 0.0
    assert 10 < built["drawn_sqnr_db"] < 60  # quantized, and not the float model itself


@pytest.mark.torch
def test_a_class_that_is_not_understood_says_why(tmp_path: Path) -> None:
    row = families.measured("Lumina 2", ("rtn",), tmp_path)
    assert row == {"class": "Lumina2Transformer2DModel", "refused": row["refused"]}
    assert row["refused"].startswith("config.json: Lumina2Transformer2DModel: its forward reads sizes from the numbers")


@pytest.mark.fast
def test_the_page_has_a_row_for_every_model() -> None:
    document = read(RESULTS / "families.json")
    assert list(document["models"]) == list(MODELS)
    table = readme.families()
    assert all(f"| {name} |" in table for name in MODELS)
    whole = [
        row
        for row in document["models"].values()
        if row["refused"] is None and not any(built["exit_code"] for built in row["methods"].values())
    ]
    assert len(whole) >= 7
