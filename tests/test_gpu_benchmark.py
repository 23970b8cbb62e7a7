"""The GPU benchmark without a GPU: what it needs and refuses, its tables, its document, its verdicts."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import subprocess
import sys
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import gpu, gpu_fused, gpu_gemm, gpu_results, gpu_targets, gpu_timing, readme, record
from benchmarks.gpu_pool import work_off_in_processes
from benchmarks.gpu_results import Results, broken, is_checked, validate, wrong
from benchmarks.gpu_run import Clock, Context, GpuLostError, Task, work_off
from benchmarks.shapes import MEASURED, PIXELS, WORKLOADS, gemm_shapes
from export.errors import ContractError
from tests import gpu_benchmark_tasks

ROOT = Path(__file__).parent.parent
MODULES = sorted(path.stem for path in (ROOT / "benchmarks").glob("gpu*.py"))
CPU = Context("cpu", 0, tiny=True)
FACTS = {
    "name": "NVIDIA Nothing 1",
    "compute_capability": 90,
    "multiprocessors": 1,
    "memory_bytes": 1,
    "l2_bytes": 1,
    "cuda": "13.0",
}
# Not on a bare machine with a GPU and PyTorch.
BLOCKED = ("onnx", "onnxruntime", "onnx_ir", "onnxscript", "diffusers", "transformers", "safetensors", "psutil", "tqdm")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    everything = {**inherited, **environment}
    return subprocess.run(command, cwd=ROOT, env=everything, capture_output=True, text=True, timeout=300, check=False)


# --- what it needs ----------------------------------------------------------------------------------------------------


def test_the_check_runs_interpreted_where_only_torch_triton_numpy_and_ml_dtypes_are() -> None:
    pytest.importorskip("triton", reason="the GPU kernels need triton")
    code = f"""
import importlib, sys
for name in {BLOCKED!r}:
    sys.modules[name] = None
