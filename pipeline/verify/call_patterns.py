"""What is likely wrong with an engine, from which samples it gets wrong and what their numbers look like.

Two kinds of evidence. A trait is what all wrong samples have and no right one has: a batch size, a caption's length, a
changed condition. A sign is how a wrong result differs from the reference's: not finite, larger by a factor, another
sample's. Several traits may fit, since few calls are made; all are named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from export.models.families import STEP_INPUTS
from pipeline.distance import Array

if TYPE_CHECKING:
    from pipeline.verify.calls import SampleError

# A result this near to the reference has no sign: float operations alone leave as much.
NEAR_DB = 100.0
# Share of an error's power that a factor must explain. It explains 1 / n of n numbers' noise, and about half where
# flipped codes err as much.
EXPLAINED = 0.5
# A result is another sample's if it is so many times nearer to it, in power.
NEARER = 10.0
# Traits that one sentence names at most; so few different samples fit many by chance, and likely ones are named too.
NAMED, FEW = 6, 2
NEAR_LIMIT_DB = 6.0
# Equal calls of a right engine do not differ at all; more than this is no rounding of the decibel itself.
STEADY_DB = 0.5
# What equal samples count as, and overflows as its negative.
EQUAL_DB = 1000.0
# A factor may be anything up to this; beyond it only if nearly nothing else is wrong: an unlike picture fits 0.
USUAL_FACTOR, LARGE_EXPLAINED = 0.5, 0.95


class Setting(StrEnum):
    """What a call that tests an engine's memory was made for, and which half of a guided call a sample is of."""

    CHANGED = "condition changed"
    IN_PLACE = "changed in place"
    MASK_ALONE = "mask changed alone"
    NEAR = "condition nearly the same"
    NAN_FIRST = "NaN in the first sample"
    PADDING = "other ids in the padding"
    THREADS = "2 threads"
    STEADY = "steady state"
    PROMPTED = "with a prompt"
    UNPROMPTED = "without a prompt"


@dataclass(frozen=True)
class Traits:
    """What is special about one sample of one call.

    batch: samples of the call, `place`: which it is. tokens: the longest caption's, None without one. mask: "full", or
    "partial" or "empty" if one of several is, None without one. latent: the largest of its latents; a text encoder has
    none, and no timestep. other_timestep, other_condition, other_mask: than the first sample's. setting: what the call
    was made for, None for its size. rows: the samples of the call, of their pool.
    """

    batch: int
    place: int
    timestep: float | None = None
    latent: float | None = None
    tokens: int | None = None
    mask: str | None = None
    label: int | None = None
    other_timestep: bool = False
    other_condition: bool = False
    other_mask: bool = False
    setting: Setting | None = None
    rows: tuple[int, ...] = ()


NO_TRAITS = Traits(batch=1, place=0, timestep=math.nan, latent=math.nan)
LATENTS, TIMESTEP = "hidden_states", "timestep"


def traits_of(
    inputs: Mapping[str, Array], place: int, setting: Setting | None = None, rows: tuple[int, ...] = ()
) -> Traits:
    """Of sample `place` of a call with these inputs."""
    latents = inputs.get(LATENTS)
    batch = len(next(iter(inputs.values())) if latents is None else latents)
    with_rows = {name: array for name, array in inputs.items() if array.ndim and len(array) == batch}
    condition = {name: array for name, array in with_rows.items() if name not in STEP_INPUTS}
    captions = [array.shape[1] for array in condition.values() if array.ndim == (2 if latents is None else 3)]
    of_masks = [array for name, array in condition.items() if "mask" in name]
    seen = [float(np.mean(array[place] != 0)) for array in of_masks]  # shares of the tokens
    labels = [int(array[place]) for name, array in condition.items() if name == "class_labels"]
    times = np.broadcast_to(inputs.get(TIMESTEP, math.nan), batch)
    return Traits(
        batch=batch,
        place=place,
        timestep=float(times[place]) if TIMESTEP in inputs else None,
        latent=None if latents is None else float(np.abs(latents[place]).max()),
        tokens=max(captions, default=None),
        mask=None if not seen else "empty" if 0 in seen else "partial" if min(seen) < 1 else "full",
        label=labels[0] if labels else None,
        other_timestep=TIMESTEP in inputs and bool(times[place] != times[0]),
        other_condition=any(not np.array_equal(array[place], array[0]) for array in condition.values()),
        other_mask=any(not np.array_equal(array[place], array[0]) for array in of_masks),
        setting=setting,
        rows=rows,
    )


