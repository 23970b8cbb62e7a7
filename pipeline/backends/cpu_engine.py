"""Runs a built `cpu` engine. Apart from the compiler, so that running needs only NumPy and onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from export.documents import open_file
from pipeline.backends.base import Arrays
from pipeline.backends.runtime_errors import runtime_errors
from plugins.cpu import library

MODEL, CONDITION = "model.onnx", "condition.onnx"


class CpuEngine:
    """One or two onnxruntime sessions on the CPU. Not safe for concurrent calls.

    What depends on the condition alone (keys and values of cross-attention) is computed when the condition changes,
    and kept. Whether it has changed is decided by comparing all its numbers with a copy, so callers may reuse or
    overwrite their arrays.
    """

    def __init__(self, folder: Path, threads: int = 0) -> None:
        self.folder = folder
        self.step = open_session(folder / MODEL, threads)
        split = (folder / CONDITION).is_file()
        self.condition = open_session(folder / CONDITION, threads) if split else None
        self.outputs = [output.name for output in self.step.get_outputs()]
        self.step_inputs = {value.name for value in self.step.get_inputs()}
        self.kept_for: Arrays = {}
        self.kept: Arrays = {}

    def run(self, inputs: Arrays) -> Arrays:
        """Outputs by name for inputs by name."""
        if self.condition is not None:
            self._prepare(self.condition, {value.name: inputs[value.name] for value in self.condition.get_inputs()})
        feeds = {name: array for name, array in (inputs | self.kept).items() if name in self.step_inputs}
        with runtime_errors(self.folder / MODEL):
            return dict(zip(self.outputs, self.step.run(self.outputs, feeds), strict=True))

    def _prepare(self, session: Any, condition: Arrays) -> None:
        """Make `kept` belong to this condition."""
        if self.kept and all(np.array_equal(array, self.kept_for[name]) for name, array in condition.items()):
            return
        names = [output.name for output in session.get_outputs()]
        with runtime_errors(self.folder / CONDITION):
            self.kept = dict(zip(names, session.run(names, condition), strict=True))
        self.kept_for = {name: np.array(array) for name, array in condition.items()}

    def close(self) -> None:
        """Free the sessions; the engine cannot run afterwards."""
        self.step = self.condition = None
        self.kept, self.kept_for = {}, {}


def open_session(path: Path, threads: int = 0) -> Any:
    """Session of a lowered graph; `threads` 0: one for each core.

    onnxruntime adds its fusions of transposes, scales and biases. It may not touch pairs of QuantizeLinear and
    DequantizeLinear: here they split an image into limbs. A native library beside the graph is registered.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    # Idle threads sleep instead of spinning, so that engines do not steal each other's cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    library.register(options, path.parent)
    open_file(path).close()  # refuses what is no file
    with runtime_errors(path):
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
