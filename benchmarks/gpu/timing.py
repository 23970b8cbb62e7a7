"""Times on a GPU: calls in a CUDA graph over rotated inputs, the L2 cache flushed, contestants interleaved.

A kernel of a few microseconds cannot be timed alone: a graph holds one call for each of several sets of inputs, more
of them than the L2 cache holds, and the time of a replay is divided by their number. Every call writes its result to a
place of its own, as a copy does. Before each replay the cache is overwritten, which also lets the host run ahead, so
that no time between the two events is the host's. The gap between two kernels of a graph counts, for all contestants
alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.gpu.run import error_line
from benchmarks.record import Json

Call = Callable[[], object]
# Rounds are as many as fit into a contest's time, within these bounds.
ROUNDS = (11, 101)
HOST_ROUNDS = 10
# Sets whose inputs alone are together this often as large as the L2 cache; one call must not find what another left.
COLD = 2.0
MAX_SETS = 320
# Overwritten before a replay: at least this much, which takes longer than launching a graph.
FLUSH_BYTES = 512 << 20
MILLISECONDS = 1e3


def timing_row(milliseconds: Sequence[float]) -> Json:
    """What is kept of the times of one call, a number for each round."""
    p10, p50, p90 = np.percentile(milliseconds, (10, 50, 90))
    return {"latency_ms": float(p50), "p10_ms": float(p10), "p90_ms": float(p90), "rounds": len(milliseconds)}


def rates(latency_ms: float, flops: int, size_bytes: int) -> dict[str, float]:
    """TFLOP/s and GB/s (10^12 and 10^9) of a call.

    >>> rates(2.0, 4_000_000_000_000, 6_000_000_000)
    {'tflops': 2000.0, 'gb_per_s': 3000.0}
    """
    return {"tflops": flops / latency_ms / 1e9, "gb_per_s": size_bytes / latency_ms / 1e6}


def sets_for(input_bytes: int, l2_bytes: int) -> int:
    """How many sets of inputs all contestants rotate over; `input_bytes`: what the one that reads least reads of a set.

    >>> sets_for(14_000_000, 50_000_000), sets_for(10**9, 50_000_000), sets_for(1000, 50_000_000)
    (8, 2, 320)
    """
    return min(MAX_SETS, max(2, math.ceil(COLD * l2_bytes / input_bytes)))


@dataclass(frozen=True)
class Captured:
    """A CUDA graph and the results of its calls. Those alive at once during capture cannot share memory."""

    graph: torch.cuda.CUDAGraph
    results: list[object]

    def replay(self) -> None:
        self.graph.replay()


def captured(calls: Sequence[Call]) -> Captured:
    """A CUDA graph of all `calls`, each run three times before, so that compiling and allocating are done."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]
    return Captured(graph, results)


def flusher(l2_bytes: int) -> Call:
    """A call that overwrites a buffer several times as large as the L2 cache."""
    return torch.empty(max(4 * l2_bytes, FLUSH_BYTES), dtype=torch.uint8, device="cuda").zero_


def interleaved(work: Mapping[str, tuple[Call, int]], flush: Call, seconds: float) -> dict[str, Json]:
    """Time every (call, how many results it stands for) once a round, after one to warm up, for about `seconds` ->
    rows of times."""
    if not work:
        return {}
    started = time.perf_counter()
    for call, _ in work.values():
        _milliseconds(call, flush)
    warm = max(time.perf_counter() - started, 1e-6)
    rounds = int(np.clip(seconds / warm, *ROUNDS))
    measured: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, (call, count) in work.items():
            measured[name].append(_milliseconds(call, flush) / count)
    return {name: timing_row(times) for name, times in measured.items()}


def _milliseconds(call: Call, flush: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def host_milliseconds(call: Call) -> float:
    """Median time until `call` has handed its work to the GPU, which is idle before."""
    times = []
    for _ in range(HOST_ROUNDS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * MILLISECONDS)
    torch.cuda.synchronize()
    return float(np.median(times))


def capture_all(contestants: Mapping[str, Sequence[Call]]) -> tuple[dict[str, Captured], dict[str, str]]:
    """A graph of each contestant's calls, one for every set of inputs -> graphs, and why others could not run."""
    torch.cuda.empty_cache()  # gives back what the graphs of the row before wrote to
    graphs: dict[str, Captured] = {}
    refused: dict[str, str] = {}
    for name, calls in contestants.items():
        try:
            graphs[name] = captured(calls)
        except Exception as error:  # a contestant that this GPU or this torch does not have is named, not hidden
            refused[name] = error_line(error)
    return graphs, refused


def contest(
    contestants: Mapping[str, Sequence[Call]],
    flush: Call,
    seconds: float,
    rates_of: Callable[[str, float], dict[str, float]],
) -> tuple[dict[str, Json], dict[str, str]]:
    """Capture and time `contestants` -> rows of times and rates of one call, and why others could not run.

    rates_of(name, milliseconds): what a contestant's time makes of its operations and bytes.
    """
    graphs, refused = capture_all(contestants)
    work = {name: (graph.replay, len(contestants[name])) for name, graph in graphs.items()}
    rows = interleaved(work, flush, seconds)
    return {name: row | rates_of(name, row["latency_ms"]) for name, row in rows.items()}, refused
