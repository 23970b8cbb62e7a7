"""The gates of one half of an autoencoder, of which no layer is quantized: against its float64 module, in stretches and
whole.

A stretch is what lies between the results of two blocks. A pass of the PyTorch module goes on behind each with what the
engine's graph has there, so that every stretch is judged by its own roundings, as those between quantized linears are
(segments.py, which has the limits). The whole is one stretch more: nothing amplifies rounding here as flipped codes do,
so that the engine itself, in calls of any size, is judged by the same limits from its input to its output.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.models.families import SIDES, pixels_per_latent
from pipeline.backends import BACKENDS
from pipeline.backends.base import Arrays, Engine, LoweredGraph, only
from pipeline.distance import Array
from pipeline.generate.case import Run
from pipeline.progress import raise_if_stopped, track
from pipeline.recipe import Recipe
from pipeline.verify.probe import ProbedGraph
from pipeline.verify.reference_hooks import operations_jittered
from pipeline.verify.report import Gate, Report, SegmentResult, write_layers_csv
from pipeline.verify.segments import JITTER_ULPS, PASSES, judge
from pipeline.verify.walk import Stop, tensors_of

if TYPE_CHECKING:
    import torch

    from export.models.load import LoadedModel
    from export.models.torch_modules import Denoiser

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


# The first is the usual one, in which stretches are judged. A tile at a picture's edge may be a single row of latents.
SIZES = (Size(1, 16, 12), Size(2, 8, 8), Size(3, 5, 9, LARGE_FACTOR), Size(1, 1, 7), Size(1, 24, 3))


@dataclass(frozen=True)
class Call:
    """A call and what the passes of the reference gave for the whole: first the exact one."""

    text: str
    inputs: Arrays
    stops: tuple[Stop, ...]


def verify_half(
    model: LoadedModel,
    lowered: Mapping[str, LoweredGraph],
    engines: Mapping[str, Engine],
    recipe: Recipe,
    out_dir: Path,
    notes: Sequence[str] = (),
) -> Report:
    """All gates of every target of `lowered`; one without an entry in `engines` is judged by its lowered graph.

    Writes the report's files into `out_dir`. notes: what the report says first.
    """
    from pipeline.verify.page import write_plain_page

    reference, report = Reference(model), Report(notes=list(notes))
    calls = [reference.call(seed, size) for seed, size in enumerate(track(SIZES, len(SIZES), "verify: reference"))]
    for target, graph in lowered.items():
        probed, engine = ProbedGraph(graph), engines.get(target)
        if engine is None:
            report.notes.append(f"{target}: {BACKENDS[target].not_run_note(graph)}")
        report.gates.append(coverage_gate(target, model, probed))
        stretches = reference.stretches(target, probed, calls[0])
        report.segments += stretches
        report.gates.append(bound_gate(f"{target}/segments", "stretches between the results of blocks", stretches))
        report.gates += whole_gates(target, calls, engine.run if engine else probed.denoiser())
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "parity.json").write_text(report.to_json(), encoding="utf-8")
    write_layers_csv(report, out_dir / "layers.csv")
    write_plain_page(report, model, recipe, out_dir)
    for gate in report.failures():
        logger.error("gate %s: %g %s, limit %g; %s", gate.name, gate.value, gate.unit, gate.limit, gate.why)
    return report


# --- the reference -------------------------------------------------------------------------------------------------


class Reference:
    """The float64 module of a half, and the float32 one, PASSES runs of which with jitter give the limits."""

    def __init__(self, model: LoadedModel) -> None:
        import torch

        from pipeline.backends.reference import reference_module

        self.model = model
        self._types = torch.float64, torch.float32
        self._exact, self._single = (reference_module(model, {}, dtype) for dtype in self._types)

    def call(self, seed: int, size: Size) -> Call:
        """The whole for one of SIZES."""
        inputs = make_inputs(self.model, size, seed)
        sides = " x ".join(str(side) for side in only(inputs).shape[2:])
        factor = f", times {size.factor:g}" if size.factor != 1 else ""
        text = f"batch {size.batch}, {' x '.join(SIDES)} {sides}{factor}"
        return Call(text, inputs, tuple(stops[-1] for stops in self._passes(inputs, None)))

    def stretches(self, target: str, probed: ProbedGraph, call: Call) -> list[SegmentResult]:
        """Each stretch of a target's graph in one call, in the order of computation, the one up to the output last.

        The first that the graph has no tensor for is an infinite error.
        """
        names = [stop.layer for stop in self._pass(self._exact, call.inputs, None)]
        tensors = {name: f"{name}/output" for name in names if name is not None}
        if missing := next((name for name, tensor in tensors.items() if tensor not in probed.produced), None):
            return [SegmentResult(target, missing, call.text, np.inf, 0.0, f"the graph has no {tensors[missing]}")]
        (output,) = self.model.family.outputs
        computed = probed.cut([*tensors.values(), output], {})(call.inputs)
        own = {name: computed[tensor] for name, tensor in tensors.items()}
        every = zip(*self._passes(call.inputs, own), strict=True)
        return [
            judge(target, call.text, stops, computed[output] if stops[0].layer is None else own[stops[0].layer], False)
            for stops in every
        ]

    def _passes(self, inputs: Arrays, own: Arrays | None) -> list[list[Stop]]:
        """The exact pass and those with jitter; see `_pass`."""
        passes = [self._pass(self._exact, inputs, own)]
        for seed in range(PASSES):
            passes.append(self._pass(self._single, inputs, own, seed))
        return passes

    def _pass(self, module: Denoiser, inputs: Arrays, own: Arrays | None, seed: int | None = None) -> list[Stop]:
        """What a module computes up to each end of a stretch, and its output. own: the engine's tensors by the end's
        name, with which the pass goes on behind it; None: with what the module computed itself."""
        import torch

        from export.models.autoencoder_modules import stretch_ends

        stops, dtype = list[Stop](), self._types[seed is not None]

        def at(name: str, _module: object, _inputs: object, result: torch.Tensor) -> torch.Tensor:
            raise_if_stopped()
            stops.append(Stop(name, result.numpy()))
            return result if own is None else torch.from_numpy(own[name]).to(dtype)

        with ExitStack() as stack:
            for name, part in stretch_ends(module.transformer).items():
                stack.callback(part.register_forward_hook(partial(at, name)).remove)
            stack.enter_context(torch.no_grad())
            stack.enter_context(nullcontext() if seed is None else operations_jittered(seed, JITTER_ULPS))
            output = module(**tensors_of(inputs, dtype))
        return [*stops, Stop(None, output.numpy())]


def make_inputs(model: LoadedModel, size: Size, seed: int) -> Arrays:
    """The input of a call, float32 [batch, C, ...]."""
    from export.models.load import sample_inputs

    unit = pixels_per_latent(model.config)
    inputs = sample_inputs(model, size.batch, seed, size.height * unit, size.width * unit)
    return {name: (array * size.factor).astype(array.dtype) for name, array in inputs.items()}


# --- one target ----------------------------------------------------------------------------------------------------


def whole_gates(target: str, calls: Sequence[Call], run: Run) -> list[Gate]:
    """Every call from its input to its output, and what may stay behind between calls."""
    outputs = [only(run(call.inputs)) for call in calls]
    pairs = zip(calls, outputs, strict=True)
    rows = [judge(target, call.text, call.stops, output, halved=False) for call, output in pairs]
    nonfinite = sum(int(np.count_nonzero(~np.isfinite(output))) for output in outputs)
    return [
        bound_gate(f"{target}/calls", "the whole, in several batches, sizes and magnitudes", rows),
        repeats_gate(target, calls, outputs, run),
        Gate(f"{target}/finite", nonfinite, 0, "values", "no NaN or Inf in any output"),
    ]


def bound_gate(name: str, what: str, rows: Sequence[SegmentResult]) -> Gate:
    """The worst row; of those over their limit the first is named, whose error others may have inherited."""
    worst = max(rows, key=lambda row: row.error)
    wrong = next((row for row in rows if not row.error <= 1), None)
    why = f"{what}, against the float64 module within what rounding does"
    if wrong is not None:
        why += f"; first over its limit: up to {wrong.layer or 'the output'}, in {wrong.call}: {wrong.diagnosis}"
    return Gate(name, worst.error, 1, "x bound", why)


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
