"""The whole GPU benchmark without a GPU: every section's tasks for an H100, and a document of all sections' true rows
from small sizes, run as the script runs them, judged, and shown in the README's table."""

from __future__ import annotations

import importlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import readme
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import check as gpu_check
from benchmarks.gpu import check_quantizers as gpu_check_quantizers
from benchmarks.gpu import denoiser_times as gpu_denoiser_times
from benchmarks.gpu import exactness as gpu_exactness
from benchmarks.gpu import fused as gpu_fused
from benchmarks.gpu import gemm as gpu_gemm
from benchmarks.gpu import quantized_denoiser as gpu_quantized_denoiser
from benchmarks.gpu import targets as gpu_targets
from benchmarks.gpu import timing as gpu_timing
from benchmarks.gpu.denoiser import Size
from benchmarks.gpu.results import Results
from benchmarks.gpu.run import Clock, Device
from benchmarks.shapes import Granularity, Shape
from tests.support.gpu_benchmark_tasks import FACTS
from tests.support.reference_kernels import ReferenceKernels

pytest.importorskip("triton", reason="the GPU kernels need triton")
CPU, HOPPER = Device("cpu", 0, l2_bytes=1024, tiny=True), Device("cuda", 90, l2_bytes=50 << 20)
CHANNEL, EXACT = gpu_targets.CHANNEL, Granularity("exact groups of 64", 16)


@pytest.mark.parametrize("name", gpu.SECTIONS)
def test_every_section_has_its_tasks_for_an_h100(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    section = gpu.SECTIONS[name]
    module = importlib.import_module(section.module)
    monkeypatch.setattr(module, "flusher", lambda l2_bytes: None, raising=False)
    lists = [module.tasks(HOPPER)] + ([module.compiling(HOPPER)] if section.compiles else [])
    for tasks in lists:
        names = [task.name for task in tasks]
        assert names and len(set(names)) == len(names)
    assert all(0 < task.seconds < section.budget_s for task in lists[0])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes for the interpreter, no CUDA, and every replay takes one of five times."""
    ticks = itertools.count()
    monkeypatch.setattr(gpu_timing, "captured", lambda calls: gpu_timing.Captured(None, [call() for call in calls]))
    monkeypatch.setattr(gpu_timing.Captured, "replay", lambda self: None)
    monkeypatch.setattr(gpu_timing, "ROUNDS", (2, 2))
    monkeypatch.setattr(gpu_timing, "_milliseconds", lambda call, flush: 1.0 + next(ticks) % 5)
    for name, value in {"cuda.synchronize": None, "cuda.memory_allocated": 0, "_dynamo.reset": None}.items():
        monkeypatch.setattr(f"torch.{name}", lambda value=value: value)
    monkeypatch.setattr("torch.compile", lambda function, **_: function)
    for module in (gpu_gemm, gpu_fused, gpu_denoiser_times):
        monkeypatch.setattr(module, "flusher", lambda l2_bytes: lambda: None)
        monkeypatch.setattr(module, "sets_for", lambda input_bytes, l2_bytes: 1, raising=False)
    shape = Shape(16, 16, 32, 1024, ("pixart ff.in",))
    monkeypatch.setattr(gpu_targets, "LARGE", 16)
    monkeypatch.setattr(gpu_gemm, "rows_to_measure", lambda: [(shape, CHANNEL), (shape, EXACT)])
    fused = [gpu_fused.FusedCase("norm_modulate", 1, 16, 32), gpu_fused.FusedCase("gelu", 1, 16, 32)]
    monkeypatch.setattr(gpu_fused, "CASES", fused)
    monkeypatch.setattr(gpu_check, "gemm_cases", lambda tiny: [gpu_check.GemmCase("E2M3", "E2M1", 2, 8, 32)])
    cases = [gpu_check_quantizers.QuantizerCase("none", "E2M3", 8, 32, "bf16")]
    monkeypatch.setattr(gpu_check_quantizers, "quantizer_cases", lambda tiny: cases)
    monkeypatch.setattr(gpu_exactness, "PAIRS", (("E2M3", CHANNEL), ("E2M3", EXACT)))
    monkeypatch.setattr(gpu_exactness, "DEPTHS", (32,))
    monkeypatch.setattr(gpu_exactness, "SIZE", 16)
    monkeypatch.setattr(gpu_exactness, "PATTERNS", {"normal": gpu_exactness.PATTERNS["normal"]})
    monkeypatch.setattr(gpu_exactness, "intervals_of", lambda spec, sm: (32, None))
    monkeypatch.setattr(Device, "has_fp8", True)
    monkeypatch.setattr(gpu_denoiser_times, "EXACT_64", EXACT)
    monkeypatch.setattr(gpu_denoiser_times, "Size", lambda: Size(32, 4, 1, caption=3, caption_channels=16))
    monkeypatch.setattr(gpu_quantized_denoiser, "launch", ReferenceKernels())
    monkeypatch.setattr(gpu_denoiser_times, "SIZES", ((32, 1),))
    for module, name in ((gpu_denoiser_times, "LARGE_PIXELS"), (gpu_denoiser_times, "LEAST_PIXELS")):
        monkeypatch.setattr(module, name, 32)
    monkeypatch.setattr(gpu_targets, "LARGE_PIXELS", 32)
    monkeypatch.setattr(gpu_denoiser_times, "host_milliseconds", lambda call: 0.5)


def run_all(results: Results, monkeypatch: pytest.MonkeyPatch) -> int:
    """What main does behind the look for a GPU, sections in this process."""

    def run(command: list[str], seconds: float) -> int:
        section = gpu.SECTIONS[command[command.index("--one") + 1]]
        plain = gpu.Section(section.name, section.budget_s, section.module)  # no processes
        gpu.run_section(plain, CPU, Results.open(results.path, FACTS), Clock(seconds))
        return 0

    monkeypatch.setattr(gpu, "exit_code", run)
    gpu.measure(gpu.chosen([], False), results, [])
    return gpu.finish(results)


@pytest.mark.kernels
@pytest.mark.usefixtures("interpreter", "small")
def test_a_whole_run_gives_a_document_with_every_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = Results.open(tmp_path / "gpu_x.json", FACTS)
    code = run_all(results, monkeypatch)
    printed = capsys.readouterr().out
    record: dict[str, Any] = json.loads(results.path.read_text())
    assert code == 0, printed
    assert {name: bool(part["rows"]) for name, part in record["sections"].items()} == dict.fromkeys(gpu.SECTIONS, True)
    assert all(row["verdict"] in ("met", "missed") and row["of"] for row in record["targets"]), printed
    assert {row["value"] for row in record["targets"] if "kernel checks" in row["name"]} == {0.0}
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    table = readme.gpu_speed()
    assert all(f"| {target.name} |" in table for target in gpu_targets.TARGETS) and "not measured" not in table
