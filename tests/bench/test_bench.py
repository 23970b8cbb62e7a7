"""Measurement: rounds, percentiles, ratios, memory of a fresh process, and the document of a whole run."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from export.models import load as models
from export.to_onnx import export_float
from pipeline import machine, recipe
from pipeline.backends.cpu.engine import provided
from pipeline.bench import baselines as bench_baselines
from pipeline.bench import measure as bench
from pipeline.bench.runners import Spec
from pipeline.passes.probes import WIDE_SUM
from tests.support import tiny


def test_every_round_calls_everybody_in_turn() -> None:
    order: list[str] = []
    work = {name: (lambda name=name: order.append(name)) for name in "abc"}
    rows = bench.interleaved(work, budget_s=0.0, bounds=(3, 30))
    assert order == list("abc") * 4, "one round to warm up, then the least number of rounds"
    assert {len(row.seconds) for row in rows.values()} == {3}


def test_rounds_fill_the_budget_within_bounds() -> None:
    rows = bench.interleaved({"a": lambda: None}, budget_s=1e9, bounds=(3, 7))
    assert len(rows["a"].seconds) == 7


def test_what_takes_most_of_the_budget_alone_is_timed_once() -> None:
    work = {"quick": lambda: None, "slow": lambda: time.sleep(0.1)}
    timings = bench.interleaved(work, budget_s=0.2, bounds=(3, 5))
    assert {name: len(row.seconds) for name, row in timings.items()} == {"quick": 5, "slow": 1}
    assert timings["slow"].to_row()["rounds"] == 1


def test_percentiles_in_milliseconds() -> None:
    row = bench.Timing(tuple(i / 1000 for i in range(1, 12))).to_row()
    assert (row["p10"], row["median"], row["p90"], row["rounds"]) == pytest.approx((2, 6, 10, 11))
    assert "derived" in bench.Timing((1.0,), derived=True).to_row()


def test_ratio_above_one_means_the_engine_is_faster() -> None:
    rows = {name: {"call_ms": {"median": value}} for name, value in (("cpu", 2.0), ("torch_fp32", 5.0))}
    assert bench.ratios(rows, ("cpu",)) == {"cpu": {"torch_fp32": 2.5}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> models.LoadedModel:
    return models.load(str(tiny.folder("pixart", tmp_path_factory.mktemp("models"))))


@pytest.mark.torch
def test_baselines_compute_the_same_picture(model: models.LoadedModel, tmp_path: Path) -> None:
    """float32 twins agree to rounding; bf16 and INT8 roughly, since they round every operand to 8 bits or fewer."""
    chosen = recipe.load("pixart_w4a6")
    inputs = models.sample_inputs(model, 1, 0)
    samples = {row.name: row.run(inputs)["sample"] for row in bench_baselines.baselines(model, chosen, tmp_path, 1)}
    reference = samples.pop("torch_fp32")
    error = {name: np.abs(value - reference).max() / np.abs(reference).max() for name, value in samples.items()}
    # 2 blocks of about 30 float32 operations in a row, each off by 2^-24 at most: 2^-24 * 60, times 16 for sums of 64
    assert error["onnxruntime_fp32"] < 2.0**-24 * 60 * 16
    # about 60 operations in a row with 8 significant bits, errors adding like a random walk: 2^-8 * sqrt(60)
    assert error["torch_bf16"] < 2.0**-8 * 60**0.5
    if WIDE_SUM not in provided(machine.cpu_flags()):
        pytest.skip("dynamic INT8 saturates on this CPU, whose byte products are summed in 16 bits")
    # INT8 per tensor keeps 7 bits of the largest element; rows a quarter as large keep 5
    assert error["onnxruntime_int8"] < 2.0**-5 * 60**0.5


def test_memory_that_takes_too_long_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bench_baselines, "MEMORY_TIMEOUT_S", 0.01)
    runner = bench_baselines.Contestant("slow", lambda inputs: inputs, 0, Spec("onnxruntime", 1, "no/such.onnx"))
    assert bench_baselines.peak_memory(runner, {}) is None
    assert "memory of slow could not be measured: it took more than 0.01 s" in caplog.text


@pytest.mark.torch
def test_memory_is_that_of_a_fresh_process(model: models.LoadedModel, tmp_path: Path) -> None:
    export_float(model, tmp_path / "float.onnx")
    spec = Spec("onnxruntime", 1, str(tmp_path / "float.onnx"))
    runner = bench_baselines.Contestant("onnxruntime_fp32", lambda inputs: inputs, 0, spec)
    peak = bench_baselines.peak_memory(runner, models.sample_inputs(model, 1, 0))
    assert peak and peak < machine.peak_memory_bytes(), "this process has torch loaded, the fresh one has not"


def test_peak_memory_can_be_measured_again() -> None:
    block = np.ones(64 << 20, np.uint8)
    with_block = machine.peak_memory_bytes()
    del block
    machine.reset_peak_memory()
    assert machine.peak_memory_bytes() <= with_block - (32 << 20)
