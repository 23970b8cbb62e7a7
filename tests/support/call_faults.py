"""Faults in how an engine answers calls: wrong for some inputs only, or because of what it keeps from call to call.

Each wraps the denoiser of a right engine: `plant(run)` gives the faulty function.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.models.families import STEP_INPUTS
from pipeline.backends.base import Arrays
from pipeline.generate.case import Run
from tests.support.graph_faults import ALL, CALLS, CAPTIONED, CLASSES, MINIS

FEW = (*MINIS, "hunyuan")
# What is kept wrongly may change less than the limits of `calls`; equal calls must be equal to the bit.
KEPT = CALLS | {"repeats"}
CAPTION = "encoder_hidden_states"


@dataclass(frozen=True)
class CallFault:
    """plant: wraps a right denoiser. subjects, caught_by, kind: as those of GraphFault. words: a pattern of what the
    failed gates say; "" for that of its kind."""

    name: str
    kind: str
    plant: Callable[[Run], Run]
    subjects: tuple[str, ...] = FEW
    caught_by: frozenset[str] = CALLS
    words: str = ""

    @property
    def said(self) -> str:
        return self.words or KIND_WORDS[self.kind]


# What gates are expected to say of a kind of fault, among other things that calls have in common.
KIND_WORDS = {
    "timesteps": "timestep [0-9.]+",
    "conditions": "one condition is taken for all samples",
    "captions": "a token count of",
    "masks": "(empty|partial|full) masks|or full|or partial|one mask is taken for all samples",
    "state": "what an earlier call left is used|the condition of an earlier call is kept",
    "threads": "callers share a slot or a buffer",
}


def batch(inputs: Arrays) -> int:
    return len(inputs["hidden_states"])


def condition(inputs: Arrays) -> Arrays:
    """The inputs that stay the same from step to step."""
    return {name: array for name, array in inputs.items() if name not in STEP_INPUTS}


# --- wrong for some inputs ------------------------------------------------------------------------------------------


def wrong_where(rows: Callable[[Arrays], NDArray[np.bool_] | bool]) -> Callable[[Run], Run]:
    """Samples that `rows` names (or all of a call) come out 10 % too large."""

    def plant(run: Run) -> Run:
        def faulty(inputs: Arrays) -> Arrays:
            sample = run(inputs)["sample"]
            chosen = np.broadcast_to(rows(inputs), len(sample)).reshape(-1, *[1] * (sample.ndim - 1))
            return {"sample": np.where(chosen, sample * np.float32(1.1), sample)}

        return faulty

    return plant


def on_inputs(change: Callable[[Arrays], Arrays]) -> Callable[[Run], Run]:
    """The engine computes with changed inputs."""
    return lambda run: lambda inputs: run(inputs | change(inputs))


def on_output(change: Callable[[Arrays, NDArray[Any]], NDArray[Any]]) -> Callable[[Run], Run]:
    return lambda run: lambda inputs: {"sample": change(inputs, run(inputs)["sample"])}


def _first_for_all(*names: str) -> Callable[[Run], Run]:
    """Every sample has the input of the first."""

    def change(inputs: Arrays) -> Arrays:
        return {name: np.repeat(inputs[name][:1], batch(inputs), axis=0) for name in names if name in inputs}

    return on_inputs(change)


def _first_condition_for_all(run: Run) -> Run:
    def faulty(inputs: Arrays) -> Arrays:
        shared = {
            name: np.repeat(array[:1], len(array), axis=0)
            for name, array in condition(inputs).items()
            if len(array) == batch(inputs)
        }
        return run(inputs | shared)

    return faulty


def _clipped(inputs: Arrays) -> Arrays:
    return {"hidden_states": np.clip(inputs["hidden_states"], -5, 5)}


def _overflow(inputs: Arrays, sample: NDArray[Any]) -> NDArray[Any]:
    """Not finite where a latent is beyond 8, as a product in FP16 would be."""
    large = np.abs(inputs["hidden_states"]).max(axis=(1, 2, 3), keepdims=True) > 8
    return np.where(large, np.float32(np.inf), sample)


def _rows_swapped_at_two(_: Arrays, sample: NDArray[Any]) -> NDArray[Any]:
    return sample[::-1].copy() if len(sample) == 2 else sample


def _odd_last_row(_: Arrays, sample: NDArray[Any]) -> NDArray[Any]:
    """Rows are computed in pairs; the last of an odd number gets its neighbour's."""
    if len(sample) % 2 and len(sample) > 1:
        sample = sample.copy()
        sample[-1] = sample[-2]
    return sample


def _ones_for_partial_masks(inputs: Arrays) -> Arrays:
    return {name: np.ones_like(array) for name, array in inputs.items() if "mask" in name}


def _empty_masks_as_full(inputs: Arrays) -> Arrays:
    """A mask of zeros is taken for "none given". (In PixArt both give the same: a constant on all scores.)"""
    masks = {name: array for name, array in inputs.items() if "mask" in name}
    empty = {name: (array == 0).all(axis=1, keepdims=True) for name, array in masks.items()}
    return {name: np.where(empty[name], np.ones_like(array), array) for name, array in masks.items()}