# --- signs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sign:
    """How a wrong result looks. kind: equal for results that are wrong in one way."""

    kind: str
    text: str


def sign_of(output: Array, row: int, exact: Array, rows: Sequence[int]) -> Sign | None:
    """Of a result for the sample `row` of a pool whose references are `exact` [samples, C, ...], in a call of the
    samples `rows`; None for none of those known."""
    expected, actual = np.asarray(exact[row], np.float64), np.asarray(output, np.float64)
    if not np.isfinite(actual).all():
        return Sign("not finite", "NaN or Inf where the reference is finite: an overflow, or a division by zero")
    difference = actual - expected
    power = float(np.sum(difference**2))
    if power <= 10 ** (-NEAR_DB / 10) * float(np.sum(expected**2)):
        return None
    if not actual.any():
        return Sign("zeros", "all numbers are zero: nothing was written")
    return _of_another(actual, power, row, exact, rows) or _factor(expected, difference) or _channels(difference)


def _of_another(actual: Array, power: float, row: int, exact: Array, rows: Sequence[int]) -> Sign | None:
    powers = [float(np.sum((actual - np.asarray(other, np.float64)) ** 2)) for other in exact]
    nearest = int(np.argmin(powers))
    if powers[nearest] * NEARER >= power or nearest == row:
        return None
    if nearest in rows:
        return Sign("row", f"sample {rows.index(nearest)} of the call is given: rows are exchanged or repeated")
    return Sign("call", "the result of another call is given: a buffer is shared, or what is kept is not renewed")


def _factor(expected: Array, difference: Array) -> Sign | None:
    size = float(np.sum(expected**2))
    factor = float(np.sum(expected * difference)) / size if size else 0.0
    share = EXPLAINED if abs(factor) <= USUAL_FACTOR else LARGE_EXPLAINED
    if factor**2 * size < share * float(np.sum(difference**2)):
        return None
    return Sign("factor", f"all numbers times {1 + float(f'{factor:.1g}'):g}: a factor is wrong")


def _channels(difference: Array) -> Sign | None:
    """An error in few channels [C, ...] alone."""
    shares = np.sum(difference.reshape(len(difference), -1) ** 2, axis=1) / np.sum(difference**2)
    few = np.flatnonzero(shares > 1 / (2 * len(shares)))
    if len(few) == len(shares) or shares[few].sum() < 0.99:
        return None
    named = ", ".join(map(str, few))
    return Sign("channels", f"only channels {named} of the output: a bias, a table or a row of the last weight differs")


# --- traits ---------------------------------------------------------------------------------------------------------

# Numbers (also true and false), or words: of one kind in each trait.
Value = TypeVar("Value", float, str)


@dataclass(frozen=True, order=True)
class Fit:
    """A trait that all wrong samples have. right: how many right ones have one of their values; text: which values
    these are, in words; cause: what is likely wrong."""

    right: int
    text: str
    cause: str


@dataclass(frozen=True)
class Trait(Generic[Value]):
    """One thing that samples differ in. value: None where a sample has none; words: name the wrong samples' values,
    given those and the right ones'; ordered: only a threshold counts, as every sample has a value of its own. causes:
    by value, in place of `cause`; then right samples may have no value."""

    value: Callable[[SampleError], Value | None]
    words: Callable[[set[Value], set[Value]], str]
    cause: str = ""
    ordered: bool = False
    causes: Mapping[str, str] = field(default_factory=dict)

    def fit(self, errors: Sequence[SampleError], wrong: Sequence[bool]) -> Fit | None:
        """None where a sample has no value, or the trait tells wrong samples from no right one."""
        samples = [(self.value(error), is_wrong) for error, is_wrong in zip(errors, wrong, strict=True)]
        if any(value is None and (is_wrong or not self.causes) for value, is_wrong in samples):
            return None
        bad = {value for value, is_wrong in samples if is_wrong and value is not None}
        good = {value for value, is_wrong in samples if not is_wrong and value is not None}
        right = sum(value in bad and not is_wrong for value, is_wrong in samples)
        if right == wrong.count(False) or (self.ordered and (right or not min(bad) > max(good))):
            return None
        cause = "; or ".join(self.causes[value] for value in self.causes if value in bad)
        return Fit(right, self.words(bad, good), cause or self.cause)


