"""Every stretch of a graph between two quantized linears, alone: the float64 module on the engine's own tensors.

A pass of the PyTorch module stops at each quantized linear. There its input, which the module computed in float64 from
what the engine's earlier linears gave, is compared with the engine's own; then the pass goes on with the engine's
output. So no stretch sees the errors of the linears, or a flipped code, and each is judged by its own roundings.

At an attention that is quantized, whose codes flip as those of linears do, a pass stops as well: q, k, v and mask are
the ends of the stretches that lead to it, and the pass goes on with the engine's result (see attention_oracle).

The limit of a stretch is what rounding may do in it, measured on the same inputs: PASSES further ones in the
target's arithmetic, in which every operation rounds once by itself and moves its result by up to JITTER_ULPS more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from export.errors import ContractError
from export.formats.operands import HALF_MAX, HALF_ROUNDING, ROUNDING
from pipeline.backends.base import Arithmetic, Arrays, only
from pipeline.distance import Array
from pipeline.verify.attention_oracle import AttentionNumbers, AttentionProbe
from pipeline.verify.oracle import LinearProbe, ratio
from pipeline.verify.reference_hooks import ARITHMETICS, operations_jittered
from pipeline.verify.report import SegmentResult
from pipeline.verify.walk import AnyStop, AttentionStop, Stop, Walk, stopping_module, tensors_of

if TYPE_CHECKING:
    import torch

    from export.formats.attention import AttentionFormats
    from export.models.load import LoadedModel
    from export.models.torch_modules import Denoiser

# At most SUMS_SEED: no two generators of them have one seed.
PASSES = 4
# A runtime's operation is within two units in the last place of PyTorch's: exponentials, tanh and erf by polynomials,
# divisions by a product with a reciprocal, sums in another order over a few terms.
JITTER_ULPS = 2.0
# The limits are derived for a stretch of n operations, whose errors reach its result with factors a_i; |a|^2 is the sum
# of their squares, u = 2^-24. A pass: each operation's own rounding, uniform within u, and jitter, uniform within 2 u,
# of variances 1 / 3 and 4 / 3. So its result deviates by s = 1.29 |a| u. A right engine: each operation within 3 u, two
# units from PyTorch's, which rounds, and to no side. So it deviates by 3 |a| u = 2.32 s at most.
#
# The engine's error of a sample over that of the passes, root mean squares over all its numbers. Beyond 2.32 lie a
# factor of 1.7 for the few operations whose error a whole sample shares, and for the passes' own scatter.
LIMIT = 4.0
# The same of one token or channel, which may have one and the same error in all its numbers (of a modulation, of a
# token's scale). By Hoeffding's bound n independent errors within 3 u exceed 16 s = 20.7 |a| u with a probability below
# 2 exp(-20.7^2 / (2 * 3^2)) = 10^-10, and some 10^5 tokens and channels are judged: 10^-5 for one false alarm. What is
# not independent in real runtimes is measured: right engines of the bundled models stay below 0.54 of their limits, for
# the targets that stand in benchmarks/results/segment_margins.json.
PART_LIMIT = 16.0
# What all numbers of a sample have in common, a factor or an offset, over its standard deviation. Roundings have no
# side, so that the mean of n of them is 1 / sqrt(n) as large as one: coarse as FP16 is, a factor of 1.001 shows. There
# are some 10^4 such means, of which a normal one is beyond 8 deviations in 10^-15 of all cases.
SHARED_LIMIT = 8.0
# Besides, each of up to 32 operations in a row may err to one side by all that JITTER_ULPS allows.
SHARED_BIAS = 32 * JITTER_ULPS * ROUNDING
# Of a mask, numbers such as -10000 times 0 or 1: a conversion, a difference and a product, and one more.
MASK_ROUNDINGS = 4


class SegmentReference:
    """The passes of one model at one picture size; made once and used for every target and call.

    attention: the formats in which it is quantized, None for in float. attentions: by name, in the order in which the
    module calls them, known when `order` is; none in float.
    """

    def __init__(self, model: LoadedModel, cells: tuple[int, int], attention: AttentionFormats | None = None) -> None:
        import torch

        from export.models.torch_modules import set_resolution

        def module(dtype: torch.dtype) -> Denoiser:
            stopping = stopping_module(model, dtype)
            set_resolution(stopping, *cells)
            return stopping

        self._types = torch.float64, torch.float32
        self._exact = module(self._types[0])
        # One for each arithmetic, whose hooks are on its parts: targets may be judged at the same time.
        self._single = {arithmetic: module(self._types[1]) for arithmetic in ARITHMETICS}
        self.layers = tuple(ref.name for ref in model.linears())
        self._formats = attention
        self.attentions: dict[str, AttentionNumbers] = {}
        self._order: tuple[str, ...] = ()

    def order(self, inputs: Arrays) -> tuple[str, ...]:
        """The linears, and the attentions that are quantized, in the order in which the module calls them;
        ContractError if it calls a linear twice or never."""
        if not self._order:
            stops_at_attentions = self._formats is not None
            walk = Walk(
                self._single["fp32"], tensors_of(inputs, self._types[1]), nullcontext, attentions=stops_at_attentions
            )
            order, visited, stop = list[str](), list[str](), walk.start()
            while stop.layer is not None:
                order.append(stop.layer)
                if isinstance(stop, AttentionStop):
                    assert self._formats is not None
                    numbers = AttentionNumbers(self._formats.qk, self._formats.pv, stop.scale)
                    self.attentions[stop.layer] = numbers
                else:
                    visited.append(stop.layer)
                stop = walk.go_on(None)
            if sorted(visited) != sorted(self.layers):
                odd = sorted(set(self.layers) ^ set(visited)) or sorted({x for x in visited if visited.count(x) > 1})
                times = f"the model calls it {visited.count(odd[0])} times in a step, a quantized linear is called once"
                raise ContractError(
                    f"{odd[0]}: {times}; keep it unquantized, in its family's row of export/models/families.py"
                )
            self._order = tuple(order)
        return self._order

    def walks(self, inputs: Arrays, arithmetic: Arithmetic) -> list[Walk]:
        """One exact pass and PASSES in `arithmetic` with jitter."""
        exact, single = (tensors_of(inputs, dtype) for dtype in self._types)
        module = self._single[arithmetic]
        stops = self._formats is not None
        jittered = [Walk(module, single, partial(self._jittered, arithmetic, seed), stops) for seed in range(PASSES)]
        return [Walk(self._exact, exact, nullcontext, stops), *jittered]

    @contextmanager
    def _jittered(self, arithmetic: Arithmetic, seed: int) -> Iterator[None]:
        with ARITHMETICS[arithmetic].context(self._single[arithmetic]), operations_jittered(seed, JITTER_ULPS):
            yield


class SegmentCheck:
    """The stretches of one lowered graph in several calls at once, judged in the order of computation.

    Told of every quantized linear and attention in `SegmentReference.order`, then of the outputs; a context manager.
    """

    def __init__(
        self, target: str, reference: SegmentReference, calls: Mapping[str, Arrays], arithmetic: Arithmetic
    ) -> None:
        self._target, self._halved = target, arithmetic != "fp32"
        self._walks = {text: reference.walks(inputs, arithmetic) for text, inputs in calls.items()}
        self._stops: dict[str, list[AnyStop]] = {}
        self.results: list[SegmentResult] = []
        self._read: list[Array] = []  # what was judged last, which is kept so that its memory is not used again

    def __enter__(self) -> SegmentCheck:
        self._stops = {text: [walk.start() for walk in walks] for text, walks in self._walks.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for walk in (walk for walks in self._walks.values() for walk in walks):
            walk.abandon()

    def at(self, layer: str, probes: Sequence[LinearProbe]) -> None:
        """Judge the stretch before a quantized linear by what it computed in each call, and go on behind it."""
        self._judge(layer, [probe.x for probe in probes])
        for (text, walks), probe in zip(self._walks.items(), probes, strict=True):
            self._stops[text] = [walk.go_on(probe.output) for walk in walks]

    def at_attention(self, layer: str, probes: Sequence[AttentionProbe]) -> None:
        """Judge the stretches before a quantized attention by its inputs in each call, and go on with its result."""
        for part in ("q", "k", "v"):
            rows = []
            for (text, stops), probe in zip(self._stops.items(), probes, strict=True):
                ends = [Stop(f"{layer} ({part})", _tokens(getattr(stop, part))) for stop in _at(stops, layer)]
                rows.append(judge(self._target, text, ends, _tokens(getattr(probe, part)), self._halved))
            self.results.append(max(rows, key=lambda row: row.error))
        masks = [
            judge_mask(self._target, text, _at(stops, layer)[0], probe.mask)
            for (text, stops), probe in zip(self._stops.items(), probes, strict=True)
        ]
        self.results.append(max(masks, key=lambda row: row.error))
        self._read = [tensor for probe in probes for tensor in (probe.q, probe.k, probe.v)]
        for (text, walks), probe in zip(self._walks.items(), probes, strict=True):
            self._stops[text] = [walk.go_on(probe.output) for walk in walks]

    def end(self, outputs: Sequence[Arrays]) -> None:
        """Judge the last stretches, one for each output, by the model's outputs in each call."""
        several = len(outputs[0]) > 1
        for place in range(len(outputs[0])):
            if place:
                self._stops = {text: [walk.next() for walk in walks] for text, walks in self._walks.items()}
            (name,) = {stop.output for stops in self._stops.values() for stop in stops if isinstance(stop, Stop)}
            self._judge(None, [of_call[str(name)] if several else only(of_call) for of_call in outputs])
            self.results[-1] = replace(self.results[-1], output=name if several else None)

    def _judge(self, layer: str | None, tensors: Sequence[Array]) -> None:
        linears = {text: [stop for stop in stops if isinstance(stop, Stop)] for text, stops in self._stops.items()}
        read = [*tensors, *(stop.x for stops in linears.values() for stop in stops)]
        if self.results and all(map(_same_memory, read, self._read)):  # q, k and v read one tensor after the other
            self.results.append(replace(self.results[-1], layer=layer))
            return
        self._read, rows = read, list[SegmentResult]()
        for (text, stops), tensor in zip(linears.items(), tensors, strict=True):
            stands_at = {stop.layer for stop in self._stops[text]}
            assert stands_at == {layer} == {stop.layer for stop in stops}, f"the module stands at {stands_at}"
            rows.append(judge(self._target, text, stops, tensor, self._halved))
        self.results.append(max(rows, key=lambda row: row.error))


