"""Runs a portable model in stock onnxruntime: function bodies are inlined by it, nothing of ours is registered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from export.errors import RecipeError
from pipeline import machine
from pipeline.backends import feeds
from pipeline.backends.base import DATA, MODEL, Arrays
from pipeline.backends.stock_runtime import opened, own, run_session

# onnxruntime folds constants, so that weights are decoded once, and needs some 38 bytes for each weight while it does
# (see export/dialect/ops.py). Above this size of the packed file weights stay packed, and are decoded in every call.
FOLDED_BYTES = 8 * 2**20


class PortableEngine:
    """One onnxruntime session on the CPU. Keeps nothing between calls, so it may be called from several threads.

    A call computes with its own copies of the inputs, so callers may overwrite their arrays at any time.
    """

    def __init__(self, folder: Path, threads: int = 0) -> None:
        self.session: Any = open_portable(folder / MODEL, threads)
        self.declared = feeds.of_session(self.session)
        self.outputs = [value.name for value in self.session.get_outputs()]

    def run(self, inputs: Arrays) -> Arrays:
        """Outputs by name for inputs by name. Raises RecipeError for inputs that do not fit, and once closed."""
        session = self.session
        if session is None:
            raise RecipeError("the engine is closed; load it again")
        call = {name: own(array) for name, array in inputs.items()}
        feeds.check_feeds(self.declared, call)
        return run_session(session, self.outputs, call)

    def close(self) -> None:
        """Free the session; the engine cannot run afterwards."""
        self.session = None


def open_portable(path: Path, threads: int = 0) -> Any:
    """Session of a portable model with all of onnxruntime's optimizations, of a large one with the basic ones, and not
    decoded ahead; threads 0: as many as `machine.threads` allows."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or machine.threads()
    options.log_severity_level = 3
    # Idle threads sleep instead of spinning, so that engines do not steal each other's cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    data = path.with_name(DATA)
    skipped = []
    if data.is_file() and data.stat().st_size > FOLDED_BYTES:
        skipped = ["ConstantFolding"]
        # The others fuse none of its decoders: they double the time to open it and save none in a call.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        # Freed tensors go back to the system: arena and memory pattern would keep room for all decoded weights at once.
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    return opened(ort, path, options, skipped)
