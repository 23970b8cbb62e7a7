"""`python inside.py TOOL MODEL INPUTS.npz FOLDER`: one tool on one ONNX model, in that tool's own environment.

Nothing of this package is imported, which is not installed there. What a tool makes goes into FOLDER, the model's
outputs into FOLDER/outputs.npz. Prints a line of JSON: what was found, in words (null: the outputs say it), or what the
tool says where it refuses.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, Any]
OUTPUTS = "outputs.npz"
# What a model is reduced to is the smallest part that still has such a node.
WANTED = "LayerNormalization"


class Refused(Exception):
    """A command of a tool failed; the message is what it printed last."""


def main(tool: str, model: str, inputs: str, folder: str) -> None:
    """Run a tool and print what came of it."""
    place = Path(folder)
    with np.load(inputs) as stored:
        feeds = dict(stored)
    try:
        row = {"found": TOOLS[tool](Path(model), feeds, place)}
    except Exception as error:  # a tool may raise anything: its words are the result
        row = {"refuses": " ".join(f"{type(error).__name__}: {error}".split())}
    # Of two releases on the path the first is imported.
    installed = {one.metadata["Name"].lower(): one.version for one in reversed([*metadata.distributions()])}
    print(json.dumps(row | {"versions": installed}))


def command(*words: object, cwd: Path) -> str:
    """The output of a console script of this environment. Raises Refused with its last words."""
    script = Path(sys.executable).with_name(str(words[0]))
    line = [str(script), *map(str, words[1:])]
    done = subprocess.run(line, cwd=cwd, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise Refused((done.stdout + done.stderr)[-600:])
    return done.stdout


def keep(outputs: Arrays, folder: Path) -> None:
    np.savez(folder / OUTPUTS, **outputs)


# --- onnx and onnxruntime -------------------------------------------------------------------------------------------


def checker(model: Path, feeds: Arrays, folder: Path) -> str:
    """onnx.checker with its full check, which infers all shapes strictly."""
    import onnx

    onnx.checker.check_model(str(model), full_check=True)
    return "valid"


def reference(model: Path, feeds: Arrays, folder: Path) -> None:
    """onnx's reference evaluator, in NumPy."""
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(str(model))
    keep(dict(zip(evaluator.output_names, evaluator.run(None, feeds), strict=True)), folder)


def onnxruntime(model: Path, feeds: Arrays, folder: Path) -> None:
    """onnxruntime with its own choice of optimizations."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    keep(dict(zip(names, session.run(names, feeds), strict=True)), folder)


def transformers_optimizer(model: Path, feeds: Arrays, folder: Path) -> None:
    """onnxruntime's optimizer for transformers, then onnxruntime."""
    from onnxruntime.transformers import optimizer

    optimized = optimizer.optimize_model(str(model), model_type="bert", num_heads=0, hidden_size=0)
    optimized.save_model_to_file(str(folder / "transformed.onnx"), use_external_data_format=True)
    onnxruntime(folder / "transformed.onnx", feeds, folder)


# --- Polygraphy -----------------------------------------------------------------------------------------------------


def polygraphy_inspect(model: Path, feeds: Arrays, folder: Path) -> str:
    """`polygraphy inspect model`."""
    shown = command("polygraphy", "inspect", "model", model, "--show", "layers", "attrs", "weights", cwd=folder)
    return next(line.strip() for line in shown.splitlines() if line.strip().endswith("Node(s) ----"))


def polygraphy_run(model: Path, feeds: Arrays, folder: Path, *more: object) -> None:
    """`polygraphy run --onnxrt`."""
    from polygraphy.comparator import RunResults
    from polygraphy.json import save_json

    save_json([feeds], str(folder / "feeds.json"))
    given, made = ("--load-inputs", folder / "feeds.json"), ("--save-outputs", folder / "results.json")
    command("polygraphy", "run", model, "--onnxrt", *given, *made, *more, cwd=folder)
    [[_, [result]]] = RunResults.load(str(folder / "results.json"))
    keep({name: np.asarray(result[name]) for name in result}, folder)