def _at(stops: Sequence[AnyStop], layer: str) -> list[AttentionStop]:
    attentions = [stop for stop in stops if isinstance(stop, AttentionStop) and stop.layer == layer]
    assert len(attentions) == len(stops), f"the module stands at {stops[0].layer}, not at {layer}"
    return attentions


def _tokens(heads: Array) -> Array:
    """[B, H, T, D] -> [B, T, H * D]."""
    samples, _, tokens, _ = heads.shape
    return heads.transpose(0, 2, 1, 3).reshape(samples, tokens, -1)


def _same_memory(one: Array, other: Array) -> bool:
    return one.shape == other.shape and one.__array_interface__["data"] == other.__array_interface__["data"]


# --- one stretch ----------------------------------------------------------------------------------------------------


def judge(target: str, call: str, stops: Sequence[Stop], output: Array, halved: bool) -> SegmentResult:
    """Compare the engine's `output` of a stretch with the exact pass, by the spread of the others."""
    layer, shape = stops[0].layer, stops[0].x.shape
    if output.size != stops[0].x.size:
        text = f"its shape is {output.shape}, the module's {shape}"
        return SegmentResult(target, layer, call, np.inf, 0.0, text)
    errors, shared, powers = list[float](), list[float](), list[tuple[float, float]]()
    for sample in range(shape[0]):  # whose arrays stay in the processor's caches
        exact, difference, *passes = _of_sample(sample, stops, output)
        noise = np.stack(passes)
        if not (np.isfinite(difference).all() and np.isfinite(noise).all()):  # of the engine, or of a run in its types
            text = _nonfinite(stops[0].x, halved)
            return SegmentResult(target, layer, call, np.inf, 0.0, text)
        shared.append(float(shared_over_limits(exact, difference, noise).max()))
        errors.append(max(float(errors_over_limits(exact, difference, noise).max()), shared[-1]))
        powers.append((float(np.mean(np.square(noise))), float(np.mean(np.square(exact)))))
    error = max(errors)
    of_noise, of_exact = np.sqrt(np.mean(powers, axis=0))
    ulps = of_noise / max(of_exact, np.finfo(float).tiny) / ROUNDING
    diagnosis = None
    if error > 1:
        whole = _by_sample(stops[0].x)
        diagnosis = diagnose(whole, _by_sample(output.reshape(shape)) - whole, max(shared) > 1)
    return SegmentResult(target, layer, call, error, float(ulps), diagnosis)


