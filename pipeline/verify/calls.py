"""Calls that drawing a picture does not make: other batch sizes, caption lengths, masks, timesteps, latents, callers.

Samples of one batch do not see each other, so the reference computes each sample once, in pools by caption length, and
every call is a choice of rows from a pool.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Barrier, BrokenBarrierError
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from export.models.description import end_prompts
from pipeline.backends.base import Arrays, only
from pipeline.distance import Array, sqnr_db
from pipeline.generate.case import AnyCase, Case, Run, TextCase, is_large
from pipeline.generate.sampling import TRAIN_STEPS, make_sampler, take_samples
from pipeline.progress import ending_with, raise_if_stopped
from pipeline.signals import as_completed
from pipeline.verify.call_patterns import NO_TRAITS, Setting, Sign, Traits, sign_of, traits_of

if TYPE_CHECKING:
    from export.models.families import Input
    from export.models.load import LoadedModel

ONE, ODD, LONGEST = "one", "odd", "longest"
# Unequal to any caption length that a sampler uses, and to every multiple of a vector's width.
ODD_TOKENS = 7
# Larger latents than noise: a bound that noise never reaches, or a scale taken once, shows.
LATENT_FACTOR = 3.0
# The call from which on an engine is expected to have reached a steady state (graphs captured, buffers reused).
STEADY_CALL = 50
# Rounds in which callers call at once; of a large model, whose calls take seconds.
THREAD_ROUNDS, LARGE_THREAD_ROUNDS = 4, 2
# Of a condition's numbers, for one that is nearly the same.
LITTLE = 2.0**-5


@dataclass(frozen=True)
class PoolSpec:
    """Samples of one caption length. timesteps: in thousandths of the schedule's top, one for each sample;
    `large`, large_text: how many of them a large model takes, and a large text encoder. first_mask: the row of MASKS
    that its first sample has."""

    name: str
    timesteps: tuple[float, ...]
    large: int
    large_text: int
    latent_factor: float = 1.0
    first_mask: int = 0


# Fills that say how large a picture is: every call has other ones, and those of a sample differ.
SIZES = ("image_size", "aspect")
# Share of a caption's tokens that a sample sees, in turn.
MASKS = (1.0, 0.0, 2 / 3, 1 / 3)
# Schedules of flow matching have timesteps between the integers, which 11 significant bits do not hold: one of them is
# here, and for models whose own schedule has none.
POOLS = (
    PoolSpec(ONE, (3, 700), 1, 1),
    PoolSpec(ODD, (666.625, 975, 10), 2, 3, LATENT_FACTOR, first_mask=2),
    PoolSpec(LONGEST, (1000, 0, 975, 999, 3, 20), 3, 2),
)
# (batch size, pool): rows are taken in turn.
BATCHES = ((1, ONE), (2, LONGEST), (3, ODD), (9, LONGEST))
# The same of a large text encoder, which multiplies by billions of weights for every token: how many prompts there are
# is tried on short ones, and what an engine keeps between calls; long ones are in one call of two.
LARGE_TEXT_BATCHES = ((1, ONE), (2, ODD), (3, ODD), (9, ODD), (2, LONGEST))
LARGE_TEXT_NOTE = (
    "large text encoder: the longest prompts are in one call of two, other batches and what is kept between calls are "
    f"tried on prompts of {ODD_TOKENS} tokens"
)


@dataclass(frozen=True)
class Call:
    """One call: `rows` of the pool `pool`, as inputs by name; `text` says what is special about it.

    setting: what it was made for (call_patterns), None for its size; or a list of that by sample.
    """

    text: str
    pool: str
    rows: tuple[int, ...]
    inputs: Arrays
    setting: Setting | tuple[Setting, ...] | None = None


def make_pools(model: LoadedModel, case: AnyCase) -> dict[str, Arrays]:
    """Inputs by pool; every array with a batch axis holds one row for each sample."""
    return {spec.name: _pool(spec, model, case) for spec in POOLS}


def make_calls(model: LoadedModel, pools: dict[str, Arrays]) -> list[Call]:
    """One call for each row of BATCHES, or of LARGE_TEXT_BATCHES."""
    calls = []
    for size, pool in LARGE_TEXT_BATCHES if is_large_text(model) else BATCHES:
        rows = tuple(i % samples_in(pools[pool], model.shared) for i in range(size))
        call = rows_of(pool, rows, pools[pool], model.shared)
        calls.append(replace(call, text=f"{call.text}{_caption(model.inputs, call.inputs)}"))
    return calls


def is_large_text(model: LoadedModel) -> bool:
    """Is it a text encoder that is too large to be called with many tokens?"""
    return is_large(model) and not model.family.steps


def samples_in(pool: Arrays, shared: frozenset[str]) -> int:
    """How many samples a pool has."""
    return next(len(value) for name, value in pool.items() if name not in shared)


def rows_of(name: str, rows: tuple[int, ...], pool: Arrays, shared: frozenset[str]) -> Call:
    """The samples `rows` of the pool `name` as one call."""
    return Call(f"batch {len(rows)}", name, rows, take_samples(pool, list(rows), shared))


def _caption(rows: Sequence[Input], inputs: Arrays) -> str:
    lengths = {inputs[row.name].shape[row.shape.index("tokens")] for row in rows if "tokens" in row.shape}
    return f", {max(lengths)} caption token{'s' * (max(lengths) > 1)}" if lengths else ""


def _pool(spec: PoolSpec, model: LoadedModel, case: AnyCase) -> Arrays:
    if isinstance(case, TextCase):
        return _prompts(spec, model, case, spec.large_text if is_large_text(model) else len(spec.timesteps))
    return _pictures(spec, model, case, spec.timesteps[: spec.large] if is_large(model) else spec.timesteps)


def _prompts(spec: PoolSpec, model: LoadedModel, case: TextCase, count: int) -> Arrays:
    """Samples of `spec` for a text encoder: ids of their own. The longest have distances beyond the last that is told
    apart."""
    from export.models.load import sample_inputs

    tokens = _tokens(spec, model, case.call)
    if spec.name == LONGEST and (reach := model.config.get("relative_attention_max_distance")):
        tokens = max(tokens, reach + ODD_TOKENS)
    inputs = sample_inputs(model, count, 1 + POOLS.index(spec), tokens=tokens)
    for row in model.inputs:
        if row.fill == "mask":
            mask = _masks(inputs[row.name].shape, spec.first_mask)
            mask[:, 0] = 1  # a prompt has a token at least, its end
            inputs[row.name] = mask.astype(row.dtype)
    end_prompts(model, inputs)
    return inputs


def _pictures(spec: PoolSpec, model: LoadedModel, case: Case, times: Sequence[float]) -> Arrays:
    """Samples of `spec`: conditions from the case's prompts (and their empty ones) in turn, latents of their own."""
    from export.models.load import sample_inputs

    height, width = (side * model.pixels_per_cell for side in case.cells)
    seed = 1 + POOLS.index(spec)
    inputs = sample_inputs(model, len(times), seed, height, width, _tokens(spec, model, case.conditioning[0]))
    top = make_sampler(case.sampler, TRAIN_STEPS, case.timestep_scale).timesteps.max()
    for row in model.inputs:
        value = inputs[row.name]
        if row.fill_kind == "timestep":
            value = np.minimum(np.array(times) * (case.timestep_scale / 1000), top)
        elif row.fill_kind == "mask":
            value = _masks(value.shape, spec.first_mask)
            value[:, 0] = np.maximum(value[:, 0], float(row.fill == "mask:1"))
        elif row.fill.startswith("class:"):
            value = _labels(spec, int(row.fill.partition(":")[2]), len(times))
        elif row.fill in SIZES:
            value = value + np.abs(value).max() * np.random.default_rng(seed).uniform(0.25, 1.0, value.shape)
        elif row.name in case.conditioning[0] and row.batched:
            value = _conditions(case, row, value.shape)
        elif row.name == "hidden_states":
            value = value * spec.latent_factor
        inputs[row.name] = value.astype(row.dtype)
    return inputs