def _numbers(form: str) -> Callable[[set[float], set[float]], str]:
    """`form` with the values of the wrong samples, or the bound that they lie beyond."""

    def words(wrong: set[float], right: set[float]) -> str:
        first, last, several = min(wrong), max(wrong), len(wrong) > 1
        text = ", ".join(f"{value:g}" for value in sorted(wrong))
        if several and right and first > max(right):
            text = f"{first:g} and above"
        elif several and right and last < min(right):
            text = f"{last:g} and below"
        odd = several and all(value % 2 == 1 for value in wrong) and not any(value % 2 == 1 for value in right)
        return form.format(text) + (", the odd ones" if odd else "")

    return words


def _named(form: str) -> Callable[[set[str], set[str]], str]:
    return lambda wrong, _: form.format(" or ".join(sorted(wrong)))


def _said(text: str, otherwise: str) -> Callable[[set[float], set[float]], str]:
    """For what is true or false."""
    return lambda wrong, _: text if True in wrong else otherwise


def _than_the_first(name: str, value: Callable[[SampleError], bool | None]) -> Trait[float]:
    """Has a sample another timestep, mask or condition than the first of its call?"""
    words = _said(f"another {name} than the first sample's", f"the {name} of the first sample")
    return Trait(value, words, f"one {name} is taken for all samples")


SETTING_CAUSES: Mapping[str, str] = {
    Setting.CHANGED: "the condition of an earlier call is kept",
    Setting.IN_PLACE: "whether a condition changed is decided by the array, not by its numbers",
    Setting.NEAR: "a condition counts as unchanged while it is close to the one before",
    Setting.MASK_ALONE: "masks are not compared when it is decided whether a condition changed",
    Setting.NAN_FIRST: "samples see each other, or NaN is clipped or becomes a code",
    Setting.PADDING: "tokens read the padding: the mask is not applied, or too weak",
    Setting.STEADY: "something adds up or is used up from call to call",
    Setting.THREADS: "callers share a slot or a buffer",
}
_BATCH = "a buffer, a tile or a captured graph fits other batch sizes only"
_TIME = "the timestep's embedding or its range"
_PLACE = Trait(lambda e: e.sample, _numbers("place {} in the batch"), "rows of a call are computed or ordered wrongly")
_TIMESTEP = Trait(lambda e: e.traits.timestep, _numbers("timestep {}"), _TIME)
_SETTING = Trait(lambda e: e.traits.setting, _named("calls {}"), causes=SETTING_CAUSES)
TraitTable = Sequence[Trait[float] | Trait[str]]
CALL_TRAITS: TraitTable = (
    Trait(lambda e: e.traits.batch, _numbers("batch {}"), _BATCH),
    _PLACE,
    Trait(
        lambda e: e.traits.batch % 2 == 1 < e.traits.batch and e.sample == e.traits.batch - 1,
        _said("the last place of an odd batch", "other places than the last of an odd batch"),
        "rows are computed in pairs",
    ),
    _TIMESTEP,
    _than_the_first("timestep", lambda e: e.traits.other_timestep),
    Trait(
        lambda e: e.traits.tokens, _numbers("a token count of {}"), "a tile or padding of captions fits other lengths"
    ),
    Trait(lambda e: e.traits.mask, _named("{} masks"), "a mask is not applied, or not as it is given"),
    _than_the_first("mask", lambda e: None if e.traits.mask is None else e.traits.other_mask),
    _than_the_first("condition", lambda e: e.traits.other_condition),
    Trait(lambda e: e.traits.label, _numbers("class {}"), "rows of the class table, or how it is read"),
    Trait(
        lambda e: e.traits.latent,
        _numbers("latents that reach {}"),
        "numbers are clipped, overflow or have a scale taken once",
        ordered=True,
    ),
    _SETTING,
)
STEP_TRAITS: TraitTable = (
    Trait(lambda e: int(e.call.rpartition(" ")[2]), _numbers("step {}"), _TIME),
    _TIMESTEP,
    Trait(lambda e: e.traits.setting, _named("samples {}"), "a condition or its mask"),
    _PLACE,
)
PICTURE_TRAITS: TraitTable = (
    Trait(lambda e: e.sample, _numbers("picture {}"), "what differs between samples is used wrongly"),
)


