"""Sessions of stock onnxruntime, opened and run with its errors in words of ours, and engines made of them."""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from export.documents import open_file
from export.errors import ContractError, RecipeError
from pipeline import machine
from pipeline.backends import feeds
from pipeline.backends.base import Arrays
from pipeline.backends.mapped_pages import MappedPages
from pipeline.backends.sizes import evaluated
from pipeline.files import is_out_of_memory
from plugins.cpu import library

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, RunOptions, SessionOptions

# Conditions whose results are kept: the last one of two callers. A third caller's is computed again at every call.
KEPT = 2
# Timesteps whose results are kept: those of a whole picture, which the next one has again.
KEPT_TIMESTEPS = 64
ALIGNMENT = 64  # bytes, of each array that is kept


@contextmanager
def runtime_errors(path: Path) -> Iterator[None]:
    """Within, onnxruntime works on the graph in `path`; a refusal becomes a ContractError. Lack of memory stays so."""
    try:
        yield
    except Exception as error:
        if (reason := refusal(error)) is None:
            raise
        raise ContractError(
            f"{path}: onnxruntime refuses it ({reason}); verify the bundle, or build it again"
        ) from error


def refusal(error: Exception) -> str | None:
    """Why onnxruntime refused, None for what is no refusal of its own: lack of memory stays so."""
    # Its classes, one for each cause, share no base. A message with a name that is not UTF-8 is a UnicodeDecodeError.
    own = type(error).__module__.startswith("onnxruntime.") or isinstance(error, UnicodeDecodeError)
    return " ".join(str(error).split())[:300] if own and not is_out_of_memory(error) else None


def session_options(threads: int) -> SessionOptions:
    """Those of every engine's session; threads 0: as many as `machine.threads` allows."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or machine.threads()
    options.log_severity_level = 3
    # Idle threads sleep instead of spinning, so that engines do not steal each other's cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


# onnxruntime's execution providers, or pairs of one and its options, in the order in which they are asked for a node.
Providers = Sequence[str | tuple[str, dict[str, str]]]
CPU_PROVIDER = "CPUExecutionProvider"


def opened(
    path: Path, options: SessionOptions, without: Sequence[str] = (), providers: Providers = (CPU_PROVIDER,)
) -> InferenceSession:
    """onnxruntime's session of a file, `without` some of its optimizers. Raises ContractError where it refuses it."""
    import onnxruntime

    left_out = {"disabled_optimizers": list(without)} if without else {}
    open_file(path).close()  # refuses what is no file
    with runtime_errors(path):
        return onnxruntime.InferenceSession(path, options, providers=list(providers), **left_out)


def register_needed(options: SessionOptions, domains: Iterable[str]) -> None:
    """Give a session the kernel library of this package if one of its graph's op domains is the library's."""
    if library.DOMAIN in domains:
        library.register(options)


def _shrinking(session: InferenceSession) -> RunOptions | None:
    """What the session's arena, if it has one, has taken for a call goes back to the system at the call's end."""
    import onnxruntime

    if not session.get_session_options().enable_cpu_mem_arena:
        return None
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def run_session(session: InferenceSession, names: list[str], fed: Arrays) -> Arrays:
    """Outputs of one session. Raises RecipeError where onnxruntime refuses the numbers, such as a class too high, and
    ContractError where an operation of the graph fails by itself.

    They are copies: onnxruntime's arrays lie in its arena, and one that a caller holds would keep a region of many
    times its size from the system, those of each call another."""
    try:
        outputs = session.run(names, fed, _shrinking(session))
        return {name: own(array) for name, array in zip(names, outputs, strict=True)}
    except Exception as error:
        if (reason := refusal(error)) is None:
            raise
        if type(error).__name__ == "InvalidArgument":
            remedy = "give numbers that the model knows, such as classes that it was trained on; "
            remedy += "and no more tokens than it has positions"
            raise RecipeError(f"the engine cannot run these inputs ({reason}); {remedy}") from error
        # onnxruntime may have made a slice of a lookup by places, whose result then does not fit.
        remedy = "give no more tokens than the model has positions; else verify the bundle, or build it again"
        raise ContractError(f"the engine's graph fails in onnxruntime ({reason}); {remedy}") from error


