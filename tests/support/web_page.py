"""An exported page in a browser, and its graphs in onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.tools import browser
from export.errors import EnvironmentLacksError
from pipeline.backends.sessions import opened, session_options
from pipeline.export import main
from pipeline.web import onnxruntime_web

# A second float32 run of a model is as far from the float64 one as the first; both together at most twice as far.
TWICE_DB = 20 * np.log10(2)
# Of onnxruntime's optimizations: runs that differ in their roundings.
LEVELS = ("ORT_ENABLE_ALL", "ORT_ENABLE_BASIC")


def exported(bundle: Path, folder: Path) -> Path:
    """The page of a bundle."""
    try:
        onnxruntime_web.find(None)
    except EnvironmentLacksError as error:
        pytest.skip(str(error))
    assert main([str(bundle), "--web", str(folder)]) == 0
    return folder


def fill_in(tab: browser.Tab, **fields: str | int) -> None:
    """Fill the fields in and press the button."""
    tab.run("; ".join(f"document.getElementById('{name}').value = {value!r}" for name, value in fields.items()))
    tab.run("document.getElementById('draw').click()")


def canvas(tab: browser.Tab) -> Any:
    """The picture [H, W, 3] uint8."""
    script = """(() => { const canvas = document.getElementById('picture');
      const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
      return [canvas.height, canvas.width, Array.from(data)]; })()"""
    height, width, data = tab.run(script)
    return np.array(data, np.uint8).reshape(height, width, 4)[:, :, :3]


class Lowered:
    """The page's own graph in onnxruntime, as an Engine. level: of LEVELS."""

    def __init__(self, path: Path, level: str) -> None:
        import onnxruntime

        options = session_options(1)
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        self.session = opened(path, options)

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        names = [output.name for output in self.session.get_outputs()]
        known = {value.name: inputs[value.name] for value in self.session.get_inputs()}
        return dict(zip(names, self.session.run(names, known), strict=True))

    def close(self) -> None:
        """Nothing to do."""