def diagnose(errors: Sequence[SampleError], limit: float, traits: TraitTable = CALL_TRAITS) -> str:
    """What is likely wrong where samples are below `limit` dB; errors: in the order of calls.

    Samples that look wrong in the worst one's way count as wrong too: a fault need not take each over the limit.
    """
    worst = min(errors, key=lambda error: -math.inf if math.isnan(error.sqnr_db) else error.sqnr_db)
    kind = worst.sign and worst.sign.kind
    wrong = [not e.sqnr_db >= limit or (e.sign is not None and e.sign.kind == kind) for e in errors]
    text = f"{sum(wrong)} of {len(wrong)} samples are wrong"
    parts = [f"{text}{_common(errors, wrong, traits)}"]
    if worst.sign is not None:
        parts.append(f"the worst: {worst.sign.text}")
    elif worst.sqnr_db >= limit - NEAR_LIMIT_DB:
        parts.append(f"none by more than {NEAR_LIMIT_DB:g} dB: a few flipped codes more, or a small fault")
    return "; ".join(parts)


def _common(errors: Sequence[SampleError], wrong: Sequence[bool], traits: TraitTable) -> str:
    """What wrong samples alone have; without such, what they all have and few right ones."""
    unsteady = _unsteady(errors)
    if unsteady:
        setting = None if all(wrong) else _SETTING.fit(errors, wrong)
        text = f"{unsteady}: what an earlier call left is used"
        return f"; {text}" if setting is None else f", all in {setting.text}; {text} ({setting.cause})"
    if all(wrong):
        return ", so it is nothing that calls differ in"
    fits = [fit for trait in traits if (fit := trait.fit(errors, wrong)) is not None]
    exact, likely = [fit for fit in fits if not fit.right], sorted(fit for fit in fits if fit.right)
    few = len({(error.pool, error.row) for error, is_wrong in zip(errors, wrong, strict=True) if is_wrong}) <= FEW
    text = f": those of {_or(exact[:NAMED])} and no other" if exact else ""
    if likely and (few or not exact):
        text += f", {'or ' if exact else ''}some of {_or(likely[:NAMED])}"
    return text


def _or(fits: Sequence[Fit]) -> str:
    """In one sentence; a cause that several share once."""
    causes = list(dict.fromkeys(fit.cause for fit in fits if fit.cause))
    return " or ".join(fit.text for fit in fits) + (f" ({'; or '.join(causes)})" if causes else "")


def _unsteady(errors: Sequence[SampleError]) -> str | None:
    """Two calls of the same samples whose errors differ, in words. Equal calls give equal numbers."""
    first: dict[tuple[str, tuple[int, ...], int], SampleError] = {}
    for error in errors:
        if not error.traits.rows:
            continue
        before = first.setdefault((error.pool, error.traits.rows, error.sample), error)
        values = np.nan_to_num(np.clip([before.sqnr_db, error.sqnr_db], -EQUAL_DB, EQUAL_DB), nan=-EQUAL_DB)
        if abs(values[0] - values[1]) > STEADY_DB:
            there, here = (f"{one.sqnr_db:.1f} dB in {one.call!r}" for one in (before, error))
            return f"sample {error.sample} has {there} and {here}"
    return None
