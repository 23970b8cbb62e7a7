"""What an engine is measured against: pictures, steps and layer inputs of the reference in float64, and how far the
reference's own float32 runs and the float model are from them.

Rounding makes a float32 run flip a code wherever a quantizer's input lies within rounding error of a midpoint, and a
flip changes everything after it. So the tolerance is measured, not set: REALISATIONS float32 runs of the reference,
each with its quantizers' inputs moved at random by up to QUANTIZER_ULPS, are equally right ways of computing one model.
A target that computes parts in FP16 is measured against float32 runs that round the same parts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from export.checkpoint import QuantizedLinear
from pipeline import machine
from pipeline.backends.base import Arithmetic, Arrays, only
from pipeline.backends.mapped_pages import give_back_weights
from pipeline.backends.side_by_side import side_by_side
from pipeline.distance import Array, ratio_db, sqnr_db
from pipeline.generate.case import AnyCase, Case, Run, TextCase, is_large, make_case
from pipeline.progress import track
from pipeline.recipe import Recipe
from pipeline.verify.call_patterns import Setting
from pipeline.verify.calls import Call, SampleError, make_calls, make_pools, nan_reach, sample_errors
from pipeline.verify.in_step import in_step
from pipeline.verify.oracle import row_blocks, unit_of
from pipeline.verify.reference_hooks import ARITHMETICS, Comparison, Recorder, hooked, jittered
from pipeline.verify.segments import SegmentReference

if TYPE_CHECKING:
    import torch

    from export.models.load import LoadedModel

T = TypeVar("T")
# Float32 runs of the reference: until ENOUGH_SAMPLES samples are seen, at most REALISATIONS. A large model gets one,
# which has thousands of flips.
REALISATIONS, ENOUGH_SAMPLES = 2, 100
# Runs of a large model at the same time: each holds a byte for every weight.
RUNS_AT_ONCE = 2
# Between two quantizers lie about ten float32 operations, each rounding once and in an order of the runtime's choice:
# inputs of two correct runs differ by a few units in the last place.
QUANTIZER_ULPS = 2.0
# Flips are rare in small models: some samples have none, and what one flip does varies widely. For limits on the worst
# sample the jitter grows until most samples are hit (their SQNR is below what float operations alone leave).
HITTING_ULPS = (8.0, 32.0, 128.0, 512.0)
HIT_DB, HIT_SHARE = 100.0, 0.75


@dataclass(frozen=True)
class StepErrors:
    """A denoiser against the float64 reference on every step's inputs: SQNR in dB of each step; how many output values
    are not finite; each sample of each step (prompted and unprompted, [n_steps * batch])."""

    steps_db: list[float]
    nonfinite: int
    samples: list[SampleError]


@dataclass
class Realisations:
    """Float32 runs of the reference in one arithmetic.

    errors: of the plain runs; layer_db: by layer the worst run's SQNR of its input in the probed steps. hit_errors,
    hit_pictures, hit_calls_db: of runs in which flips hit most samples (the plain ones where they do), the last the
    SQNR of every sample of the pools of calls.
    """

    errors: list[StepErrors] = field(default_factory=list)
    layer_db: dict[str, float] = field(default_factory=dict)
    hit_errors: list[StepErrors] = field(default_factory=list)
    hit_pictures: list[Array] = field(default_factory=list)
    hit_calls_db: list[float] = field(default_factory=list)


@dataclass
class Study:
    """Results of the reference. Steps run on the same inputs `calls`, the float64 reference's trajectory.

    exact, plain: outputs of the float64 reference and of the float model per step. pictures: the final ones of the runs
    "reference" and "float". float32: the reference's float32 runs by arithmetic. probed: the steps whose
    layers are looked at; layer_inputs: float64 reference's input of each linear in them, [rows, K] float32.
    pools: samples of calls that drawing does not make (pipeline.verify.calls), pool_exact and pool_plain: the float64
    reference's and the float model's outputs for them. nan_reach: see calls.nan_reach, of the float64 reference.
    stretches: what segments are compared with. counted: see Family. units: of a model with several outputs, by name the
    root mean square of each in the float64 reference's steps, in which they are judged as one. weight_read: called when
    a weight of the float model has been read.
    """

    case: AnyCase
    counted: str | None = None
    calls: list[Arrays] = field(default_factory=list)
    exact: list[Array] = field(default_factory=list)
    plain: list[Array] = field(default_factory=list)
    pictures: dict[str, Array] = field(default_factory=dict)
    float32: dict[Arithmetic, Realisations] = field(default_factory=dict)
    probed: tuple[int, ...] = ()
    layer_inputs: dict[str, list[NDArray[np.float32]]] = field(default_factory=dict)
    pools: dict[str, Arrays] = field(default_factory=dict)
    pool_exact: dict[str, Array] = field(default_factory=dict)
    pool_plain: dict[str, Array] = field(default_factory=dict)
    nan_reach: NDArray[np.bool_] = field(default_factory=lambda: np.ones(0, bool))
    special_calls: list[Call] = field(default_factory=list)
    stretches: SegmentReference | None = None
    units: Mapping[str, float] = field(default_factory=dict)
    weight_read: Callable[[], None] = lambda: None
    _weights_db: dict[str, float] = field(default_factory=dict)

    def judged(self, run: Run) -> Run:
        """`run` with zeros in the rows of its output that are of no prompt, of a model that has such, and with several
        outputs as one, in which each counts alike."""
        counted = self.counted
        if counted is None:
            return run

        def counting(inputs: Arrays) -> Arrays:
            rows, outputs = inputs[counted].astype(bool)[..., None], run(inputs)
            if self.units:
                outputs = joined(outputs, self.units, rows.shape[1])
            fitting = {name: output for name, output in outputs.items() if output.shape[:-1] == rows.shape[:-1]}
            # Another shape fails by itself.
            return outputs | {name: np.where(rows, output, output.dtype.type(0)) for name, output in fitting.items()}

        return counting

    def weight_db(self, layer: QuantizedLinear, linear: torch.nn.Linear) -> float:
        """SQNR of a layer's quantized weight, which is the same in every target."""
        if layer.name not in self._weights_db:
            self._weights_db[layer.name] = weight_sqnr_db(layer, linear.weight)
            self.weight_read()
        return self._weights_db[layer.name]

    def input_db(self, layer: str, inputs: Mapping[int, Array]) -> float:
        """SQNR of a layer's inputs by step, all together; nan where other shapes were recorded, or none."""
        recorded = dict(zip(self.probed, self.layer_inputs.get(layer, ()), strict=False))
        expected = [recorded[step] for step in inputs if step in recorded]
        if [array.shape for array in expected] != [array.shape for array in inputs.values()]:
            return float("nan")
        return sqnr_db(np.concatenate(expected), np.concatenate(list(inputs.values())))

    @property
    def calls_quant_db(self) -> list[float]:
        """Reference against float model, every sample of the pools."""
        return _samples_db(self.pool_plain, self.pool_exact)

    def pools_db(self, run: Run) -> list[float]:
        """A denoiser against the float64 reference, every sample of the pools."""
        return _samples_db(self.pool_exact, {name: only(run(inputs)) for name, inputs in self.pools.items()})

    @property
    def quant_db(self) -> list[float]:
        """Reference against float model, per step."""
        pairs = zip(self.plain, self.exact, strict=True)
        return [sqnr_db(self.case.shown(plain), self.case.shown(exact)) for plain, exact in pairs]

    def errors(
        self, run: Run, steps: Sequence[int] = (), label: str = "verify: steps", first: Arrays | None = None
    ) -> StepErrors:
        """Run a denoiser on the inputs of every step, or of `steps` alone. first: its outputs in the first of them,
        where they are known."""
        steps = steps or range(len(self.calls))
        run_steps = steps if first is None else steps[1:]
        outputs = [only(run(self.calls[i])) for i in track(run_steps, len(run_steps), label)]
        outputs = [self.case.shown(output) for output in ([] if first is None else [only(first)]) + outputs]
        pairs = [(self.case.shown(self.exact[i]), output) for i, output in zip(steps, outputs, strict=True)]
        samples = [error for i, pair in zip(steps, pairs, strict=True) for error in self._sample_errors(i, *pair)]
        return StepErrors(
            [sqnr_db(exact, output) for exact, output in pairs],
            sum(int(np.count_nonzero(~np.isfinite(output))) for output in outputs),
            samples,
        )

    def _sample_errors(self, step: int, exact: Array, output: Array) -> list[SampleError]:
        batch = len(exact)
        guided = isinstance(self.case, Case) and batch == 2 * len(self.case.noise)
        settings = ((Setting.PROMPTED,) * (batch // 2) + (Setting.UNPROMPTED,) * (batch // 2)) if guided else None
        text = f"step {step + 1}"
        return sample_errors(Call(text, text, tuple(range(batch)), self.calls[step], settings), {text: exact}, output)


def joined(outputs: Arrays, units: Mapping[str, float], tokens: int) -> Arrays:
    """Outputs [B, tokens, C], or one row [B, C] which stands for every token then, side by side in their units. The
    first alone where they do not fit together, of no shape that is expected."""
    parts = []
    if set(outputs) != set(units):
        return dict(list(outputs.items())[:1])
    for name, unit in units.items():
        output = outputs[name]
        part = output if output.ndim == 3 else np.broadcast_to(output[:, None], (len(output), tokens, output.shape[-1]))
        parts.append(part / output.dtype.type(unit))
    if len({part.shape[:2] for part in parts}) > 1:
        return dict(list(outputs.items())[:1])
    return {"outputs": np.concatenate(parts, axis=-1)}


def units_of(outputs: Arrays, counted: NDArray[np.generic]) -> dict[str, float]:
    """Root mean square of each output, over the rows of prompts where it has rows of tokens."""
    rows = counted.astype(bool)
    values = {name: output[rows] if output.ndim == 3 else output for name, output in outputs.items()}
    return {name: float(np.sqrt(np.mean(np.square(value)))) for name, value in values.items()}


def study(
    model: LoadedModel,
    layers: Sequence[QuantizedLinear],
    recipe: Recipe,
    arithmetics: Collection[Arithmetic] = frozenset({"fp32"}),
    threads: int | None = None,
    pictures: int = 0,
) -> Study:
    """Run the float64 reference, then float32 realisations and the float model side by side, of a large model
    RUNS_AT_ONCE at a time.

    arithmetics: "fp32", or "fp16" for parts in FP16, as the targets under test have it. pictures: as of `make_case`.
    """
    import torch

    from export.models.torch_modules import Denoiser, set_resolution, with_modules
    from pipeline.backends.reference import fake_quant, keeps_integers

    def passes(module: torch.nn.Module, dtype: torch.dtype, arithmetic: Arithmetic = "fp32") -> Passes:
        set_resolution(module, *reference.case.cells)
        # What changes functions of PyTorch does so in its own thread alone.
        plain = ARITHMETICS[arithmetic].context is nullcontext
        return Passes(module, dtype, reference, together=plain and not keeps_integers(model))

    attention = recipe.attention.formats
    reference = Study(make_case(model, recipe, pictures), model.family.counted)
    if is_large(model):
        reference.weight_read = partial(give_back_weights, model)
    reference.pools = make_pools(model, reference.case)
    reference.special_calls = make_calls(model, reference.pools)
    reference.stretches = SegmentReference(model, reference.case.cells, attention)
    reference.probed = tuple(sorted({0, reference.case.n_steps - 1}))
    exact = passes(fake_quant(model, layers, torch.float64, attention), torch.float64)
    if len(model.family.outputs) > 1:
        assert isinstance(reference.case, TextCase) and reference.counted is not None
        reference.units = units_of(exact.run(reference.case.call), reference.case.call[reference.counted])
    _run_exact(reference, exact)

    def realise(arithmetic: Arithmetic) -> None:
        single = passes(fake_quant(model, layers, torch.float32, attention), torch.float32, arithmetic)
        with ARITHMETICS[arithmetic].context(single.module):
            reference.float32[arithmetic] = _realisations(
                reference, single, 1 if is_large(model) else REALISATIONS, f"verify: steps in {arithmetic}"
            )

    def run_float() -> None:
        names = tuple(row.name for row in model.inputs)
        _run_float(reference, passes(Denoiser(with_modules(model.module, {}), model.family, names), torch.float32))

    runs: list[Callable[[], None]] = [partial(realise, arithmetic) for arithmetic in sorted(set(arithmetics))]
    runs.append(run_float)
    threads = machine.threads(threads)
    side_by_side(runs, min(threads, RUNS_AT_ONCE) if is_large(model) else threads)
    return reference


class Passes:
    """Runs of one module, a pass for each call. Of a large model, whose weights are unpacked at every call, they go in
    step.

    run: makes a call, and counts in its output what the model counts.
    """

    def __init__(self, module: torch.nn.Module, dtype: torch.dtype, study: Study, together: bool) -> None:
        from export.models.torch_modules import UpcastLinear
        from pipeline.backends.reference import FakeQuantLinear, ReferenceEngine

        self.module = module
        # One thread at a time calls it, or several in step.
        self.run = study.judged(ReferenceEngine(module, dtype, locked=False).run)
        self._weight_read = study.weight_read
        linears = [part for part in module.modules() if isinstance(part, FakeQuantLinear | UpcastLinear)]
        # A low-rank branch is chosen for the samples of one call.
        routed = any(isinstance(part, FakeQuantLinear) and part.routing is not None for part in linears)
        self._linears = linears if together and not routed else []

    def all(self, functions: Sequence[Callable[[], T]]) -> list[T]:
        """The results of functions that call `run`."""
        if not self._linears:
            return [function() for function in functions]
        return in_step(self._linears, functions, self._weight_read)


def _run_exact(study: Study, passes: Passes) -> None:
    """The trajectory in float64; x_t is rounded to float32 at every step, so that all runs get the same inputs."""

    def keep(i: int, inputs: Arrays, outputs: Arrays) -> None:
        study.calls.append(inputs)
        study.exact.append(only(outputs))

    def draw() -> None:
        study.pictures["reference"] = study.case.draw(_watched(passes.run, record, study.probed), keep)

    record = Recorder()
    with hooked(passes.module, record):
        _, *pools = passes.all([draw, *_of_pools(study, passes.run, record)])
    study.layer_inputs = record.inputs
    study.pool_exact = _by_pool(study, pools)
    if study.case.makes_pictures:
        study.nan_reach = nan_reach(passes.run, study.pools, study.case.shared)


def _of_pools(
    study: Study, run: Run, unseen: Recorder | Comparison | None = None
) -> list[Callable[[], NDArray[np.floating] | None]]:
    """Functions that give the outputs for each of the pools; their calls are not seen by `unseen`."""

    def output(inputs: Arrays) -> NDArray[np.floating]:
        if unseen is not None:
            unseen.switch.on = False
        return only(run(inputs))

    return [partial(output, inputs) for inputs in study.pools.values()]


def _by_pool(study: Study, outputs: Sequence[Array | None]) -> dict[str, Array]:
    arrays = dict[str, Array]()
    for name, output in zip(study.pools, outputs, strict=True):
        assert output is not None
        arrays[name] = output
    return arrays


def _watched(run: Run, record: Recorder | Comparison, probed: Sequence[int], first: int = 0) -> Run:
    """`run`, with the recorder or comparison switched on in the steps `probed`; its first call is the step `first`."""
    steps = count(first)

    def call(inputs: Arrays) -> Arrays:
        record.switch.on = next(steps) in probed
        return run(inputs)

    return call


def _drawn_and_compared(
    study: Study, run: Run, label: str, comparison: Comparison | None = None
) -> tuple[Array, StepErrors]:
    """Pictures along the denoiser's own way, and its errors along the reference's. Both begin with the same call, which
    is made once."""
    if comparison is None:
        alone, compared = run, run
    else:
        alone = _watched(run, comparison, study.probed[:1])
        compared = _watched(run, comparison, study.probed, first=1)
    pictures, first = _drawn(study, alone)
    return pictures, study.errors(compared, label=label, first=first)


def _drawn(study: Study, run: Run) -> tuple[Array, Arrays]:
    """Pictures along the denoiser's own way, and its outputs in the first call, which is the same on every way."""
    outputs: list[Arrays] = []
    pictures = study.case.draw(run, lambda step, inputs, output: outputs.append(output))
    return pictures, outputs[0]


def _realisations(study: Study, passes: Passes, runs: int, label: str) -> Realisations:
    single = Realisations()
    for seed in range(runs):
        if len(_samples(single.errors)) >= ENOUGH_SAMPLES:
            break
        comparison = Comparison(study.layer_inputs)

        def draw(comparison: Comparison = comparison) -> None:
            pictures, errors = _drawn_and_compared(study, passes.run, label, comparison)
            single.hit_pictures.append(pictures)
            single.errors.append(errors)

        with jittered(passes.module, seed, QUANTIZER_ULPS), hooked(passes.module, comparison):
            _, *pools = passes.all([draw, *_of_pools(study, passes.run, comparison)])
        single.hit_calls_db += _samples_db(study.pool_exact, _by_pool(study, pools))
        for name, value in comparison.sqnr_db.items():
            single.layer_db[name] = min(value, single.layer_db.get(name, np.inf))
    _add_hits(study, passes, single)
    return single


def _add_hits(study: Study, passes: Passes, single: Realisations) -> None:
    """Raise the jitter until flips hit most samples, of the steps and of the pools each, in place of the plain runs."""
    single.hit_errors, run = single.errors, passes.run
    for ulps in HITTING_ULPS:
        steps_hit, calls_hit = most_are_hit(_samples(single.hit_errors)), most_are_hit(single.hit_calls_db)
        with jittered(passes.module, len(single.errors), ulps):
            if not steps_hit:
                pictures, errors = _drawn_and_compared(study, run, "verify: steps")
                single.hit_errors, single.hit_pictures = [errors], [pictures]
            if not calls_hit:
                single.hit_calls_db = study.pools_db(run)


def weight_sqnr_db(layer: QuantizedLinear, weight: torch.Tensor) -> float:
    """SQNR of a quantized weight against `weight` [N, K], some rows at a time: of a large layer the whole would be many
    times what the processor's caches hold."""
    integers, scales = layer.integers(), layer.scales.astype(np.float64) * unit_of(layer.weight_format)
    signal = noise = 0.0
    for rows in row_blocks(*integers.shape):
        exact = weight[rows].detach().double().numpy()
        value = integers[rows].reshape(len(exact), scales.shape[1], -1) * scales[rows, :, None]
        signal += float(np.vdot(exact, exact))
        difference = value.reshape(exact.shape) - exact
        noise += float(np.vdot(difference, difference))
    return ratio_db(signal, noise)


def _samples_db(expected: dict[str, Array], actual: dict[str, Array]) -> list[float]:
    """Of all samples of all pools."""
    return [sqnr_db(*pair) for name in expected for pair in zip(expected[name], actual[name], strict=True)]


def _samples(errors: Sequence[StepErrors]) -> list[float]:
    return [sample.sqnr_db for run in errors for sample in run.samples]


def most_are_hit(samples_db: Sequence[float]) -> bool:
    """Do flips touch at least HIT_SHARE of all samples?"""
    return float(np.mean([value < HIT_DB for value in samples_db])) >= HIT_SHARE


def _run_float(study: Study, passes: Passes) -> None:
    def draw() -> None:
        study.pictures["float"], first = _drawn(study, passes.run)
        study.plain = [only(first), *(only(passes.run(call)) for call in study.calls[1:])]

    _, *pools = passes.all([draw, *_of_pools(study, passes.run)])
    study.pool_plain = _by_pool(study, pools)
