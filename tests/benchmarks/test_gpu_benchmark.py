"""The GPU benchmark without a GPU: what it needs and refuses, its tables, its document, its verdicts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import results as gpu_results
from benchmarks.gpu import targets as gpu_targets
from benchmarks.gpu.results import Results, broken, is_checked, wrong
from benchmarks.gpu.run import Clock, Device, GpuLostError, Task, work_off, work_off_in_processes
from benchmarks.shapes import MEASURED, PIXELS, WORKLOADS, gemm_shapes
from tests.support import gpu_benchmark_tasks
from tests.support.gpu_benchmark_tasks import FACTS

ROOT = Path(__file__).parents[2]
MODULES = sorted(path.stem for path in (ROOT / "benchmarks/gpu").glob("[!_]*.py"))
CPU = Device("cpu", 0, tiny=True)
# Not on a bare machine with a GPU and PyTorch.
BLOCKED = ("onnx", "onnxruntime", "onnx_ir", "onnxscript", "diffusers", "transformers", "safetensors", "psutil", "tqdm")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    everything = {**inherited, **environment}
    return subprocess.run(command, cwd=ROOT, env=everything, capture_output=True, text=True, timeout=300, check=False)


# --- what it needs ----------------------------------------------------------------------------------------------------


@pytest.mark.kernels
def test_the_check_runs_interpreted_where_only_torch_triton_numpy_and_ml_dtypes_are() -> None:
    pytest.importorskip("triton", reason="the GPU kernels need triton")
    code = f"""
import importlib, sys
for name in {BLOCKED!r}:
    sys.modules[name] = None
modules = [importlib.import_module("benchmarks.gpu." + name) for name in {MODULES!r}]
sys.exit(importlib.import_module("benchmarks.gpu.__main__").main(["--check-only"]))
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
    printed = capsys.readouterr()
    assert "sees no CUDA GPU" in printed.err and "TRITON_INTERPRET=1" in printed.err and printed.out == ""


@pytest.mark.kernels
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
    sections = gpu.SECTIONS.values()
    assert sum(section.budget_s for section in sections) <= gpu.TOTAL_S
    assert gpu.TOTAL_S + gpu.GRACE_S < 8 * 60
    assert all((ROOT / f"{section.module.replace('.', '/')}.py").exists() for section in sections)
    assert next(iter(sections)) == gpu.CHECK


# --- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("model", MEASURED)
def test_gemm_shapes_are_those_of_the_model(model: str) -> None:
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    workload = WORKLOADS[model]
    with torch.device("meta"):
        network = getattr(diffusers, workload.class_name)(**workload.config)
    blocks = getattr(network, "transformer_blocks", None) or network.blocks
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
    assert work_off_in_processes("tests.support.gpu_benchmark_tasks", "tasks", CPU, clock, rows.append, 2) == []
    assert sorted(row["name"] for row in rows) == ["one", "three", "two"]
    assert all(row["process"] != os.getpid() for row in rows if "process" in row)


@pytest.mark.torch
def test_processes_stop_with_the_budget() -> None:
    rows: list[dict[str, Any]] = []
    missed = work_off_in_processes("tests.support.gpu_benchmark_tasks", "endless", CPU, Clock(6), rows.append, 2)
    assert missed == ["slow"] and [row["name"] for row in rows] == ["quick"]


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results.open(tmp_path / "gpu_x.json", FACTS)


def section(name: str, module: str = "tests.support.gpu_benchmark_tasks", **fields: Any) -> gpu.Section:
    return gpu.Section(name, 60, module, **fields)


def run(section: gpu.Section, results: Results) -> None:
    results.begin(section.name, 60)
    gpu.run_section(section, CPU, results, Clock(60))


def test_a_section_is_on_the_disk_row_by_row(results: Results) -> None:
    run(section("check"), results)
    document = json.loads(results.path.read_text())
    assert [row["name"] for row in document["sections"]["check"]["rows"]] == ["one", "two", "three"]
    assert document["sections"]["check"]["stopped"] == ""
    assert broken(document) == ["two: RuntimeError: this GPU has none"]


def test_a_section_that_lost_the_gpu_goes_on_behind_the_row_that_did(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"rows": 0}

    def loss(_device: Device) -> str:
        state["rows"] += 1
        return "AcceleratorError: an illegal memory access" if state["rows"] == 1 else ""

    monkeypatch.setattr(Device, "loss", loss)
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
        work_off_in_processes("tests.support.gpu_benchmark_tasks", "losing", CPU, Clock(120), rows.append, 1, {"one"})
    assert [row["name"] for row in rows] == ["two"]


def test_another_process_goes_on_while_one_loses_the_gpu(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = [gpu.LOST, gpu.LOST, 0]
    monkeypatch.setattr(gpu, "exit_code", lambda command, seconds: codes.pop(0))
    results.begin("gemm", 60)
    gpu.run_in_child(gpu.SECTIONS["gemm"], results, 60)
    assert codes == [] and results.document["sections"]["gemm"]["stopped"] == "begun"  # a true child would end it


def test_no_process_outlives_a_section(tmp_path: Path) -> None:
    left = tmp_path / "left"
    with pytest.raises(subprocess.TimeoutExpired):
        gpu.exit_code(["sh", "-c", f"sleep 600 & echo $! > {left}; wait"], 0.5)
    state, deadline = Path(f"/proc/{int(left.read_text())}/stat"), time.monotonic() + 30
    while (running := state.exists() and state.read_text().split()[2] != "Z") and time.monotonic() < deadline:
        time.sleep(0.05)  # killed, and on a loaded machine not gone yet
    assert not running
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
    sections = json.loads(results.path.read_text())["sections"]
    assert len(sections["gemm"]["rows"]) == 3 and sections["fused"]["rows"] == []


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
    printed = capsys.readouterr().out
    assert "NOT REACHED within 60 s of check: late" in printed and "not measured" in printed


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
    assert [command[command.index("--one") + 1] for command in commands] == list(gpu.SECTIONS)
    document = json.loads(results.path.read_text())
    assert document["sections"]["gemm"]["stopped"] == "its process ended with 1"
    assert document["sections"]["exactness"]["stopped"] == "its process ended with 1"
    assert document["sections"]["fused"]["stopped"].startswith("stopped after ")
    lasts = [float(command[command.index("--until") + 1]) - started for command in commands]
    assert lasts == pytest.approx([85, 120, 240, 290, 460], abs=5)  # what a section leaves over goes to the next
    assert len(document["targets"]) == len(gpu_targets.TARGETS)


def test_the_check_is_among_any_choice() -> None:
    assert [section.name for section in gpu.chosen(["gemm"], False)] == ["check", "gemm"]
    assert [section.name for section in gpu.chosen([], True)] == ["check"]