modules = [importlib.import_module("benchmarks." + name) for name in {MODULES!r}]
sys.exit(importlib.import_module("benchmarks.gpu").main(["--check-only"]))
"""
    done = run_python(code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    count, _, total = done.stdout.splitlines()[-1].split()[:3]
    assert count == total and int(count) >= 18
    for name in ("quantize", "gelu_quantize", "norm_modulate_quantize", "pack, expand", "packed_gemm", "expanded_gemm"):
        assert any(name in line for line in done.stdout.splitlines()), name


@pytest.mark.parametrize("arguments", [[], ["--section", "gemm"], ["--check-only"]])
def test_without_a_gpu_it_says_so_before_any_work(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main([*arguments, "--output-dir", str(tmp_path)]) == 3
    assert not list(tmp_path.iterdir())
    told = capsys.readouterr()
    assert "sees no CUDA GPU" in told.err and "TRITON_INTERPRET=1" in told.err and told.out == ""


def test_measuring_under_the_interpreter_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu.main(["--section", "gemm"]) == 3
    assert "unset it, or give --check-only" in capsys.readouterr().err


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(gpu, "gpu_facts", lambda: {**FACTS, "compute_capability": 75})
    assert gpu.main([]) == 3
    assert "has compute capability 75; the kernels need 80" in capsys.readouterr().err


def test_an_unknown_section_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--section", "all"])
    assert "check" in capsys.readouterr().err


def test_budgets_leave_the_whole_below_eight_minutes() -> None:
    assert sum(section.budget_s for section in gpu.SECTIONS) <= gpu.TOTAL_S
    assert gpu.TOTAL_S + gpu.GRACE_S < 8 * 60
    assert all((ROOT / f"{section.module.replace('.', '/')}.py").exists() for section in gpu.SECTIONS)
    assert gpu.SECTIONS[0].name == "check"


@pytest.mark.parametrize("name", [name for name in MODULES if name != "gpu_kernels"])
def test_examples_in_docstrings(name: str) -> None:
    assert doctest.testmod(importlib.import_module(f"benchmarks.{name}")).failed == 0


# --- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MEASURED)
def test_gemm_shapes_are_those_of_the_model(model: str) -> None:
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    workload = WORKLOADS[model]
    with torch.device("meta"):
        made = getattr(diffusers, workload.class_name)(**workload.config)
    blocks = getattr(made, "transformer_blocks", None) or made.blocks
    linears = [(name, module) for name, module in blocks.named_modules() if isinstance(module, torch.nn.Linear)]
    weights = sum(layer.weight.numel() for name, layer in linears if ".norm" not in name)  # adaLN's are not quantized
    assert sum(row.n * row.k * row.count for row in workload.gemms()) == weights
    merged = Counter((layer.out_features, layer.in_features) for name, layer in linears if ".norm" not in name)
    of_row = {"attn.qkv": 3, "cross.kv": 2}  # linears that one GEMM runs
    stated: Counter[tuple[int, int]] = Counter()
    for row in workload.gemms():
        parts = of_row.get(row.name, 1)
        stated[row.n // parts, row.k] += row.count * parts
    assert stated == merged


def test_measured_shapes_have_every_gemm_once() -> None:
    shapes = gemm_shapes()
    assert len({shape.name for shape in shapes}) == len(shapes)
    assert {shape.m for shape in shapes} == {256, 1024, 4096, 120, 333}
    places = {(pixels, user) for shape in shapes for pixels in (shape.pixels,) for user in shape.users}
    for model in MEASURED:
        for pixels in PIXELS:
            for row in WORKLOADS[model].at(pixels).gemms():
                assert (pixels, f"{model} {row.name}") in places or row.name == "cross.kv"
    assert shapes[0].flops == 2 * 4096 * 3456 * 1152
    assert {shape.m for shape in gemm_shapes(batch=2)} == {512, 2048, 8192, 240, 666}


# --- running sections -------------------------------------------------------------------------------------------------


def test_a_task_that_fails_leaves_the_others_and_says_why() -> None:
    rows: list[dict[str, Any]] = []
    assert work_off(gpu_benchmark_tasks.tasks(CPU), CPU, Clock(60), rows.append) == []
    assert [row["name"] for row in rows] == ["one", "two", "three"]
    assert rows[1] == {"name": "two", "failed": "RuntimeError: this GPU has none"}


def test_a_task_that_does_not_fit_the_budget_is_named() -> None:
    rows: list[dict[str, Any]] = []
    tasks = [Task("long", dict, seconds=50), Task("short", dict, seconds=1)]
    assert work_off(tasks, CPU, Clock(10), rows.append) == ["long"]
    assert [row["name"] for row in rows] == ["short"]


def test_tasks_in_processes() -> None:
    rows: list[dict[str, Any]] = []
    clock = Clock(120)
    assert work_off_in_processes("tests.gpu_benchmark_tasks", "tasks", CPU, clock, rows.append, 2) == []
    assert sorted(row["name"] for row in rows) == ["one", "three", "two"]
    assert all(row["process"] != os.getpid() for row in rows if "process" in row)


def test_processes_stop_with_the_budget() -> None:
    rows: list[dict[str, Any]] = []
    missed = work_off_in_processes("tests.gpu_benchmark_tasks", "endless", CPU, Clock(6), rows.append, 2)
    assert missed == ["slow"] and [row["name"] for row in rows] == ["quick"]


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results.open(tmp_path / "gpu_x.json", FACTS)


def section(name: str, module: str = "tests.gpu_benchmark_tasks", **fields: Any) -> gpu.Section:
    return gpu.Section(name, 60, module, **fields)


def run(section: gpu.Section, results: Results) -> None:
    results.begin(section.name, 60)
    gpu.run_section(section, CPU, results, Clock(60))


def test_a_section_is_on_the_disk_row_by_row(results: Results) -> None:
    run(section("check"), results)
    found = json.loads(results.path.read_text())
    validate(found)
    assert [row["name"] for row in found["sections"]["check"]["rows"]] == ["one", "two", "three"]
    assert found["sections"]["check"]["stopped"] == ""
    assert broken(found) == ["two: RuntimeError: this GPU has none"]


def test_a_section_that_lost_the_gpu_goes_on_behind_the_row_that_did(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"rows": 0}

    def loss(_context: Context) -> str:
        state["rows"] += 1
        return "AcceleratorError: an illegal memory access" if state["rows"] == 1 else ""

    monkeypatch.setattr(Context, "loss", loss)
    with pytest.raises(GpuLostError, match="one"):
        run(section("gemm"), results)
    gpu.run_section(section("gemm"), CPU, results, Clock(60))  # as another process does
    part = json.loads(results.path.read_text())["sections"]["gemm"]
    assert [row["name"] for row in part["rows"]] == ["one", "two", "three"] and part["stopped"] == ""
    assert part["rows"][0]["lost"] and "illegal memory access" in part["rows"][0]["failed"]
    assert "passed" not in part["rows"][0] and part["rows"][2]["passed"]


def test_a_worker_that_lost_the_gpu_ends_the_section(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = []
    with pytest.raises(GpuLostError, match="two"):
        work_off_in_processes("tests.gpu_benchmark_tasks", "losing", CPU, Clock(120), rows.append, 1, {"one"})
    assert [row["name"] for row in rows] == ["two"]


def test_another_process_goes_on_while_one_loses_the_gpu(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = [gpu.LOST, gpu.LOST, 0]
    monkeypatch.setattr(gpu, "exit_code", lambda command, seconds: codes.pop(0))
    results.begin("gemm", 60)
    gpu.run_in_child(gpu.section_called("gemm"), results, 60)
    assert codes == [] and results.document["sections"]["gemm"]["stopped"] == "begun"  # a true child would end it


def test_no_process_outlives_a_section(tmp_path: Path) -> None:
    left = tmp_path / "left"
    with pytest.raises(subprocess.TimeoutExpired):
        gpu.exit_code(["sh", "-c", f"sleep 600 & echo $! > {left}; wait"], 0.5)
    state = Path(f"/proc/{int(left.read_text())}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"
    assert gpu.exit_code(["sh", "-c", "exit 3"], 5) == 3


def test_a_killed_section_keeps_its_rows_and_says_that_it_was_killed(results: Results) -> None:
    results.begin("gemm", 60)
    results.keep("gemm", {"name": "first"})
    again = Results.open(results.path, FACTS)  # as after a kill
    assert again.document["sections"]["gemm"]["rows"] == [{"name": "first"}]
    assert again.document["sections"]["gemm"]["stopped"] == "begun"
    again.stop("gemm", "stopped after 60 s")
    assert broken(json.loads(results.path.read_text())) == ["gemm: stopped after 60 s"]


def test_other_sections_stay_when_one_is_measured_anew(results: Results) -> None:
    for name in ("gemm", "fused"):
        run(section(name), results)
    again = Results.open(results.path, FACTS)
    again.begin("fused", 60)
    found = json.loads(results.path.read_text())["sections"]
    assert len(found["gemm"]["rows"]) == 3 and found["fused"]["rows"] == []


def test_a_check_counts_for_the_same_code_only(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    results.begin("check", 60)
    results.keep("check", {"name": "one", "passed": True})
    assert not is_checked(results.document)  # it has not come to its end
    results.end("check", [], 1.0)
    assert is_checked(results.document)
    monkeypatch.setattr(gpu_results.machine, "code_version", lambda: "other")
    assert not is_checked(results.document)


@pytest.mark.parametrize("row", [{"name": "one", "passed": False}, {"name": "one", "failed": "no"}])
def test_a_check_that_did_not_pass_does_not_count(results: Results, row: dict[str, Any]) -> None:
    results.begin("check", 60)
    results.keep("check", row)
    results.end("check", [], 1.0)
    assert not is_checked(results.document)
    assert wrong(results.document) + broken(results.document)


@pytest.mark.parametrize(
    ("rows", "code"),
    [([{"name": "a", "passed": True}], 1), ([{"name": "a", "passed": False}], 4), ([{"name": "a", "failed": "b"}], 1)],
)
def test_exit_codes(
    results: Results, rows: list[dict[str, Any]], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    results.begin("check", 60)
    for row in rows:
        results.keep("check", row)
    results.end("check", ["late"], 1.0)
    results.document["targets"] = gpu_targets.judged(results.document)
    assert gpu.finish(results) == code
    told = capsys.readouterr().out
    assert "NOT REACHED within 60 s of check: late" in told and "not measured" in told


def test_the_exit_code_is_0_where_all_was_reached_and_right(results: Results) -> None:
    results.begin("check", 60)
    results.keep("check", {"name": "a", "passed": True})
    results.end("check", [], 1.0)
    results.document["targets"] = gpu_targets.judged(results.document)
    assert gpu.finish(results) == 0


def test_all_sections_run_each_in_a_process_and_the_targets_are_judged(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def run(command: list[str], seconds: float) -> int:
        name = command[command.index("--one") + 1]
        commands.append(command)
        if name == "exactness":
            return 1  # before it could write anything
        child = Results.open(results.path, FACTS)
        child.begin(name, 60)
        if name == "fused":
            raise subprocess.TimeoutExpired(command, seconds)
        if name == "gemm":
            return 1
        child.end(name, [], 1.0)
        return 0

    monkeypatch.setattr(gpu, "exit_code", run)
    started = time.monotonic()
    gpu.measure(gpu.chosen([], False), results, [])
    assert [command[command.index("--one") + 1] for command in commands] == [section.name for section in gpu.SECTIONS]
    found = json.loads(results.path.read_text())
    validate(found)
    assert found["sections"]["gemm"]["stopped"] == "its process ended with 1"
    assert found["sections"]["exactness"]["stopped"] == "its process ended with 1"
    assert found["sections"]["fused"]["stopped"].startswith("stopped after ")
    lasts = [float(command[command.index("--until") + 1]) - started for command in commands]
    assert lasts == pytest.approx([85, 120, 240, 290, 460], abs=5)  # what a section leaves over goes to the next
    assert len(found["targets"]) == len(gpu_targets.TARGETS)


def test_the_check_is_among_any_choice() -> None:
    assert [section.name for section in gpu.chosen(["gemm"], False)] == ["check", "gemm"]
    assert [section.name for section in gpu.chosen([], True)] == ["check"]


# --- document and verdicts --------------------------------------------------------------------------------------------


def test_a_document_of_another_kind_is_refused() -> None:
    with pytest.raises(ContractError, match=r"lacks schema_version, machine, .*gpu\.l2_bytes"):
        validate({"gpu": {"name": "x"}, "sections": {}, "targets": []})
    whole = {"schema_version": 9, "gpu": FACTS, "machine": {}, "sections": {}, "targets": []}
    with pytest.raises(ContractError, match="schema_version 9"):
        validate(whole)
    with pytest.raises(ContractError, match=r"sections\.gemm\.rows\[0\]\.name"):
        validate({**whole, "schema_version": 1, "sections": {"gemm": {"rows": [{}]}}})


def document(**rows: list[dict[str, Any]]) -> dict[str, Any]:
    sections = {name: {"rows": part, "commit": "c", "not_reached": [], "stopped": ""} for name, part in rows.items()}
    return {"gpu": FACTS, "sections": sections}


def gemm_row(m: int, expanded: float, packed: float, granularity: str = "per channel") -> dict[str, Any]:
    ratios = {"expanded_gemm": {"fp8": expanded, "bf16": 2.0}, "packed_gemm": {"fp8": packed}}
    return {"name": "r", "m": m, "granularity": granularity, "ratios": ratios, "wrong": {}}


def verdicts(found: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """By the first words of a target's name; of those that begin alike, the first."""
    rows = reversed(gpu_targets.judged(found))
    return {row["name"].split(",")[0]: (row["value"], row["verdict"]) for row in rows}