def polygraphy_mark_all(model: Path, feeds: Arrays, folder: Path) -> None:
    """`polygraphy run --onnxrt` with every tensor as an output."""
    polygraphy_run(model, feeds, folder, "--onnx-outputs", "mark", "all")


def polygraphy_fold(model: Path, feeds: Arrays, folder: Path) -> None:
    """`polygraphy surgeon sanitize --fold-constants`, then onnxruntime."""
    folded = folder / "folded.onnx"
    command("polygraphy", "surgeon", "sanitize", model, "--fold-constants", "-o", folded, cwd=folder)
    onnxruntime(folded, feeds, folder)


def polygraphy_reduce(model: Path, feeds: Arrays, folder: Path) -> str:
    """`polygraphy debug reduce` to the nodes that a check asks for."""
    import onnx

    check = folder / "check.py"
    check.write_text(
        "import sys, onnx\n"
        "model = onnx.load('polygraphy_debug.onnx', load_external_data=False)\n"
        f"sys.exit(any(node.op_type == {WANTED!r} for node in model.graph.node))\n",
        encoding="utf-8",
    )
    shapes = [f"{name}:[{','.join(map(str, value.shape))}]" for name, value in feeds.items()]
    words = ("--mode", "bisect", "--model-input-shapes", *shapes, "-o", folder / "reduced.onnx")
    command("polygraphy", "debug", "reduce", model, *words, "--check", sys.executable, check, cwd=folder)
    nodes = [len(onnx.load(path, load_external_data=False).graph.node) for path in (model, folder / "reduced.onnx")]
    return f"{nodes[0]} nodes to {nodes[1]}"


# --- simplifiers ----------------------------------------------------------------------------------------------------


def slimmed(model: Path, feeds: Arrays, folder: Path) -> None:
    """onnxslim, then onnxruntime."""
    command("onnxslim", model, folder / "slim.onnx", cwd=folder)
    onnxruntime(folder / "slim.onnx", feeds, folder)


def simplified(model: Path, feeds: Arrays, folder: Path) -> None:
    """onnxsim, whose own check must hold, then onnxruntime."""
    import onnx
    import onnxsim

    result, holds = onnxsim.simplify(str(model))
    if not holds:
        raise Refused("onnxsim's own check of what it made fails")
    onnx.save(result, folder / "simplified.onnx")
    onnxruntime(folder / "simplified.onnx", feeds, folder)


def optimized(model: Path, feeds: Arrays, folder: Path) -> None:
    """onnxscript's optimizer, then onnxruntime."""
    import onnx_ir
    import onnxscript.optimizer

    graph = onnx_ir.load(model)
    onnxscript.optimizer.optimize(graph)
    onnx_ir.save(graph, folder / "optimized.onnx", external_data="optimized.onnx.data")
    onnxruntime(folder / "optimized.onnx", feeds, folder)


# --- OpenVINO -------------------------------------------------------------------------------------------------------


def openvino(model: Path, feeds: Arrays, folder: Path) -> None:
    """OpenVINO on the CPU, computing in float32."""
    import openvino as ov

    compiled = ov.Core().compile_model(str(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = compiled({port.any_name: feeds[port.any_name] for port in compiled.inputs})
    keep({port.any_name: results[port] for port in compiled.outputs}, folder)


TOOLS: dict[str, Callable[[Path, Arrays, Path], str | None]] = {
    "checker": checker,
    "reference": reference,
    "onnxruntime": onnxruntime,
    "transformers_optimizer": transformers_optimizer,
    "polygraphy_inspect": polygraphy_inspect,
    "polygraphy_run": polygraphy_run,
    "polygraphy_mark_all": polygraphy_mark_all,
    "polygraphy_fold": polygraphy_fold,
    "polygraphy_reduce": polygraphy_reduce,
    "slimmed": slimmed,
    "simplified": simplified,
    "optimized": optimized,
    "openvino": openvino,
}

if __name__ == "__main__":
    main(*sys.argv[1:])
