"""The document of the GPU benchmark, its targets, rates and inputs."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import readme, record
from benchmarks.gpu import fused as gpu_fused
from benchmarks.gpu import gemm as gpu_gemm
from benchmarks.gpu import results as gpu_results
from benchmarks.gpu import targets as gpu_targets
from benchmarks.gpu import timing as gpu_timing
from benchmarks.gpu.results import Results
from export.errors import ContractError
from tests.support.gpu_benchmark_tasks import FACTS


def test_a_document_of_another_version_is_not_added_to(tmp_path: Path) -> None:
    path = tmp_path / "gpu_x.json"
    path.write_text(json.dumps({"schema_version": 9, "sections": {}, "targets": []}))
    with pytest.raises(
        ContractError, match=r"gpu_x.json: schema_version 9; this code adds to 1, give another --output"
    ):
        Results.open(path, FACTS)


def document(**rows: list[dict[str, Any]]) -> dict[str, Any]:
    sections = {name: {"rows": part, "commit": "c", "not_reached": [], "stopped": ""} for name, part in rows.items()}
    return {"gpu": FACTS, "sections": sections}


def gemm_row(m: int, expanded: float, packed: float, granularity: str = "per channel") -> dict[str, Any]:
    ratios = {"expanded_gemm": {"fp8": expanded, "bf16": 2.0}, "packed_gemm": {"fp8": packed}}
    return {"name": "r", "m": m, "granularity": granularity, "ratios": ratios, "wrong": {}}


def verdicts(document: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """By the first words of a target's name; of those that begin alike, the first."""
    rows = reversed(gpu_targets.judged(document))
    return {row["name"].split(",")[0]: (row["value"], row["verdict"]) for row in rows}


def test_nothing_measured_meets_nothing() -> None:
    assert {verdict for _, verdict in verdicts(document()).values()} == {"not measured"}
    skipped = document(exactness=[{"name": "x", "skipped": "old GPU"}], gemm=[{"name": "x", "failed": "no"}])
    assert {verdict for _, verdict in verdicts(skipped).values()} == {"not measured"}


def test_the_worst_row_decides_and_only_rows_that_a_target_is_about() -> None:
    rows = [gemm_row(4096, 0.95, 0.74), gemm_row(8192, 0.91, 0.9), gemm_row(256, 0.1, 0.1)]
    rows.append(gemm_row(4096, 0.2, 0.2, "real groups of 128"))
    outcomes = verdicts(document(gemm=rows))
    assert outcomes["expanded_gemm"] == (0.91, "met") and outcomes["packed_gemm"] == (0.74, "missed")


def test_the_default_recipe_has_targets_of_its_own() -> None:
    targets = gpu_targets.judged(document(gemm=[gemm_row(4096, 0.95, 0.7, "exact groups of 64")]))
    rows = [row for row in targets if "default recipe" in row["name"]]
    assert [(row["limit"], row["value"], row["verdict"]) for row in rows] == [(0.9, 0.95, "met"), (0.75, 0.7, "missed")]


def test_a_wrong_kernel_has_no_speed() -> None:
    row = gemm_row(4096, 0.95, 0.8)
    row["ratios"] |= {"expanded_gemm_int8": {"fp8": 0.92}, "packed_gemm_int8": {"fp8": 0.5}}
    outcomes = verdicts(document(gemm=[row | {"wrong": {"expanded_gemm": "far off", "packed_gemm": "far off"}}]))
    assert outcomes["expanded_gemm"] == (0.92, "met") and outcomes["packed_gemm"] == (0.5, "missed")
    row["ratios"] = {"expanded_gemm": {"fp8": 0.95}}
    assert verdicts(document(gemm=[row | {"wrong": {"expanded_gemm": "x"}}]))["expanded_gemm"] == (0.0, "missed")


@pytest.mark.parametrize(
    ("rows", "value", "verdict"),
    [([{"passed": True}], 0.0, "met"), ([{"passed": True}, {"passed": False}, {"failed": "x"}], 2.0, "missed")],
)
def test_checks_are_a_target(rows: list[dict[str, Any]], value: float, verdict: str) -> None:
    assert verdicts(document(check=rows))["kernel checks that did not pass or were not reached"] == (value, verdict)


@pytest.mark.parametrize(("change", "value"), [({"not_reached": ["a", "b"]}, 2.0), ({"stopped": "after 65 s"}, 1.0)])
@pytest.mark.parametrize("rows", [[], [{"name": "c", "passed": True}]])
def test_an_incomplete_check_does_not_meet_its_target(
    rows: list[dict[str, Any]], change: dict[str, Any], value: float
) -> None:
    results = document(check=rows)
    results["sections"]["check"] |= change
    assert verdicts(results)["kernel checks that did not pass or were not reached"] == (value, "missed")