def _caption_cut(inputs: Arrays, length: int) -> Arrays:
    """Tokens from `length` on are masked."""
    masks = {name: array.copy() for name, array in inputs.items() if "mask" in name}
    for array in masks.values():
        array[:, length:] = 0
    return masks


def _labels_with_the_last_lost(inputs: Arrays) -> Arrays:
    return {"class_labels": np.minimum(inputs["class_labels"], 9)}


def _caption_length(inputs: Arrays) -> int:
    return int(inputs[CAPTION].shape[1])


class OtherLengths:
    """Wrong at every caption length but the first that it sees."""

    def __init__(self, run: Run) -> None:
        self.run, self.first = run, 0

    def __call__(self, inputs: Arrays) -> Arrays:
        self.first = self.first or _caption_length(inputs)
        sample = self.run(inputs)["sample"]
        return {"sample": sample if _caption_length(inputs) == self.first else sample * np.float32(1.1)}


# --- what is kept from call to call ---------------------------------------------------------------------------------


class Kept:
    """Goes on using the condition it has seen while `same(kept, new)` says that nothing changed, for each `key`."""

    def __init__(self, run: Run, same: Callable[[Arrays, Arrays], bool], key: Callable[[Arrays], Any] = batch) -> None:
        self.run, self.same, self.key = run, same, key
        self.kept: dict[Any, Arrays] = {}
        self.given: dict[Any, Arrays] = {}

    def __call__(self, inputs: Arrays) -> Arrays:
        new, key = condition(inputs), self.key(inputs)
        shapes = {name: array.shape for name, array in new.items()}
        known = self.kept.get(key)
        usable = known is not None and {name: array.shape for name, array in known.items()} == shapes
        if not usable or not self.same(self.given[key] if self.same is _identical else self.kept[key], new):
            self.kept[key], self.given[key] = {name: array.copy() for name, array in new.items()}, dict(new)
        return self.run(inputs | self.kept[key])


def kept(same: Callable[[Arrays, Arrays], bool], key: Callable[[Arrays], Any] = batch) -> Callable[[Run], Run]:
    return partial(Kept, same=same, key=key)


def _always(_: Arrays, __: Arrays) -> bool:
    return True


def _first_number(old: Arrays, new: Arrays) -> bool:
    return all(old[name].flat[0] == new[name].flat[0] for name in new)


def _first_row(old: Arrays, new: Arrays) -> bool:
    return all(np.array_equal(old[name][:1], new[name][:1]) for name in new)


def _identical(old: Arrays, new: Arrays) -> bool:
    """The same arrays, whatever they hold by now."""
    return all(old[name] is new[name] for name in new)


def _same_sums(old: Arrays, new: Arrays) -> bool:
    return all(abs(float(old[name].sum()) - float(new[name].sum())) < 1e-3 for name in new)


def _same_but_masks(old: Arrays, new: Arrays) -> bool:
    return all(np.array_equal(old[name], new[name]) for name in new if "mask" not in name)


def _nearly(old: Arrays, new: Arrays) -> bool:
    return all(np.allclose(old[name], new[name], rtol=0.1, atol=0.1) for name in new)


class OneCallLate:
    """A changed condition is used from the next call on."""

    def __init__(self, run: Run) -> None:
        self.run, self.last = run, {}  # type: tuple[Run, Arrays]

    def __call__(self, inputs: Arrays) -> Arrays:
        new = {name: array.copy() for name, array in condition(inputs).items()}
        fits = self.last and all(self.last[name].shape == new[name].shape for name in new)
        used, self.last = self.last if fits else new, new
        return self.run(inputs | used)


class FromCall:
    """Wrong from one call on."""

    def __init__(self, run: Run, first: int) -> None:
        self.run, self.first, self.calls = run, first, 0

    def __call__(self, inputs: Arrays) -> Arrays:
        self.calls += 1
        sample = self.run(inputs)["sample"]
        return {"sample": sample * np.float32(1.1) if self.calls >= self.first else sample}


class Drifting:
    """Every call adds a little: an accumulator that is never cleared."""

    def __init__(self, run: Run) -> None:
        self.run, self.calls = run, 0

    def __call__(self, inputs: Arrays) -> Arrays:
        self.calls += 1
        return {"sample": self.run(inputs)["sample"] * np.float32(1 + 2e-3 * self.calls)}


class OneSlot:
    """Inputs pass through one slot; a second thread may fill it before the first has read it."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.slot: Arrays = {}

    def __call__(self, inputs: Arrays) -> Arrays:
        self.slot = condition(inputs)
        if threading.active_count() > 1:
            time.sleep(0.002)
        mine = self.slot
        usable = all(mine[name].shape == array.shape for name, array in condition(inputs).items())
        return self.run(inputs | mine) if usable else self.run(inputs)


class OneBuffer:
    """Results of all calls of one shape lie in one buffer, so a call overwrites what an earlier one returned."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.buffers: dict[tuple[int, ...], NDArray[Any]] = {}

    def __call__(self, inputs: Arrays) -> Arrays:
        sample = self.run(inputs)["sample"]
        buffer = self.buffers.setdefault(sample.shape, sample.copy())
        buffer[...] = sample
        return {"sample": buffer}


