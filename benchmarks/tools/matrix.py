"""The tools, and one run of each on a model in both of its forms.

Versions are the newest that were had when a row was last looked at, for Python 3.11, beside those that are old on
purpose.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from benchmarks.record import Json
from benchmarks.tools import web
from benchmarks.tools.environments import node_modules, python_environment, without_xdist
from benchmarks.tools.limit import Arrays, distance_db
from pipeline.backends.base import DATA, MODEL

INSIDE = Path(__file__).with_name("inside.py")
WAITED_S = 900
# How a model is written: with the bodies of the dialect's ops as functions, as `build` does, or without functions, as
# `export --inline` does.
FUNCTIONS, INLINED = "functions", "inlined"
FORMS = (FUNCTIONS, INLINED)
NEWEST, ONNX = "onnxruntime==1.32.0", "onnx==1.23.2"
SETS: dict[str, tuple[str, ...]] = {
    "onnxruntime-1.18": ("onnxruntime==1.18.1", "numpy<2"),
    "onnxruntime-1.20": ("onnxruntime==1.20.1",),
    "onnx": (ONNX, NEWEST, "onnxscript==0.7.2"),
    "polygraphy": ("polygraphy==0.53.6", "onnx_graphsurgeon==0.6.1", ONNX, NEWEST),
    "simplifiers": ("onnxslim==0.1.98", "onnxsim==0.8.1", ONNX, NEWEST),
    "openvino": ("openvino==2026.4.1",),
    "with-torch": (NEWEST, ONNX),
}
# Of these the rest is this project's own environment, whose PyTorch need not be had twice.
BESIDE = frozenset({"with-torch"})
# Where npm put onnxruntime-web.
WEB = "web"


@dataclass(frozen=True)
class Tool:
    """A row. run: a function of inside.py, or a run of web.py. where: its environment, a key of SETS, or WEB.
    package: whose version is shown. refuses: by form what its refusal says, as a part of it, where it is
    known to refuse."""

    name: str
    run: str
    where: str
    package: str
    refuses: Mapping[str, str] = field(default_factory=dict)


NO_FUNCTIONS = "No conversion rule found for operations: fpq."
# float64, in which quantized attention adds up exactly, is no type of WebGPU, and its build of onnxruntime-web has no
# kernel on the CPU instead.
NO_FLOAT64 = "Provider type for Cast node with name"
_PAIRS = (
    ("onnx.checker, full", "checker", "onnx", "onnx"),
    ("onnx reference evaluator", "reference", "onnx", "onnx"),
    ("onnxruntime", "onnxruntime", "onnxruntime-1.18", "onnxruntime"),
    ("onnxruntime", "onnxruntime", "onnxruntime-1.20", "onnxruntime"),
    ("onnxruntime", "onnxruntime", "onnx", "onnxruntime"),
    ("onnxruntime's optimizer for transformers", "transformers_optimizer", "with-torch", "onnxruntime"),
    ("onnxscript's optimizer", "optimized", "onnx", "onnxscript"),
    ("polygraphy inspect model", "polygraphy_inspect", "polygraphy", "polygraphy"),
    ("polygraphy run --onnxrt", "polygraphy_run", "polygraphy", "polygraphy"),
    ("the same, --onnx-outputs mark all", "polygraphy_mark_all", "polygraphy", "polygraphy"),
    ("polygraphy surgeon sanitize --fold-constants", "polygraphy_fold", "polygraphy", "polygraphy"),
    ("polygraphy debug reduce", "polygraphy_reduce", "polygraphy", "polygraphy"),
    ("onnxslim", "slimmed", "simplifiers", "onnxslim"),
    ("onnxsim", "simplified", "simplifiers", "onnxsim"),
)
TOOLS = (
    *(Tool(*row) for row in _PAIRS),
    Tool("OpenVINO, CPU, float32", "openvino", "openvino", "openvino", {FUNCTIONS: NO_FUNCTIONS}),
    Tool("onnxruntime-web in Node, wasm", "node", WEB, web.PACKAGE),
    Tool("onnxruntime-web in Chromium, wasm", "wasm", WEB, web.PACKAGE),
    Tool(
        "onnxruntime-web in Chromium, WebGPU by SwiftShader",
        "webgpu",
        WEB,
        web.PACKAGE,
        dict.fromkeys(FORMS, NO_FLOAT64),
    ),
)


def input_shapes(model: ir.Model) -> dict[str, tuple[int | str, ...]]:
    """Sizes of a graph's inputs, or their names."""
    shapes = {str(value.name): value.shape or () for value in model.graph.inputs}
    return {name: tuple(x if isinstance(x, int) else str(x) for x in shape) for name, shape in shapes.items()}