def run_to_keep(session: InferenceSession, fed: Arrays) -> Arrays:
    """All outputs of one session, in one block of memory of their own. Among the tensors of a call they would leave
    holes that the C library does not fill. Raises as `run_session`."""
    try:
        kept, names = _block(session, fed), [output.name for output in session.get_outputs()]
    except UnicodeDecodeError as error:
        remedy = "verify the bundle, or build it again"
        raise ContractError(f"the engine's graph has a name that is no text ({error}); {remedy}") from error
    if kept is None:
        return run_session(session, names, fed)
    binding = session.io_binding()
    for name, array in fed.items():
        binding.bind_cpu_input(name, array)
    for name, array in kept.items():
        binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    try:
        session.run_with_iobinding(binding, _shrinking(session))
    except RuntimeError:  # of every cause, which a plain run tells by its class
        return run_session(session, names, fed)
    return kept


def _block(session: InferenceSession, fed: Arrays) -> Arrays | None:
    """Arrays for all outputs, one behind the other, with nothing in them yet; None where the sizes of one are neither
    those of inputs nor made of these. onnxruntime refuses an array that is not of its result's shape; shape () is one
    that it does not know."""
    sizes: dict[str, int] = {}
    for value in session.get_inputs():
        named = zip(value.shape, fed[value.name].shape, strict=True)
        sizes.update((name, size) for name, size in named if isinstance(name, str))
    places, end = [], 0
    for output in session.get_outputs():
        shape = [size if isinstance(size, int) else evaluated(size or "", sizes) for size in output.shape]
        known = [size for size in shape if size is not None]
        if not shape or len(known) < len(shape) or output.type not in feeds.ELEMENT_TYPES:
            return None
        dtype = np.dtype(feeds.ELEMENT_TYPES[output.type])
        places.append((output.name, dtype, known, end))
        end += -(-math.prod(known) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    # Not from the C library: when so large a block is freed, it takes smaller ones from its heap, which then has holes.
    try:
        block = np.frombuffer(private_memory(end), np.uint8)
    except (OSError, OverflowError, ValueError):  # no bytes, or more than there are: onnxruntime's own run says which
        return None
    return {
        name: block[start : start + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
        for name, dtype, shape, start in places
    }


def private_memory(size_bytes: int) -> mmap.mmap:
    """Memory of this process alone, the system's again with the last reference to it."""
    if sys.platform == "win32":
        return mmap.mmap(-1, size_bytes)
    return mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


# --- engines --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A session that runs beside the step's. pages: of the weights that only it reads. room: as many of the step's,
    which are given back while it runs, so that at no time all weights are in memory."""

    session: InferenceSession
    pages: MappedPages = field(default_factory=MappedPages)
    room: MappedPages = field(default_factory=MappedPages)

    @contextmanager
    def in_memory(self) -> Iterator[InferenceSession]:
        """Within, the session may be run."""
        self.room.give_back()
        try:
            yield self.session
        finally:
            self.pages.give_back()


@dataclass(frozen=True)
class Sessions:
    """What runs at every call for every sample; what runs for a new condition (None: nothing depends on the condition
    alone), and what runs for a new timestep (None: likewise)."""

    step: InferenceSession
    condition: Part | None = None
    timestep: Part | None = None


@dataclass(frozen=True)
class KeptCondition:
    """A condition, copied, and what was computed from that copy; never changed."""

    condition: Arrays
    results: Arrays

    def is_of(self, inputs: Arrays) -> bool:
        """Do all numbers of the condition equal those in `inputs`?"""
        return all(_equal(array, inputs.get(name)) for name, array in self.condition.items())


class SessionEngine:
    """One to three onnxruntime sessions on the CPU. `run` may be called from any number of threads.

    What depends on the condition alone (keys and values of cross-attention) is computed when a condition is new, and
    kept; so is what depends on the timestep alone. Whether a condition is new is decided by comparing all its numbers
    with a copy. A call computes with its own copies of the inputs, so callers may reuse or overwrite their arrays at
    any time, and takes the kept results once, together with the condition they belong to. The sessions themselves keep
    nothing between calls.
    """

    def __init__(self, sessions: Sessions) -> None:
        self.sessions: Sessions | None = sessions
        self.outputs = [output.name for output in sessions.step.get_outputs()]
        self.declared = declared_inputs(sessions)
        self.step_inputs = {value.name for value in sessions.step.get_inputs()}
        self.kept: tuple[KeptCondition, ...] = ()
        self.kept_timesteps: dict[bytes, Arrays] = {}

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
            with sessions.condition.in_memory() as session:
                kept = self._prepare(session, call)
        results = {} if kept is None else kept.results
        if sessions.timestep is not None:
            results = results | self._of_timestep(sessions.timestep, call)
        fed = {name: array for name, array in (call | results).items() if name in self.step_inputs}
        return run_session(sessions.step, self.outputs, fed)

    def _prepare(self, session: InferenceSession, call: Arrays) -> KeptCondition:
        """Compute what depends on the condition alone. Of callers at the same time one may lose its place in `kept`,
        which costs time, never a result: each goes on with what it made."""
        condition = {value.name: call[value.name] for value in session.get_inputs()}
        kept = KeptCondition(condition, run_to_keep(session, condition))
        self.kept = (kept, *self.kept[: KEPT - 1])
        self._keep_nothing_once_closed()
        return kept

    def _of_timestep(self, part: Part, call: Arrays) -> Arrays:
        """What depends on the timestep alone, a row for each sample; computed once for all that have the same, in this
        call and in earlier ones."""
        (name,) = (value.name for value in part.session.get_inputs())
        outputs = [value.name for value in part.session.get_outputs()]
        times = {time.tobytes(): time for time in call[name]}  # by their bits: NaN equals itself, 0 is not -0
        kept = self.kept_timesteps
        if new := {key: time for key, time in times.items() if key not in kept}:
            with part.in_memory() as session:
                rows = run_session(session, outputs, {name: np.array(list(new.values()))})
            kept = kept | {key: {output: rows[output][i] for output in outputs} for i, key in enumerate(new)}
            self.kept_timesteps = dict(list(kept.items())[-KEPT_TIMESTEPS:])
            self._keep_nothing_once_closed()
        return {output: np.stack([kept[time.tobytes()][output] for time in call[name]]) for output in outputs}

    def _keep_nothing_once_closed(self) -> None:
        """For a call that the engine was closed under: `close` may have forgotten before it kept its own results."""
        if self.sessions is None:
            self.forget()

    def forget(self) -> None:
        """Drop what is kept of conditions and timesteps: the next call computes its own again."""
        self.kept, self.kept_timesteps = (), {}

    def close(self) -> None:
        """Free the sessions, when the calls that are running have ended; later calls raise RecipeError."""
        self.sessions = None
        self.forget()


def own(array: NDArray[np.generic]) -> NDArray[np.generic]:
    """A private copy of an array; what is none is left for the check of inputs to refuse."""
    return np.array(array, order="C") if isinstance(array, np.ndarray) else array


def _equal(array: NDArray[np.generic], other: NDArray[np.generic] | None) -> bool:
    if not isinstance(other, np.ndarray):
        return False
    return other.dtype == array.dtype and np.array_equal(array, other)


def declared_inputs(sessions: Sessions) -> tuple[feeds.Declared, ...]:
    """The engine's own inputs: those of all sessions, without what one hands to the other."""
    parts = [part.session for part in (sessions.condition, sessions.timestep) if part is not None] + [sessions.step]
    handed = {value.name for part in parts for value in part.get_outputs()}
    rows = {row.name: row for part in parts for row in feeds.of_session(part)}
    return tuple(row for name, row in rows.items() if name not in handed)