def judge_mask(target: str, call: str, stop: AttentionStop, mask: Array) -> SegmentResult:
    """Compare an engine's mask with the exact pass's, number by number as they stand beside the scores: it is made of
    few operations on zeros and ones, whose roundings are counted."""
    layer = f"{stop.layer} (mask)"
    exact = np.zeros((1, 1, 1, 1)) if stop.mask is None else np.asarray(stop.mask, np.float64)
    scores = (*stop.q.shape[:-1], stop.k.shape[2])
    try:
        shape = np.broadcast_shapes(exact.shape, mask.shape)
        of_scores = np.broadcast_shapes(shape, scores) == scores
    except ValueError:
        of_scores = False
    if not of_scores:
        return SegmentResult(target, layer, call, np.inf, 0.0, f"its shape is {mask.shape}, the module's {exact.shape}")
    expected, given = np.broadcast_to(exact, shape), np.broadcast_to(mask, shape)
    same = expected == given  # infinities, too
    with np.errstate(invalid="ignore"):
        errors = ratio(np.abs(given - expected), MASK_ROUNDINGS * ROUNDING * np.abs(expected))
    errors = np.where(same, 0.0, np.nan_to_num(errors, nan=np.inf, posinf=np.inf))
    error = float(errors.max(initial=0))
    wrong = np.count_nonzero(errors > 1)
    text = f"{wrong} of {errors.size} numbers of the mask differ: it is another sample's, of other tokens, or weaker"
    return SegmentResult(target, layer, call, error, 0.0, text if wrong else None)


