"""Calls that drawing a picture does not make: other batch sizes, caption lengths, masks, timesteps, latents, callers.

Samples of one batch do not see each other, so the reference computes each sample once, in pools by caption length, and
every call is a choice of rows from a pool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Barrier
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.backends.base import Arrays
from pipeline.gates import sqnr_db
from pipeline.picture_case import Case, Run, is_large
from pipeline.sampling import TRAIN_STEPS, make_sampler, take_samples

if TYPE_CHECKING:
    from export.families import Input
    from export.models import LoadedModel

ONE, ODD, LONGEST = "one", "odd", "longest"
# Unequal to any caption length that a sampler uses, and to every multiple of a vector's width.
ODD_TOKENS = 7
# Larger latents than noise: a bound that noise never reaches, or a scale taken once, shows.
LATENT_FACTOR = 3.0
# The call from which on an engine is expected to have reached a steady state (graphs captured, buffers reused).
STEADY_CALL = 50
THREAD_ROUNDS = 4


@dataclass(frozen=True)
class PoolSpec:
    """Samples of one caption length. timesteps: in thousandths of the schedule's top, one for each sample;
    `large`: how many of them a large model takes."""

    name: str
    timesteps: tuple[float, ...]
    large: int
    latent_factor: float = 1.0


# Schedules of flow matching have timesteps between the integers, which 11 significant bits do not hold: one of them is
# here, and for models whose own schedule has none.
POOLS = (
    PoolSpec(ONE, (3, 700), 1),
    PoolSpec(ODD, (500, 974.6, 10), 2, LATENT_FACTOR),
    PoolSpec(LONGEST, (1000, 0, 975, 999, 3, 20, 250, 500, 800), 3),
)
# (batch size, pool): rows are taken in turn.
BATCHES = ((1, ONE), (2, LONGEST), (3, ODD), (9, LONGEST))


@dataclass(frozen=True)
class Call:
    """One call: `rows` of the pool `pool`, as inputs by name; `text` says what is special about it."""

    text: str
    pool: str
    rows: tuple[int, ...]
    inputs: Arrays


def make_pools(model: LoadedModel, case: Case) -> dict[str, Arrays]:
    """Inputs by pool; every array with a batch axis holds one row for each sample."""
    return {spec.name: _pool(spec, model, case) for spec in POOLS}


def make_calls(model: LoadedModel, pools: dict[str, Arrays]) -> list[Call]:
    """One call for each row of BATCHES."""
    calls = []
    for size, pool in BATCHES:
        rows = tuple(i % len(pools[pool]["timestep"]) for i in range(size))
        call = rows_of(pool, rows, pools[pool], model.shared)
        calls.append(replace(call, text=f"{call.text}{_caption(model.inputs, call.inputs)}"))
    return calls


def rows_of(name: str, rows: tuple[int, ...], pool: Arrays, shared: frozenset[str]) -> Call:
    """The samples `rows` of the pool `name` as one call."""
    return Call(f"batch {len(rows)}", name, rows, take_samples(pool, list(rows), shared))


def _caption(rows: Sequence[Input], inputs: Arrays) -> str:
    lengths = {inputs[row.name].shape[row.shape.index("tokens")] for row in rows if "tokens" in row.shape}
    return f", {max(lengths)} caption token{'s' * (max(lengths) > 1)}" if lengths else ""


def _pool(spec: PoolSpec, model: LoadedModel, case: Case) -> Arrays:
    """Samples of `spec`: conditions from the case's prompts (and their empty ones) in turn, latents of their own."""
    from export.models import sample_inputs

    times = spec.timesteps[: spec.large] if is_large(model) else spec.timesteps
    height, width = (side * model.pixels_per_cell for side in case.noise.shape[2:])
    seed = 1 + POOLS.index(spec)
    inputs = sample_inputs(model, len(times), seed, height, width, _tokens(spec, model, case))
    top = make_sampler(case.sampler, TRAIN_STEPS, case.timestep_scale).timesteps.max()
    for row in model.inputs:
        value = inputs[row.name]
        if row.fill == "timestep":
            value = np.minimum(np.array(times) * (case.timestep_scale / 1000), top)
        elif row.fill == "mask":
            value = _masks(value.shape)
        elif row.fill == "image_size":
            value = value + _sizes_apart(value.shape)
        elif row.fill.startswith("class:"):
            value = _labels(spec, int(row.fill.partition(":")[2]), len(times))
        elif row.name in case.conditioning[0] and row.batched:
            value = _conditions(case, row, value.shape)
        elif row.name == "hidden_states":
            value = value * spec.latent_factor
        inputs[row.name] = value.astype(row.dtype)
    return inputs


