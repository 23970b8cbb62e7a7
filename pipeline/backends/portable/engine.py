"""Runs a portable model in stock onnxruntime: function bodies are inlined by it, nothing of ours is registered."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.backends.base import DATA, MODEL
from pipeline.backends.sessions import SessionEngine, Sessions, opened, session_options

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

# onnxruntime folds constants, so that weights are decoded once, and needs some 38 bytes for each weight while it does
# (see export/dialect/ops.py). Above this size of the packed file weights stay packed, and are decoded in every call.
FOLDED_BYTES = 8 * 2**20


class PortableEngine(SessionEngine):
    """The portable model whole: nothing is kept between calls."""

    def __init__(self, folder: Path, threads: int = 0) -> None:
        super().__init__(Sessions(open_portable(folder / MODEL, threads)))


def open_portable(path: Path, threads: int = 0) -> InferenceSession:
    """Session of a portable model with all of onnxruntime's optimizations, of a large one with the basic ones, and not
    decoded ahead; threads 0: as many as `machine.threads` allows."""
    from onnxruntime import GraphOptimizationLevel

    options, data, skipped = session_options(threads), path.with_name(DATA), []
    if data.is_file() and data.stat().st_size > FOLDED_BYTES:
        skipped = ["ConstantFolding"]
        # The others fuse none of its decoders: they double the time to open it and save none in a call.
        options.graph_optimization_level = GraphOptimizationLevel.ORT_ENABLE_BASIC
        # Freed tensors go back to the system: arena and memory pattern would keep room for all decoded weights at once.
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    return opened(path, options, skipped)