def _writes_into_its_input(run: Run) -> Run:
    """The caller's latents are scaled in place after they were read."""

    def faulty(inputs: Arrays) -> Arrays:
        outputs = run(inputs)
        if inputs["hidden_states"].flags.writeable:
            inputs["hidden_states"] *= np.float32(1.01)
        return outputs

    return faulty


CALL_FAULTS = (
    # sizes
    CallFault("wrong at batch 1", "batches", wrong_where(lambda inputs: batch(inputs) == 1), ALL, words="batch 1[ ,]"),
    CallFault("wrong at batch 2", "batches", wrong_where(lambda inputs: batch(inputs) == 2), words="batch 2[ ,]"),
    CallFault("wrong at batch 3", "batches", wrong_where(lambda inputs: batch(inputs) == 3), words="batch 3[ ,]"),
    CallFault(
        "wrong above batch 8", "batches", wrong_where(lambda inputs: batch(inputs) > 8), ALL, words="batch 9[ ,]"
    ),
    CallFault(
        "ninth sample wrong",
        "batches",
        wrong_where(lambda inputs: np.arange(batch(inputs)) == 8),
        words="place 8 in the batch",
    ),
    CallFault(
        "rows swapped at batch 2", "batches", on_output(_rows_swapped_at_two), words="rows are exchanged or repeated"
    ),
    CallFault("last row of an odd batch", "batches", on_output(_odd_last_row), words="the last place of an odd batch"),
    # timesteps
    CallFault("wrong below t = 20", "timesteps", wrong_where(lambda inputs: inputs["timestep"] < 20), ALL),
    CallFault("wrong at t = 975", "timesteps", wrong_where(lambda inputs: np.round(inputs["timestep"]) == 975)),
    CallFault("wrong at t = 999 and above", "timesteps", wrong_where(lambda inputs: inputs["timestep"] == 999)),
    CallFault(
        "first timestep for all",
        "timesteps",
        _first_for_all("timestep"),
        ALL,
        words="one timestep is taken for all samples",
    ),
    CallFault("first condition for all", "conditions", _first_condition_for_all),
    # captions
    CallFault(
        "wrong at odd lengths", "captions", wrong_where(lambda inputs: _caption_length(inputs) % 2 == 1), CAPTIONED
    ),
    CallFault("wrong at one token", "captions", wrong_where(lambda inputs: _caption_length(inputs) == 1), CAPTIONED),
    CallFault("wrong at other lengths", "captions", OtherLengths, CAPTIONED),
    CallFault(
        "wrong at the longest", "captions", wrong_where(lambda inputs: _caption_length(inputs) >= 120), ("pixart",)
    ),
    # masks
    CallFault("mask of ones", "masks", on_inputs(_ones_for_partial_masks), ("pixart_mini", "pixart", "hunyuan")),
    CallFault("empty mask as full", "masks", on_inputs(_empty_masks_as_full), ("hunyuan",)),
    CallFault(
        "mask of the first sample",
        "masks",
        _first_for_all("encoder_attention_mask", "text_embedding_mask"),
        ("pixart_mini", "hunyuan"),
    ),
    CallFault(
        "tokens after the third masked", "masks", on_inputs(partial(_caption_cut, length=3)), ("pixart_mini", "hunyuan")
    ),
    # values
    CallFault("latents clipped at 5", "values", on_inputs(_clipped), MINIS, words="latents that reach"),
    CallFault("overflow beyond 8", "values", on_output(_overflow), words="NaN or Inf where the reference is finite"),
    CallFault("no class lost", "values", on_inputs(_labels_with_the_last_lost), CLASSES, words="class [0-9]+"),
    # state
    CallFault("condition never refreshed", "state", kept(_always, key=lambda _: None), ALL),
    CallFault("condition kept per batch", "state", kept(_always), ALL),
    CallFault("refreshed by the first number", "state", kept(_first_number)),
    CallFault("refreshed by the first sample", "state", kept(_first_row)),
    CallFault("refreshed by identity", "state", kept(_identical), words="by the array, not by its numbers"),
    CallFault("refreshed by sums", "state", kept(_same_sums), ("dit_mini", "dit")),
    CallFault(
        "mask not compared",
        "state",
        kept(_same_but_masks),
        ("pixart_mini", "hunyuan"),
        KEPT,
        words="masks are not compared",
    ),
    CallFault(
        "refreshed by large changes",
        "state",
        kept(_nearly),
        (*CAPTIONED, "hunyuan"),
        KEPT,
        words="while it is close to the one before",
    ),
    CallFault("condition one call late", "state", OneCallLate),
    CallFault("wrong from call 41 on", "state", partial(FromCall, first=41), ALL, words="from call to call"),
    CallFault("drifting", "state", Drifting),
    CallFault(
        "one buffer for all results",
        "state",
        OneBuffer,
        words="the result of another call is given|what an earlier call left is used",
    ),
    CallFault("writes into its input", "state", _writes_into_its_input),
    CallFault("one slot for all threads", "threads", OneSlot, ALL),
)