def feeds_of(shapes: Mapping[str, tuple[int | str, ...]], batch: int = 2, tokens: int = 16) -> dict[str, np.ndarray]:
    """Inputs of a denoiser by their names and shapes, whose names of sizes are `batch` and `tokens`."""
    rng, sizes = np.random.default_rng(0), {"batch": batch, "tokens": tokens}
    whole = {
        name: tuple(size if isinstance(size, int) else sizes[size] for size in row) for name, row in shapes.items()
    }
    values = {name: rng.standard_normal(shape) for name, shape in whole.items()}
    values |= {name: np.full(whole[name], 500.0) for name in whole if name == "timestep"}
    values |= {name: np.ones(whole[name]) for name in whole if name.endswith("mask")}
    return {name: value.astype(np.float32) for name, value in values.items()}


def prepared(tool: Tool) -> Path:
    """The tool's Python, or its node_modules. Raises CannotBeHadError with the reason where it cannot be had."""
    if tool.where == WEB:
        web.find(tool.run)
        return node_modules("onnxruntime-web", (f"{web.PACKAGE}@{web.VERSION}",))
    return python_environment(tool.where, SETS[tool.where], beside=tool.where in BESIDE)


def ran(tool: Tool, model: Path, feeds: Arrays, reference: Arrays) -> Json:
    """One row of the results: of the folder `model` with model.onnx and its data, on `feeds`, against the outputs
    `reference`. Has version, and one of db (None: equal to the bit), found and refuses, which are words.

    Raises CannotBeHadError where the tool cannot be had.
    """
    place = prepared(tool)
    with tempfile.TemporaryDirectory() as folder:
        for name in (MODEL, DATA):  # some write beside the model
            shutil.copyfile(model / name, Path(folder, name))
        if tool.where == WEB:
            row, outputs = web.ran(tool.run, place, Path(folder), feeds)
        else:
            row, outputs = _inside(tool, place, Path(folder), feeds)
    if outputs is not None:
        distance = distance_db(reference, outputs)
        row["db"] = None if distance == np.inf else round(distance, 1)
    return {"version": row.pop("versions")[tool.package], **row}


def _inside(tool: Tool, python: Path, folder: Path, feeds: Arrays) -> tuple[Json, Arrays | None]:
    """What inside.py says, and the outputs that it has made."""
    np.savez(folder / "feeds.npz", **dict(feeds))  # type: ignore[arg-type]
    (folder / "out").mkdir()
    words = [
        str(python),
        "-W",
        "ignore",
        str(INSIDE),
        tool.run,
        *(str(folder / n) for n in (MODEL, "feeds.npz", "out")),
    ]
    env = without_xdist() | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words, cwd=folder, env=env, capture_output=True, encoding="utf-8", timeout=WAITED_S, check=False
    )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise ChildProcessError(f"{tool.name} ended with {done.returncode}: {done.stderr[-600:]}")
    row: Json = {key: value for key, value in json.loads(lines[-1]).items() if value is not None}
    made = folder / "out" / "outputs.npz"
    if not made.is_file():
        return row, None
    with np.load(made) as stored:
        return row, dict(stored)