def test_targets_of_the_other_sections() -> None:
    fused = [
        {"name": "f", "kind": kind, "m": 4096, "ratios": {"over_alone": 1.04, "of_copy": 0.8}} for kind in ("gelu",)
    ]
    fused += [{"name": "f", "kind": "norm_modulate", "m": 4096, "ratios": {"over_alone": 1.06, "of_copy": 0.85}}]
    denoiser = [{"name": "w", "packed_of_bf16": 0.27}, {"name": "d", "pixels": 1024, "ratios": {"over_compiled": 1.7}}]
    denoiser += [{"name": "d", "pixels": 256, "ratios": {"over_compiled": 1.1}}]
    pair = {"name": "e", "activation": "E2M3", "outputs": 4, "granularity": "per channel"}
    exact = [{**pair, "interval": None, "differ": {"a": 0, "b": 2}}, {**pair, "interval": 0, "differ": {"a": 4}}]
    exact += [{**pair, "interval": None, "differ": {"a": 0}, "granularity": "exact groups of 64"}]
    row_of = {row["name"]: row for row in gpu_targets.judged(document(fused=fused, denoiser=denoiser, exactness=exact))}
    values = [row_of[target.name]["value"] for target in gpu_targets.TARGETS]
    assert values == [None, None, None, None, None, 1.06, 0.85, 1.04, 1.7, 0.27, 0.25, 0.0]
    assert [row_of[target.name]["verdict"] for target in gpu_targets.TARGETS][5:] == [
        "missed", "met", "met", "met", "met", "missed", "met",
    ]  # fmt: skip


def test_the_readme_says_that_nothing_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.gpu_speed().startswith("No GPU was at hand: nothing measured.")
    results = document(gemm=[gemm_row(4096, 0.95, 0.74)])
    (tmp_path / "gpu_x.json").write_text(json.dumps({**results, "targets": []}))  # as after a kill
    table = readme.gpu_speed()
    assert "| NVIDIA Nothing 1, c |" in table and "| at least 0.9 | 0.950 | met |" in table
    assert "| at most 1.05 | - | not measured |" in table


def test_the_commit_can_be_told_where_there_is_no_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_git(*_arguments: Any) -> str:
        raise FileNotFoundError("git")

    monkeypatch.setattr(record, "_git", no_git)
    monkeypatch.delenv("DITC_COMMIT", raising=False)
    assert gpu_results.stamp()["commit"] == ""
    monkeypatch.setenv("DITC_COMMIT", "0123456789ab")
    assert gpu_results.stamp()["commit"] == "0123456789ab"


def test_rates_and_sets_of_inputs() -> None:
    from benchmarks.gpu.timing import rates, sets_for, timing_row

    row = timing_row((3.0, 1.0, 2.0))
    assert row["latency_ms"] == 2.0 and row["rounds"] == 3 and row["p10_ms"] <= 2.0 <= row["p90_ms"]
    assert rates(0.5, 10**12, 10**9) == {"tflops": 2000.0, "gb_per_s": 2000.0}
    for size in np.geomspace(1e3, 1e10, 20):
        count = sets_for(int(size), 50 << 20)
        assert 2 <= count <= 320 and (count == 320 or count * size >= 2 * (50 << 20))


def test_inputs_of_every_measured_call_are_more_than_the_cache_holds() -> None:
    l2 = 60 << 20  # of the largest of these GPUs, an H200
    read = [gpu_gemm.least_read(*row) for row in gpu_gemm.rows_to_measure()]
    read += [min(case.read_bytes, case.moved_bytes(True) // 2) for case in gpu_fused.CASES]
    assert all(size * gpu_timing.sets_for(size, l2) >= gpu_timing.COLD * l2 for size in read)


def test_all_results_of_a_captured_graph_have_places_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Result:
        pass

    alive: weakref.WeakSet[Result] = weakref.WeakSet()
    counted = []

    def call() -> Result:
        result = Result()
        alive.add(result)
        return result

    @contextmanager
    def graph(_graph: Any) -> Iterator[None]:
        yield
        counted.append(len(alive))

    stream = SimpleNamespace(wait_stream=lambda _other: None)
    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda: stream)
    monkeypatch.setattr("torch.cuda.stream", nullcontext)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    monkeypatch.setattr("torch.cuda.graph", graph)
    held = gpu_timing.captured([call] * 3)
    assert counted == [3] and len(held.results) == len(set(map(id, held.results))) == 3
