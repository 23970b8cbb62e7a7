"""Runs a built `cpu` engine. Apart from the compiler, so that running needs only NumPy and onnxruntime."""

from __future__ import annotations

import threading
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired

from typing_extensions import TypedDict

from export.errors import ContractError
from pipeline.backends import metadata_file
from pipeline.backends.base import CONDITION, DATA, MODEL, TIMESTEP
from pipeline.backends.mapped_pages import MappedPages, mapped_pages
from pipeline.backends.sessions import Part, SessionEngine, Sessions, opened, session_options
from pipeline.passes.probes import WIDE_SUM
from plugins.cpu import library

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

# Instruction sets whose byte products are summed in 32 bits; without one of them x86 sums pairs in saturating int16.
WIDE_SUM_SETS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"})
# One session of this process is opened at a time: what of a file is mapped beside what was before is then its own.
OPENING = threading.RLock()


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


def lacking(needs: Collection[str], present: Collection[str]) -> str | None:
    """Why an engine that requires these capabilities does not run exactly here, with a remedy; None if it does."""
    missing = sorted(set(needs) - set(present))
    versions = [name.removeprefix(library.PREFIX) for name in missing if name.startswith(library.PREFIX)]
    if versions:
        return (
            f"target cpu was proven with version {versions[0]} of the kernel library, this installation has "
            f"{library.version()}; build the engine again, or install the release that built it"
        )
    if missing:
        return f"target cpu was built for CPUs with {', '.join(missing)}, which this one lacks; build it here"
    return None


class CpuEngine(SessionEngine):
    """Sessions of model.onnx and, where they are there, condition.onnx and timestep.onnx."""

    def __init__(self, folder: Path, threads: int = 0) -> None:
        """threads: of one call; 0: as many as `machine.threads` allows. Raises ContractError for damaged files."""
        super().__init__(open_sessions(folder, threads))


def required(folder: Path) -> frozenset[str]:
    """Capabilities that an engine needs to be exact, from its metadata.json. Raises ContractError."""
    return frozenset(metadata_file.read(folder, CpuMetadata)["requires"])


def open_sessions(folder: Path, threads: int = 0, profile: Path | None = None) -> Sessions:
    """Those of an engine's folder; threads, profile (of the step) as in `open_session`."""
    with_library = library.requirement() in required(folder)
    step, of_step = open_with_pages(folder / MODEL, threads, with_library, profile)

    def part(name: str) -> Part | None:
        if not (folder / name).is_file():
            return None
        session, pages = open_with_pages(folder / name, threads, with_library)
        return Part(session, pages, of_step.part(pages.size_bytes()))

    sessions = Sessions(step, condition=part(CONDITION), timestep=part(TIMESTEP))
    if sessions.timestep is not None:
        names = [value.name for value in sessions.timestep.session.get_inputs()]
        if len(names) != 1:
            read = ", ".join(names) or "nothing"
            raise ContractError(f"{folder / TIMESTEP}: it reads {read} instead of the timestep; build the engine again")
    return sessions


def open_with_pages(
    path: Path, threads: int, with_library: bool, profile: Path | None = None
) -> tuple[InferenceSession, MappedPages]:
    """As `open_session`, and the pages of the weights that this session has mapped. Those of others, of an engine of
    the same file, too, may become another's memory at any time, and must never be given back."""
    data = path.with_name(DATA)
    with OPENING:
        before = mapped_pages(data)
        session = open_session(path, threads, with_library, profile)
        return session, mapped_pages(data) - before


def open_session(
    path: Path, threads: int = 0, with_library: bool = False, profile: Path | None = None
) -> InferenceSession:
    """Session of a lowered graph, with the kernel library or without; threads 0: as many as `machine.threads` allows.
    profile: how the file of onnxruntime's profiler begins, None for no profile.

    onnxruntime adds its fusions of transposes, scales and biases. It may not touch pairs of QuantizeLinear and
    DequantizeLinear: here they split an integer into limbs. No code beside the graph is looked for or loaded.
    """
    options = session_options(threads)
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    # A tensor goes back to the arena when its last reader has run, and what the arena holds to the system when the call
    # ends (`run_session`): by itself the C library returns blocks of this size at once, and every layer would have its
    # pages from the system anew. A buffer that is planned for several tensors would live until the last of them, those
    # of the widest layers as long as the whole call; a block planned for all, beside the first call's tensors.
    options.enable_mem_reuse = options.enable_mem_pattern = False
    if with_library:
        library.register(options)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    with OPENING:
        return opened(path, options)