def _tokens(spec: PoolSpec, model: LoadedModel, condition: Arrays) -> int:
    """Caption length of a pool; the longest is the family's own, or the case's condition's where that is longer."""
    lengths = [condition[row.name].shape[1] for row in model.inputs if "tokens" in row.shape]
    return {ONE: 1, ODD: ODD_TOKENS, LONGEST: max([model.tokens, *lengths])}[spec.name]


def _masks(shape: tuple[int, ...], first: int) -> Array:
    """Ones for a share of each sample's tokens, the shares of MASKS in turn from `first` on."""
    samples, tokens = shape
    lengths = np.array([math.ceil(MASKS[(first + i) % len(MASKS)] * tokens) for i in range(samples)])
    return (np.arange(tokens)[None] < lengths[:, None]).astype(np.float64)


def _labels(spec: PoolSpec, classes: int, count: int) -> NDArray[np.integer]:
    """Class labels, other ones in every pool, downwards from `classes`, which stands for no class."""
    before = sum(len(pool.timesteps) for pool in POOLS[POOLS.index(spec) + 1 :])
    return (classes - before - np.arange(count)) % (classes + 1)


def _conditions(case: Case, row: Input, shape: tuple[int, ...]) -> Array:
    """[samples, ...] from the case's prompted and empty conditions in turn, repeated or cut to the caption's length."""
    sides = [side[row.name] for side in case.conditioning]
    values = np.stack([sides[i % 2][i // 2 % len(sides[0])] for i in range(shape[0])])
    if "tokens" in row.shape:
        axis = row.shape.index("tokens")
        values = np.take(values, np.arange(shape[axis]) % values.shape[axis], axis)
    return values


# --- running them ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleError:
    """SQNR in dB of one sample of one call against the float64 reference. pool, row: which sample that is, as several
    calls make the same. traits, sign: what is special about it (nothing of a picture), and how it is wrong, see
    call_patterns."""

    call: str
    sample: int
    sqnr_db: float
    pool: str
    row: int
    traits: Traits = NO_TRAITS
    sign: Sign | None = None


def call_errors(calls: Sequence[Call], exact: dict[str, Array], run: Run) -> list[SampleError]:
    """Every sample of every call. Judged when all have been made: a result may not change under its caller's hands."""
    outputs = [only(run(call.inputs)) for call in calls]
    pairs = zip(calls, outputs, strict=True)
    return [error for call, output in pairs for error in sample_errors(call, exact, output)]


def sample_errors(call: Call, exact: dict[str, Array], output: Array) -> list[SampleError]:
    """Each sample of `output`, by all its channels, learned variances too; nan where the shape is another."""
    expected = exact[call.pool][list(call.rows)]
    if output.shape != expected.shape:
        values = [float("nan")] * len(expected)
        shapes = f"the shape is {output.shape} in place of {expected.shape}"
        sign = Sign("shape", f"{shapes}: an axis that should vary is fixed in the engine")
        signs: list[Sign | None] = [sign] * len(expected)
    else:
        values = [sqnr_db(*pair) for pair in zip(expected, output, strict=True)]
        of_pool, of_call = _channels_first(exact[call.pool]), _channels_first(output)
        signs = [sign_of(one, row, of_pool, call.rows) for one, row in zip(of_call, call.rows, strict=True)]
    settings = call.setting if isinstance(call.setting, tuple) else (call.setting,) * len(values)
    traits = [traits_of(call.inputs, i, setting, call.rows) for i, setting in enumerate(settings)]
    columns = enumerate(zip(values, call.rows, traits, signs, strict=True))
    return [SampleError(call.text, i, value, call.pool, row, of, sign) for i, (value, row, of, sign) in columns]


def _channels_first(outputs: Array) -> Array:
    """[B, C, ...], of pictures [B, C, H, W] or tokens [B, tokens, C]."""
    return outputs.swapaxes(1, 2) if outputs.ndim == 3 else outputs


@dataclass(frozen=True)
class StateResult:
    """What an engine that keeps something between calls gets wrong.

    errors: its samples against the reference. unequal: how many numbers differ from those of an equal call before, or
    of one without NaN where none reaches, or hide NaN of an input. first: the first such call, None for none.
    """

    errors: list[SampleError]
    unequal: int
    first: Call | None


def state_result(
    calls: Sequence[Call],
    pools: Mapping[str, Arrays],
    model: LoadedModel,
    exact: dict[str, Array],
    run: Run,
    calls_before: int,
    reach: NDArray[np.bool_],
) -> StateResult:
    """Calls whose results may depend on those before: a condition changed at an equal batch size (in one sample, in
    all, in place, in its mask alone, a little), NaN in one sample, which must be where it reaches and change nothing
    else, the STEADY_CALL-th call (`calls_before` of them so far) or the next after more, two threads at once.

    Each is made twice at least. Equal calls have no reason to differ in any bit, so no flipped code hides a fault here.
    reach: see `nan_reach`.
    """
    single, pair, *_ = calls

    def variation(setting: Setting, call: Call, inputs: Arrays | None = None) -> Call:
        return replace(call, setting=setting, text=f"{pair.text}, {setting}", inputs=inputs or call.inputs)

    repeats = _Repeats(run, calls_before)
    pool = pools[pair.pool]
    first, second, last = pair.rows[0], pair.rows[1], samples_in(pool, model.shared) - 1
    orders = (first, second), (first, last), (second, last), (last, first)
    changed = [variation(Setting.CHANGED, rows_of(pair.pool, rows, pool, model.shared)) for rows in orders]
    outputs = [repeats.judged(call) for call in changed]
    repeats.judged(changed[1], outputs[1])  # the same samples as in the call before, in the other order

    arrays = {name: value.copy() for name, value in changed[2].inputs.items()}  # another condition than the call before
    in_place = variation(Setting.IN_PLACE, changed[1], arrays)
    repeats.output(in_place)
    for name, value in changed[1].inputs.items():
        arrays[name][...] = value
    repeats.judged(in_place, outputs[1])

    masked = {row.name: _half(changed[2].inputs[row.name]) for row in model.inputs if row.fill_kind == "mask"}
    unmasked = variation(Setting.MASK_ALONE, changed[2])
    other_mask = replace(unmasked, inputs=unmasked.inputs | masked)
    of_other_mask = repeats.output(other_mask)
    repeats.judged(unmasked, outputs[2])
    repeats.output(other_mask, of_other_mask)
    repeats.judged(changed[2], outputs[2])

    if model.family.steps:
        near = variation(Setting.NEAR, changed[2], changed[2].inputs | _nearly_the_same(model, changed[2].inputs))
        after_its_like = repeats.output(near)
        of_nan = variation(Setting.NAN_FIRST, changed[3], with_nan(changed[3].inputs))
        repeats.output(of_nan, _spoilt(outputs[3], reach))
        repeats.output(near, after_its_like)  # after another condition
    else:
        for call, output in zip(changed, outputs, strict=True):
            repeats.output(variation(Setting.PADDING, call, other_padding(model, call.inputs)), output)

    alone = repeats.output(single)
    while repeats.count < STEADY_CALL - 1:
        repeats.output(single)
    repeats.judged(replace(single, setting=Setting.STEADY, text=f"call {repeats.count + 1}"), alone)

    threads = [variation(Setting.THREADS, call) for call in changed[2:]]
    rounds = LARGE_THREAD_ROUNDS if is_large(model) else THREAD_ROUNDS
    for call, several, earlier in zip(threads, _at_once(threads, repeats.run, rounds), outputs[2:], strict=True):
        repeats.equal += [(call, output, earlier) for output in several]
        repeats.answers += [(call, output) for output in several]

    errors = [error for call, output in repeats.answers for error in sample_errors(call, exact, output)]
    unequal = [(call, _unequal(output, earlier)) for call, output, earlier in repeats.equal]
    first_unequal = next((call for call, count in unequal if count), None)
    return StateResult(errors, sum(count for _, count in unequal), first_unequal)


class _Repeats:
    """The calls of one engine, `count` made before, each with what it should equal.

    Judged when all have been made: a result may not change under its caller's hands. answers: what the reference has
    as well. equal: (a call, its output, what that should be to the bit).
    """

    def __init__(self, run: Run, count: int) -> None:
        self._run, self.count = run, count
        self.answers: list[tuple[Call, Array]] = []
        self.equal: list[tuple[Call, Array, Array]] = []

    def run(self, inputs: Arrays) -> Arrays:
        raise_if_stopped()
        self.count += 1
        return self._run(inputs)

    def output(self, call: Call, earlier: Array | None = None) -> Array:
        """Make a call; earlier: the result of an equal one."""
        output = only(self.run(call.inputs))
        if earlier is not None:
            self.equal.append((call, output, earlier))
        return output

    def judged(self, call: Call, earlier: Array | None = None) -> Array:
        """As `output`, of samples that the reference has as well."""
        output = self.output(call, earlier)
        self.answers.append((call, output))
        return output


def with_nan(inputs: Arrays) -> Arrays:
    """A call with NaN for the first number of its first sample's latents."""
    latents = inputs["hidden_states"].copy()
    latents[(0,) * latents.ndim] = np.nan
    return inputs | {"hidden_states": latents}


def nan_reach(run: Run, pools: Mapping[str, Arrays], shared: frozenset[str]) -> NDArray[np.bool_]:
    """[C, H, W]: which numbers of a denoiser's result for the last sample of the pool LONGEST `with_nan` makes NaN."""
    pool = pools[LONGEST]
    last = rows_of(LONGEST, (samples_in(pool, shared) - 1,), pool, shared)
    return np.isnan(only(run(with_nan(last.inputs)))[0])


def other_padding(model: LoadedModel, inputs: Arrays) -> Arrays:
    """A text encoder's call with another id in the place of every token that its mask leaves out."""
    ids, mask = (inputs[str(name)] for name in (model.family.streamed, model.family.counted))
    row = next(row for row in model.inputs if row.name == model.family.streamed)
    vocabulary = int(row.fill.partition(":")[2])
    return inputs | {row.name: np.where(mask.astype(bool), ids, (ids + 1) % vocabulary)}


def _spoilt(output: Array, reach: NDArray[np.bool_]) -> Array:
    """The result of a call [B, C, H, W] as it should be with NaN in its first sample: NaN where that reaches."""
    lost = np.zeros(output.shape, bool)
    if output.shape[1:] == reach.shape:  # another shape fails against the reference
        lost[0] = reach
    return np.where(lost, output.dtype.type(np.nan), output)


def _nearly_the_same(model: LoadedModel, inputs: Arrays) -> Arrays:
    """The float conditions with those of the last sample moved by LITTLE: codes of 8 bits see it, a glance does not."""
    moved = {}
    for row in model.inputs:
        latents = row.name == "hidden_states"
        moves = row.fill_kind not in ("timestep", "mask") and row.dtype.startswith("float")
        if row.batched and moves and not latents:
            moved[row.name] = inputs[row.name].copy()
            moved[row.name][-1] *= np.float32(1 + LITTLE)
    return moved


def _half(mask: Array) -> Array:
    """Ones for the first half of the tokens in every row."""
    tokens = mask.shape[1]
    return np.broadcast_to(np.arange(tokens) < -(-tokens // 2), mask.shape).astype(mask.dtype)


def _unequal(output: Array, earlier: Array) -> int:
    """How many numbers differ in any bit; NaN has none that count, and another shape or type differs everywhere."""
    if (output.shape, output.dtype) != (earlier.shape, earlier.dtype):
        return output.size
    bits, earlier_bits = (np.ascontiguousarray(array).view(f"u{array.itemsize}") for array in (output, earlier))
    return int(np.count_nonzero((bits != earlier_bits) & ~(np.isnan(output) & np.isnan(earlier))))


def _at_once(calls: Sequence[Call], run: Run, rounds: int) -> list[list[Array]]:
    """Outputs of callers of one batch size with conditions of their own, who all call at once, `rounds` times.

    Raises what a call raises.
    """
    together = Barrier(len(calls))

    def repeat(call: Call) -> list[Array]:
        outputs = []
        for _ in range(rounds):
            together.wait()
            try:
                outputs.append(only(run(call.inputs)))
            except BaseException:
                together.abort()  # nobody waits for this thread any more
                raise
        return outputs

    with ThreadPoolExecutor(len(calls)) as threads:
        try:
            futures = [threads.submit(ending_with(repeat), call) for call in calls]
            for _ in as_completed(futures):
                pass  # every caller ends, and a signal is heard
        finally:
            together.abort()  # nobody waits for a caller that never began
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise next((error for error in errors if not isinstance(error, BrokenBarrierError)), errors[0])
    return [future.result() for future in futures]
