"""The gates of one half of an autoencoder, of which no layer is quantized: the whole of it against the float64 module.

A half is one stretch in the sense of segments.py, from its input to its output, and is judged by the limit that stands
there: what rounding may do in it, measured on the same input by further passes whose every operation errs at random.
Nothing amplifies rounding here as flipped codes do, so that no call has another limit than the first.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.models.families import SIDES, pixels_per_latent
from pipeline.backends import BACKENDS
from pipeline.backends.base import Arrays, Engine, LoweredGraph, only
from pipeline.distance import Array
from pipeline.generate.case import Run
from pipeline.progress import track
from pipeline.recipe import Recipe
from pipeline.verify.probe import ProbedGraph
from pipeline.verify.reference_hooks import operations_jittered
from pipeline.verify.report import Gate, Report, SegmentResult, write_layers_csv
from pipeline.verify.segments import JITTER_ULPS, PASSES, judge
from pipeline.verify.walk import Stop, tensors_of

if TYPE_CHECKING:
    import torch

    from export.models.load import LoadedModel

logger = logging.getLogger(__name__)
# Larger inputs than usual ones, which a bound or a scale that was taken once does not fit.
LARGE_FACTOR = 3.0
# How often two callers call at once.
THREAD_ROUNDS = 2


@dataclass(frozen=True)
class Size:
    """A call: samples, latents [height, width] that go with it, and a factor of its input."""

    batch: int
    height: int
    width: int
    factor: float = 1.0


# The first is the usual one. A tile at a picture's edge may be a single row or column of latents.
SIZES = (Size(1, 16, 12), Size(2, 8, 8), Size(3, 5, 9, LARGE_FACTOR), Size(1, 1, 7), Size(1, 24, 3))


@dataclass(frozen=True)
class Call:
    """A call and what the passes of the reference gave: first the exact one."""

    text: str
    inputs: Arrays
    stops: tuple[Stop, ...]


def verify_half(
    model: LoadedModel,
    lowered: Mapping[str, LoweredGraph],
    engines: Mapping[str, Engine],
    recipe: Recipe,
    out_dir: Path,
) -> Report:
    """All gates of every target of `lowered`; one without an entry in `engines` is judged by its lowered graph.

    Writes the report's files into `out_dir`.
    """
    from pipeline.verify.page import write_plain_page

    calls, report = reference_calls(model), Report()
    for target, graph in lowered.items():
        probed, engine = ProbedGraph(graph), engines.get(target)
        if engine is None:
            report.notes.append(f"{target}: {BACKENDS[target].not_run_note(graph)}")
        report.gates.append(coverage_gate(target, model, probed))
        report.add(judged(target, calls, engine.run if engine else probed.denoiser()))
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "parity.json").write_text(report.to_json(), encoding="utf-8")
    write_layers_csv(report, out_dir / "layers.csv")
    write_plain_page(report, model, recipe, out_dir)
    for gate in report.failures():
        logger.error("gate %s: %g %s, limit %g; %s", gate.name, gate.value, gate.unit, gate.limit, gate.why)
    return report


# --- the reference -------------------------------------------------------------------------------------------------


def make_inputs(model: LoadedModel, size: Size, seed: int) -> Arrays:
    """The input of a call, float32 [batch, C, ...]."""
    from export.models.load import sample_inputs

    unit = pixels_per_latent(model.config)
    inputs = sample_inputs(model, size.batch, seed, size.height * unit, size.width * unit)
    return {name: (array * size.factor).astype(array.dtype) for name, array in inputs.items()}


def reference_calls(model: LoadedModel) -> list[Call]:
    """A call of each of SIZES by the float64 module, and by PASSES of the float32 one with jitter."""
    import torch

    from pipeline.backends.reference import reference_module

    exact, single = (reference_module(model, {}, dtype) for dtype in (torch.float64, torch.float32))
    calls = []
    for seed, size in enumerate(track(SIZES, len(SIZES), "verify: reference")):
        inputs = make_inputs(model, size, seed)
        outputs = [_run(exact, inputs, torch.float64)]
        for number in range(PASSES):
            with operations_jittered(number, JITTER_ULPS):
                outputs.append(_run(single, inputs, torch.float32))
        sides = " x ".join(str(side) for side in next(iter(inputs.values())).shape[2:])
        factor = f", times {size.factor:g}" if size.factor != 1 else ""
        text = f"batch {size.batch}, {' x '.join(SIDES)} {sides}{factor}"
        calls.append(Call(text, inputs, tuple(Stop(None, output) for output in outputs)))
    return calls


def _run(module: torch.nn.Module, inputs: Arrays, dtype: torch.dtype) -> Array:
    import torch

    with torch.no_grad():
        output: Array = module(**tensors_of(inputs, dtype)).numpy()
    return output


# --- one target ----------------------------------------------------------------------------------------------------


def judged(target: str, calls: Sequence[Call], run: Run) -> Report:
    """Gates and rows of a target: each call, and what may stay behind between calls."""
    outputs = [only(run(call.inputs)) for call in calls]
    rows = [
        judge(target, call.text, call.stops, output, halved=False) for call, output in zip(calls, outputs, strict=True)
    ]
    nonfinite = sum(int(np.count_nonzero(~np.isfinite(output))) for output in outputs)
    gates = [
        _over_limit(f"{target}/segments", "the whole against the float64 module, within what rounding does", rows[:1]),
        _over_limit(f"{target}/calls", "other batches, sizes and magnitudes, by the same limit", rows[1:]),
        repeats_gate(target, calls, outputs, run),
        Gate(f"{target}/finite", nonfinite, 0, "values", "no NaN or Inf in any output"),
    ]
    return Report(gates=gates, segments=[max(rows, key=lambda row: np.nan_to_num(row.error, nan=np.inf))])


def _over_limit(name: str, why: str, rows: Sequence[SegmentResult]) -> Gate:
    worst = max(rows, key=lambda row: np.nan_to_num(row.error, nan=np.inf))
    cause = "" if worst.diagnosis is None else f": {worst.diagnosis}"
    return Gate(name, worst.error, 1, "x bound", f"{why}; worst in {worst.call}{cause}")


def repeats_gate(target: str, calls: Sequence[Call], outputs: Sequence[Array], run: Run) -> Gate:
    """Equal calls, after others, beside another in a second thread, and beside a sample of NaN."""
    why = "equal calls give equal numbers to the bit: after others, in two threads, and beside a sample of NaN"
    unequal = {"after others": _unequal(only(run(calls[0].inputs)), outputs[0])}
    with ThreadPoolExecutor(2) as threads:
        pairs = [(call, output) for call, output in zip(calls[:2], outputs[:2], strict=True)] * THREAD_ROUNDS
        again = [threads.submit(run, call.inputs) for call, _ in pairs]
        unequal["in two threads"] = sum(
            _unequal(only(one.result()), output) for one, (_, output) in zip(again, pairs, strict=True)
        )
    spoilt = {name: array.copy() for name, array in calls[1].inputs.items()}
    for array in spoilt.values():
        array[0] = np.nan
    beside = only(run(spoilt))
    unequal["beside a sample of NaN"] = _unequal(beside[1:], outputs[1][1:]) + int(np.isfinite(beside[:1]).any())
    wrong = next((text for text, count in unequal.items() if count), None)
    return Gate(f"{target}/repeats", sum(unequal.values()), 0, "numbers", why + (f"; first {wrong}" if wrong else ""))


def _unequal(output: Array, earlier: Array) -> int:
    """How many numbers differ in any bit; another shape differs everywhere."""
    if output.shape != earlier.shape:
        return max(output.size, 1)
    return int(np.count_nonzero(output.view(np.uint32) != earlier.view(np.uint32)))


def coverage_gate(target: str, model: LoadedModel, probed: ProbedGraph) -> Gate:
    """Every tensor of the half stands in the graph, number for number, as it is or turned."""
    tensors = {name: tensor.detach().numpy() for name, tensor in model.module.named_parameters()}
    missing = [name for name, tensor in tensors.items() if not (probed.holds(tensor) or probed.holds(tensor.T))]
    why = f"tensors of the {model.family.half} that stand in the graph number for number"
    why += f"; {missing[0]} does not: it was rounded, changed or left out" if missing else ""
    return Gate(f"{target}/coverage", len(tensors) - len(missing), len(tensors), "tensors", why, at_most=False)