def test_nothing_measured_meets_nothing() -> None:
    assert {verdict for _, verdict in verdicts(document()).values()} == {"not measured"}
    skipped = document(exactness=[{"name": "x", "skipped": "old GPU"}], gemm=[{"name": "x", "failed": "no"}])
    assert {verdict for _, verdict in verdicts(skipped).values()} == {"not measured"}


def test_the_worst_row_decides_and_only_rows_that_a_target_is_about() -> None:
    rows = [gemm_row(4096, 0.95, 0.74), gemm_row(8192, 0.91, 0.9), gemm_row(256, 0.1, 0.1)]
    rows.append(gemm_row(4096, 0.2, 0.2, "real groups of 128"))
    found = verdicts(document(gemm=rows))
    assert found["expanded_gemm"] == (0.91, "met") and found["packed_gemm"] == (0.74, "missed")


def test_the_default_recipe_has_targets_of_its_own() -> None:
    found = gpu_targets.judged(document(gemm=[gemm_row(4096, 0.95, 0.7, "exact groups of 64")]))
    rows = [row for row in found if "default recipe" in row["name"]]
    assert [(row["limit"], row["value"], row["verdict"]) for row in rows] == [(0.9, 0.95, "met"), (0.75, 0.7, "missed")]


def test_a_wrong_kernel_has_no_speed() -> None:
    row = gemm_row(4096, 0.95, 0.8)
    row["ratios"] |= {"expanded_gemm_int8": {"fp8": 0.92}, "packed_gemm_int8": {"fp8": 0.5}}
    found = verdicts(document(gemm=[row | {"wrong": {"expanded_gemm": "far off", "packed_gemm": "far off"}}]))
    assert found["expanded_gemm"] == (0.92, "met") and found["packed_gemm"] == (0.5, "missed")
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
    found = document(check=rows)
    found["sections"]["check"] |= change
    assert verdicts(found)["kernel checks that did not pass or were not reached"] == (value, "missed")


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
    found = {row["name"]: row for row in gpu_targets.judged(document(fused=fused, denoiser=denoiser, exactness=exact))}
    values = [found[target.name]["value"] for target in gpu_targets.TARGETS]
    assert values == [None, None, None, None, None, 1.06, 0.85, 1.04, 1.7, 0.27, 0.25, 0.0]
    assert [found[target.name]["verdict"] for target in gpu_targets.TARGETS][5:] == [
        "missed", "met", "met", "met", "met", "missed", "met",
    ]  # fmt: skip


def test_the_readme_says_that_nothing_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.gpu_speed().startswith("No GPU was at hand: nothing measured.")
    found = document(gemm=[gemm_row(4096, 0.95, 0.74)])
    (tmp_path / "gpu_x.json").write_text(json.dumps({**found, "targets": []}))  # as after a kill
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


def test_committed_results_are_valid() -> None:
    for path in sorted(readme.RESULTS.glob("gpu_*.json")):
        validate(json.loads(path.read_text()))


def test_rates_and_sets_of_inputs() -> None:
    from benchmarks.gpu_timing import Timing, rates, sets_for

    row = Timing((3.0, 1.0, 2.0)).to_row()
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
        found = Result()
        alive.add(found)
        return found

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