def _of_sample(sample: int, stops: Sequence[Stop], output: Array) -> list[Array]:
    """Of one sample [1, rows, channels]: what the exact pass gives, and how far the engine's result and those of the
    other passes are from it."""
    shape = stops[0].x.shape
    arrays = (stops[0].x, output.reshape(shape), *(stop.x for stop in stops[1:]))
    exact, engine, *passes = (_by_sample(array[sample : sample + 1]) for array in arrays)
    return [exact, engine - exact, *(one - exact for one in passes)]


def _by_sample(tensor: Array) -> Array:
    """[B, rows, channels] float64, of tokens [B, ..., K] or a picture [B, C, H, W]."""
    array = np.asarray(tensor, np.float64)
    if array.ndim == 4:
        return array.reshape(*array.shape[:2], -1).swapaxes(1, 2)
    return array.reshape(len(array), -1, array.shape[-1])


def errors_over_limits(exact: Array, difference: Array, noise: Array) -> Array:
    """[B]: the largest of a sample's errors over their limits: of the whole sample, of each row, of each column.

    exact, difference: [B, rows, K]; noise: [runs, B, rows, K]. The noise of a row or column is its own, the whole
    sample's, or the whole sample's relative noise for numbers of its size, whichever is most: a few passes may meet by
    chance.
    """
    squares = np.square(exact), np.square(difference), np.einsum("rbij,rbij->bij", noise, noise) / len(noise)
    whole, whole_difference, whole_noise = (np.sqrt(np.mean(square, (1, 2))) for square in squares)  # [B]
    ratios = [ratio(whole_difference, whole_noise) / LIMIT]
    for axis in (1, 2):  # columns, rows
        of_exact, of_difference, of_noise = (np.sqrt(np.mean(square, axis)) for square in squares)
        of_size = ratio(whole_noise, whole)[:, None] * np.maximum(of_exact, whole[:, None])
        ratios.append(ratio(of_difference, np.maximum(of_noise, of_size)).max(axis=1) / PART_LIMIT)
    largest: Array = np.max(ratios, axis=0)
    return largest