def _tokens(spec: PoolSpec, model: LoadedModel, case: Case) -> int:
    """Caption length of a pool; the longest is the family's own, or the case's where that is longer."""
    lengths = [case.conditioning[0][row.name].shape[1] for row in model.inputs if "tokens" in row.shape]
    return {ONE: 1, ODD: ODD_TOKENS, LONGEST: max([model.family.tokens, *lengths])}[spec.name]


def _masks(shape: tuple[int, ...]) -> NDArray[Any]:
    """Row 0 all ones, row 1 all zeros, then ones for two thirds of the tokens, one third, and so on."""
    samples, tokens = shape
    lengths = [tokens, 0, -(-2 * tokens // 3), -(-tokens // 3)]
    return (np.arange(tokens)[None] < np.array([lengths[i % 4] for i in range(samples)])[:, None]).astype(np.float64)


def _sizes_apart(shape: tuple[int, ...]) -> NDArray[Any]:
    """Pixels to add to [samples, numbers] of image sizes and crops: square pictures alone would not tell height from
    width, nor a sample from the next."""
    return 24.0 * (1 + np.arange(shape[1]))[None] + 8.0 * np.arange(shape[0])[:, None]


def _labels(spec: PoolSpec, classes: int, count: int) -> NDArray[Any]:
    """Class labels, other ones in every pool, downwards from `classes`, which stands for no class."""
    before = sum(len(pool.timesteps) for pool in POOLS[POOLS.index(spec) + 1 :])
    return (classes - before - np.arange(count)) % (classes + 1)


def _conditions(case: Case, row: Input, shape: tuple[int, ...]) -> NDArray[Any]:
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
    calls make the same."""

    call: str
    sample: int
    sqnr_db: float
    pool: str
    row: int


def call_errors(calls: Sequence[Call], exact: dict[str, NDArray[Any]], run: Run) -> list[SampleError]:
    """Every sample of every call. Judged when all have been made: a result may not change under its caller's hands."""
    outputs = [run(call.inputs)["sample"] for call in calls]
    pairs = zip(calls, outputs, strict=True)
    return [error for call, output in pairs for error in sample_errors(call, exact, output)]


def sample_errors(call: Call, exact: dict[str, NDArray[Any]], output: NDArray[Any]) -> list[SampleError]:
    """Each sample of `output`, by all its channels, learned variances too; nan where the shape is another."""
    expected = exact[call.pool][list(call.rows)]
    if output.shape != expected.shape:
        values = [float("nan")] * len(expected)
    else:
        values = [sqnr_db(*pair) for pair in zip(expected, output, strict=True)]
    rows = enumerate(zip(values, call.rows, strict=True))
    return [SampleError(call.text, i, value, call.pool, row) for i, (value, row) in rows]


def state_errors(
    calls: Sequence[Call],
    pools: Mapping[str, Arrays],
    shared: frozenset[str],
    exact: dict[str, NDArray[Any]],
    run: Run,
    made: int,
) -> list[SampleError]:
    """What an engine keeps from call to call: a condition changed at an equal batch size (in one sample, in all, in
    place), the STEADY_CALL-th call (`made` of them so far), two threads at once."""
    single, pair, *_ = calls
    first, second, third = pair.rows[0], pair.rows[1], len(pools[pair.pool]["timestep"]) - 1
    orders = (first, second), (first, third), (second, third), (third, first), (first, second)
    changed = [rows_of(pair.pool, rows, pools[pair.pool], shared) for rows in orders]
    errors = call_errors([replace(call, text=f"{call.text}, condition changed") for call in changed], exact, run)

    arrays = {name: value.copy() for name, value in changed[2].inputs.items()}  # another condition than the call before
    run(arrays)
    for name, value in changed[1].inputs.items():
        arrays[name][...] = value
    errors += call_errors([replace(changed[1], text=f"{pair.text}, changed in place", inputs=arrays)], exact, run)

    for _ in range(made + len(changed) + 2, STEADY_CALL - 1):
        run(single.inputs)
    steady = replace(single, text=f"call {STEADY_CALL}")
    return errors + call_errors([steady], exact, run) + _threaded(changed[2:4], exact, run)


def _threaded(calls: Sequence[Call], exact: dict[str, NDArray[Any]], run: Run) -> list[SampleError]:
    """Callers of one batch size with conditions of their own, who all call at once, THREAD_ROUNDS times."""
    together = Barrier(len(calls))

    def repeat(call: Call) -> list[SampleError]:
        errors = []
        for _ in range(THREAD_ROUNDS):
            together.wait()
            errors += call_errors([call], exact, run)
        return errors

    named = [replace(call, text=f"{call.text}, {len(calls)} threads") for call in calls]
    with ThreadPoolExecutor(len(calls)) as threads:
        return [error for errors in threads.map(repeat, named) for error in errors]
