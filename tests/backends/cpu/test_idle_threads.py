"""Threads of an engine are onnxruntime's alone and sleep between its calls: two engines in one process do not take each
other's cores."""

import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from pipeline.backends.cpu import CpuBackend, CpuOptions
from pipeline.backends.cpu.engine import CpuEngine
from pipeline.recipe import Recipe
from tests.support import native
from tests.support.portable import portable, random_linear

pytestmark = pytest.mark.kernels
TASKS = Path("/proc/self/task")
THREADS, CHANNELS = 3, 256
WAIT_S = 0.5
# A spinning thread takes all the processor time that it gets; a sleeping one none. A tick is what the system counts in.
MOST_TICKS = 1


def ticks() -> dict[str, int]:
    """Processor time of each thread of this process so far, user and system."""
    numbers = {}
    for path in TASKS.iterdir():
        fields = (path / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        numbers[path.name] = int(fields[11]) + int(fields[12])
    return numbers


def spent(start: dict[str, int], threads: set[str]) -> int:
    """Ticks of these threads since `start`."""
    now = ticks()
    return sum(now[name] - start[name] for name in threads)


@pytest.fixture(scope="module", params=["stock", "fused"])
def folder(request, tmp_path_factory):
    if request.param == "fused":
        native.need_compiler()
    root = tmp_path_factory.mktemp("idle")
    body = 'y = fpq.QuantizedLinear <layer="a"> (x)'
    model = portable(body, [random_linear("a", n=CHANNELS, k=CHANNELS)], f"float[B,S,{CHANNELS}] x")
    ir.save(model, root / "model.onnx", external_data="model.onnx.data")
    recipe = Recipe(name="test", model="zoo:pixart_mini").with_options(CpuOptions(path=request.param))
    for name in ("work", "cpu"):
        (root / name).mkdir()
    backend = CpuBackend()
    backend.build(backend.lower(root / "model.onnx", root / "work", recipe), root / "cpu", recipe)
    return root / "cpu"


@pytest.mark.skipif(not TASKS.exists(), reason="the system does not tell the time of each thread")
def test_threads_of_an_idle_engine_sleep(folder):
    """After both engines have worked, neither's threads take processor time; while one works, the other's take none."""
    import onnxruntime as ort

    ort.get_available_providers()  # whatever its import starts is there
    threads, engines = [set(ticks())], []
    try:
        for _ in range(2):
            engines.append(CpuEngine(folder, THREADS))
            threads.append(set(ticks()))
        first, second = threads[1] - threads[0], threads[2] - threads[1]
        assert len(first) == len(second) == THREADS - 1
        call = {"x": np.random.default_rng(0).standard_normal((1, 512, CHANNELS)).astype(np.float32)}
        for engine in engines:
            engine.run(call)
        assert set(ticks()) <= threads[2], "what an engine computes is shared out among threads beside onnxruntime's"
        time.sleep(WAIT_S / 5)  # what a thread still has to do before it sleeps
        start = ticks()
        time.sleep(WAIT_S)
        assert spent(start, first | second) <= MOST_TICKS, "threads spin between calls"
        start, end = ticks(), time.monotonic() + WAIT_S
        while time.monotonic() < end or not spent(start, first):  # on a busy machine until it has had its turn
            engines[0].run(call)
        assert spent(start, second) <= MOST_TICKS, "threads of an engine spin while another works"
    finally:
        for engine in engines:
            engine.close()