def shared_over_limits(exact: Array, difference: Array, noise: Array) -> Array:
    """[2, B]: the factor and the offset that all numbers of a sample have in common, each over its limit.

    Arguments as above. A rounding may be shared by all numbers of a token (its scale) or of a channel (a modulation),
    so that rows or columns, whichever are fewer, count as independent; what a sample shares shows in the passes.
    """
    whole, power = _rms(exact, (1, 2)), np.mean(np.square(exact), (1, 2))  # [B]
    deviation = ratio(_rms(noise, (0, 2, 3)), whole) / np.sqrt(min(exact.shape[1:]))
    sums = np.mean(exact * difference, (1, 2)), np.mean(difference, (1, 2))
    of_passes = np.einsum("bij,rbij->rb", exact, noise) / exact[0].size, np.mean(noise, (2, 3))  # [runs, B]
    errors = []
    for value, passes, unit in zip(sums, of_passes, (power, whole), strict=True):
        spread = np.maximum(ratio(_rms(passes, 0), unit), deviation)
        errors.append(ratio(ratio(np.abs(value), unit), SHARED_LIMIT * spread + SHARED_BIAS))
    return np.stack(errors)


def _rms(values: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    return np.sqrt(np.mean(np.square(values), axis=axis))


def _nonfinite(exact: Array, halved: bool) -> str:
    largest = float(np.abs(exact[np.isfinite(exact)]).max(initial=0))
    if halved and largest > HALF_MAX:
        return f"FP16 overflow: numbers up to {largest:.3g} here, FP16 holds {HALF_MAX:g}"
    return "FP16 overflow inside the stretch" if halved else "NaN or Inf, where the module's numbers are finite"


def diagnose(exact: Array, difference: Array, shared: bool = False) -> str:
    """What is likely wrong, from the pattern of the error; exact, difference: [B, rows, K]. shared: is there more of a
    factor or an offset than rounding leaves?"""
    power, tiny = np.square(difference), np.finfo(float).tiny
    deviation, whole = float(_rms(difference)), max(float(_rms(exact)), tiny)
    relative = deviation / whole
    size = f"off by {relative:.1e}"
    for axes, slices in (((1, 2), "samples"), ((0, 1), "channels"), ((0, 2), "tokens")):
        share = power.sum(axes) / max(power.sum(), tiny)
        few = np.flatnonzero(share > 0.5 / len(share))
        most = len(share) - 1 if slices == "samples" else len(share) // 8
        if len(few) <= most and share[few].sum() > 0.99:
            listed = ", ".join(map(str, few[:6])) + (", ..." if len(few) > 6 else "")
            return f"{size}, only in {slices} {listed} of {len(share)}: {CAUSES[slices]}"
    scale = float((exact * difference).sum() / max(np.square(exact).sum(), tiny))
    if _rms(difference - scale * exact) < 0.05 * deviation:
        return f"all numbers times {1 + scale:.6g}: a factor is wrong"
    offset = float(difference.mean()) / whole
    # Beside a shared factor or offset, numbers are as far off as rounding has it.
    if shared and max(abs(scale), abs(offset)) > relative / 10:
        shift = f"times {1 + scale:.4g}" if abs(scale) > abs(offset) else f"moved by {offset:.1e} of their size"
        return f"all numbers {shift} and rounded: a factor, scale or bias is wrong"
    if HALF_ROUNDING / 8 < relative < HALF_ROUNDING:
        return f"{size}, as much as rounding to FP16 gives"
    return f"{size} in all samples, channels and tokens: an activation function, scale, epsilon, mask or order differs"


CAUSES = {
    "samples": "what differs between samples (mask, timestep, condition, batch size) is used wrongly",
    "channels": "a bias, a table or a row of a kept weight differs",
    "tokens": "a position table, mask or order of tokens differs",
}
