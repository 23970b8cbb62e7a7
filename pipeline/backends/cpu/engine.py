"""Runs a built `cpu` engine. Apart from the compiler, so that running needs only NumPy and onnxruntime."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
from typing_extensions import TypedDict

from export.errors import RecipeError
from pipeline import machine
from pipeline.backends import feeds, metadata_file
from pipeline.backends.base import CONDITION, MODEL, Arrays
from pipeline.backends.stock_runtime import opened, own, run_session
from pipeline.passes.probes import WIDE_SUM
from plugins.cpu import library

METADATA = metadata_file.NAME
# Conditions whose results are kept: the last one of two callers. A third caller's is computed again at every call.
KEPT = 2
# Instruction sets whose byte products are summed in 32 bits; without one of them x86 sums pairs in saturating int16.
WIDE_SUM_SETS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"})


class CpuMetadata(TypedDict):
    """metadata.json of the target. requires: capabilities without which the engine is not exact, see `provided`."""

    requires: list[str]


class CpuNeeds(TypedDict):
    """As CpuMetadata, in the manifest."""

    requires: NotRequired[list[str]]


def provided(instruction_sets: Collection[str]) -> frozenset[str]:
    """The capabilities of a CPU with these instruction sets and of this installation."""
    wide = set() if WIDE_SUM_SETS.isdisjoint(instruction_sets) else {WIDE_SUM}
    return frozenset(wide | {library.requirement()})


def lacking(required: Collection[str], provided: Collection[str]) -> str | None:
    """Why an engine that requires these capabilities does not run exactly here, with a remedy; None if it does."""
    missing = sorted(set(required) - set(provided))
    versions = [name.removeprefix(library.PREFIX) for name in missing if name.startswith(library.PREFIX)]
    if versions:
        return (
            f"target cpu was proven with version {versions[0]} of the kernel library, this installation has "
            f"{library.version()}; build the engine again, or install the release that built it"
        )
    if missing:
        return f"target cpu was built for CPUs with {', '.join(missing)}, which this one lacks; build it here"
    return None


@dataclass(frozen=True)
class Sessions:
    """What runs at every call, and what runs for a new condition (None: nothing depends on the condition alone)."""

    step: Any
    condition: Any | None


@dataclass(frozen=True)
class Kept:
    """A condition, copied, and what was computed from that copy; never changed."""

    condition: Arrays
    results: Arrays

    def is_of(self, inputs: Arrays) -> bool:
        """Do all numbers of the condition equal those in `inputs`?"""
        return all(_equal(array, inputs.get(name)) for name, array in self.condition.items())


class CpuEngine:
    """One or two onnxruntime sessions on the CPU. `run` may be called from any number of threads.

    What depends on the condition alone (keys and values of cross-attention) is computed when a condition is new, and
    kept. Whether it is new is decided by comparing all its numbers with a copy. A call computes with its own copies of
    the inputs, so callers may reuse or overwrite their arrays at any time, and takes the kept results once, together
    with the condition they belong to. The sessions themselves keep nothing between calls.
    """

    def __init__(self, folder: Path, threads: int = 0) -> None:
        """threads: of one call; 0: as many as `machine.threads` allows. Raises ContractError for damaged files."""
        native = library.requirement() in required(folder)
        split = (folder / CONDITION).is_file()
        step = open_session(folder / MODEL, threads, native)
        self.sessions: Sessions | None = Sessions(
            step, open_session(folder / CONDITION, threads, native) if split else None
        )
        self.outputs = [output.name for output in step.get_outputs()]
        self.declared = declared_inputs(self.sessions)
        self.step_inputs = {value.name for value in step.get_inputs()}
        self.kept: tuple[Kept, ...] = ()

    def run(self, inputs: Arrays) -> Arrays:
        """Outputs by name for inputs by name. Raises RecipeError for inputs that do not fit, and once closed."""
        sessions = self.sessions
        if sessions is None:
            raise RecipeError("the engine is closed; load it again")
        kept = next((row for row in self.kept if row.is_of(inputs)), None)
        known = {} if kept is None else kept.condition
        call = {name: known[name] if name in known else own(array) for name, array in inputs.items()}
        feeds.check_feeds(self.declared, call)
        if kept is None and sessions.condition is not None:
            kept = self._prepare(sessions.condition, call)
        results = {} if kept is None else kept.results
        fed = {name: array for name, array in (call | results).items() if name in self.step_inputs}
        return run_session(sessions.step, self.outputs, fed)

    def _prepare(self, session: Any, call: Arrays) -> Kept:
        """Compute what depends on the condition alone. Of callers at the same time one may lose its place in `kept`,
        which costs time, never a result: each goes on with what it made."""
        condition = {value.name: call[value.name] for value in session.get_inputs()}
        kept = Kept(condition, run_session(session, [output.name for output in session.get_outputs()], condition))
        self.kept = (kept, *self.kept[: KEPT - 1])
        return kept

    def forget(self) -> None:
        """Drop the kept conditions: the next call computes its own again."""
        self.kept = ()

    def close(self) -> None:
        """Free the sessions, when the calls that are running have ended; later calls raise RecipeError."""
        self.sessions = None
        self.forget()


def _equal(array: Any, other: Any) -> bool:
    fits = getattr(other, "dtype", None) == array.dtype and getattr(other, "shape", None) == array.shape
    return bool(fits and np.array_equal(array, other))


def declared_inputs(sessions: Sessions) -> tuple[feeds.Declared, ...]:
    """The engine's own inputs: those of both sessions, without what one hands to the other."""
    parts = [part for part in (sessions.condition, sessions.step) if part is not None]
    handed = {value.name for part in parts for value in part.get_outputs()}
    rows = {row.name: row for part in parts for row in feeds.of_session(part)}
    return tuple(row for name, row in rows.items() if name not in handed)


def required(folder: Path) -> frozenset[str]:
    """Capabilities that an engine needs to be exact, from its metadata.json. Raises ContractError."""
    return frozenset(metadata_file.read(folder, CpuMetadata)["requires"])


def open_session(path: Path, threads: int = 0, native: bool = False) -> Any:
    """Session of a lowered graph; threads 0: as many as `machine.threads` allows. native: with the kernel library.

    onnxruntime adds its fusions of transposes, scales and biases. It may not touch pairs of QuantizeLinear and
    DequantizeLinear: here they split an integer into limbs. No code beside the graph is looked for or loaded.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or machine.threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    # Idle threads sleep instead of spinning, so that engines do not steal each other's cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if native:
        library.register(options)
    return opened(ort, path, options)
