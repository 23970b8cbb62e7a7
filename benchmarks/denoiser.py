"""Speed of one denoiser call at true size on this CPU: `python -m benchmarks.denoiser --model FOLDER --work-dir DIR`.

FOLDER holds a model of true configuration (`python -m benchmarks.zoo.make_xl` writes one with random weights). The
engine, with onnxruntime alone ("engine") and with native ops ("engine_native"), is compared with onnxruntime in
float32 and with its dynamic INT8 quantization: correctness first, then every contestant once per round, medians and
their ratios; load time and peak memory in processes of their own. Writes benchmarks/results/denoiser_MACHINE.json.
What is expensive to make is kept in DIR for the next run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks import record
from benchmarks.record import Json
from export import checkpoint
from export.errors import EnvironmentLacksError
from export.models.load import LoadedModel, load, sample_inputs
from pipeline import machine
from pipeline.backends.base import Arrays
from pipeline.backends.cpu import CpuBackend
from pipeline.backends.cpu.engine import CpuEngine
from pipeline.bench.baselines import open_stock_session, quantize_int8
from pipeline.bench.measure import interleaved
from pipeline.distance import sqnr_db
from pipeline.recipe import Recipe, with_settings
from pipeline.recipe import load as load_recipe

RECIPE = "pixart_w4a6"
# The quickest calibration: it changes no time of a call.
SETTINGS = ("weights.search=absmax",)
BASELINES = ("onnxruntime_fp32", "onnxruntime_int8")
# cpu.path -> what its engine adds to the names of folders and of rows: "engine", "engine_native".
PATHS = {"stock": "", "fused": "_native"}
# The engine and the float32 reference flip codes against each other wherever float rounding meets a midpoint, and
# flips grow over the layers: the reference in float32 is itself about 33 dB from its float64 run at 28 layers. A
# defect (a wrong scale, a lost bias) leaves less than 10 dB.
LEAST_SQNR_DB = 20.0
LOADS = 3
LOAD_CODE = """
import json, sys, time
import numpy as np
from pathlib import Path
import onnxruntime
kind, path, inputs = sys.argv[1:]
if kind == "engine":  # what each imports counts in its memory
    from pipeline.backends.cpu.engine import CpuEngine
    started = time.perf_counter()
    run = CpuEngine(Path(path)).run
else:
    from pipeline.bench.baselines import open_stock_session
    started = time.perf_counter()
    session = open_stock_session(Path(path))
    run = lambda feeds: {"sample": session.run(None, feeds)[0]}
load_s = time.perf_counter() - started
from export.models.families import STEP_INPUTS
from pipeline.machine import peak_memory_bytes
from pipeline.generate.sampling import make_sampler, sample
feeds = dict(np.load(inputs))
condition = {name: value for name, value in feeds.items() if name not in STEP_INPUTS}
sample(run, (condition, condition), feeds["hidden_states"], make_sampler("ddim", 2), 4.5)
print(json.dumps({"load_s": load_s, "peak_rss_bytes": peak_memory_bytes()}))
"""


def prepare(model: LoadedModel, recipe: Recipe, folder: Path, paths: list[str]) -> None:
    """Write the portable model, the engines and both baselines into `folder`, as far as they are not there yet."""
    from export.to_onnx import export_float, export_portable
    from pipeline.calibrate import calibrate

    if not (folder / "model.onnx").is_file():
        layers, attention = calibrate(model, recipe, folder / "calibrated"), recipe.attention.formats
        export_portable(model, layers, folder / "model.onnx", attention=attention)
    for path in paths:
        build(with_settings(recipe, [f"cpu.path={path}"]), folder, PATHS[path])
    if not (folder / "onnxruntime_int8.onnx").is_file():
        export_float(model, folder / "onnxruntime_fp32.onnx")
        quantize_int8(folder / "onnxruntime_fp32.onnx", folder / "onnxruntime_int8.onnx")


def build(recipe: Recipe, folder: Path, suffix: str) -> None:
    """Write the engine into `folder`/cpu + suffix. Raises EnvironmentLacksError where it cannot be built."""
    backend, out, lowered = CpuBackend(), folder / f"cpu{suffix}", folder / f"lowered{suffix}"
    if problems := backend.problems(recipe):
        raise EnvironmentLacksError("; ".join(problems))
    if not (out / "lowering.json").is_file():
        for path in (out, lowered):
            path.mkdir(exist_ok=True)
        backend.build(backend.lower(folder / "model.onnx", lowered, recipe), out, recipe)


def check(model: LoadedModel, recipe: Recipe, folder: Path, engines: dict[str, CpuEngine]) -> dict[str, float]:
    """SQNR in dB of each engine against the fake-quant reference; AssertionError if one computes something else."""
    import torch

    from pipeline.backends.reference import ReferenceEngine, fake_quant

    inputs = sample_inputs(model, 1, 0)
    layers = checkpoint.load(folder / "calibrated")
    reference = ReferenceEngine(fake_quant(model, layers, torch.float32, recipe.attention.formats))
    expected = reference.run(inputs)["sample"]
    values = {name: sqnr_db(expected, engine.run(inputs)["sample"]) for name, engine in engines.items()}
    if not min(values.values()) >= LEAST_SQNR_DB:
        raise AssertionError(f"an engine is {values} dB from its reference, at least {LEAST_SQNR_DB} dB expected")
    return values


def changed_every_time(engine: CpuEngine, inputs: Arrays) -> Callable[[], object]:
    """Calls that find nothing kept of the condition, as the first step of an image does."""

    def call() -> object:
        engine.forget()
        return engine.run(inputs)

    return call


def measure(model: LoadedModel, folder: Path, engines: dict[str, CpuEngine], batch: int, rounds: int) -> Json:
    """Medians in ms and ratios of one batch size; the engines both within an image and at its first step."""
    inputs = sample_inputs(model, batch, batch)
    sessions = {name: open_stock_session(folder / f"{name}.onnx") for name in BASELINES}
    work: dict[str, Callable[[], object]] = {
        **{name: partial(engine.run, inputs) for name, engine in engines.items()},
        **{name: partial(session.run, None, inputs) for name, session in sessions.items()},
    }
    first = {f"{name}_first_step": changed_every_time(engine, inputs) for name, engine in engines.items()}
    calls = [interleaved(group, float("inf"), (rounds, rounds)) for group in (work, first)]
    rows = {name: timing.to_row() for name, timing in (calls[0] | calls[1]).items()}
    ratios = {
        f"times_faster{name.removeprefix('engine')}": {
            peer: rows[peer]["median"] / rows[name]["median"] for peer in BASELINES
        }
        for name in engines
    }
    return {"batch_size": batch, "call_ms": rows, **ratios}


def load_and_memory(folder: Path, paths: list[str], inputs: Arrays) -> dict[str, dict[str, float]]:
    """Median seconds to open, and peak resident bytes of opening and drawing (two steps with guidance, the loop of
    `generate`), of each in fresh processes."""
    np.savez(folder / "inputs.npz", allow_pickle=False, **inputs)
    places = {f"engine{PATHS[path]}": ("engine", folder / f"cpu{PATHS[path]}") for path in paths}
    places |= {name: ("onnxruntime", folder / f"{name}.onnx") for name in BASELINES}
    medians = {}
    for name, (kind, path) in places.items():
        command = [sys.executable, "-c", LOAD_CODE, kind, str(path), str(folder / "inputs.npz")]
        runs = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(LOADS)]
        medians[name] = {key: median(run[key] for run in runs) for key in runs[0]}
    return medians


def main() -> None:
    parser = record.parser("benchmarks.denoiser", __doc__)
    parser.add_argument("--model", required=True, help="folder of the float model")
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--set", action="append", default=list(SETTINGS), dest="settings")
    parser.add_argument("--paths", nargs="+", choices=list(PATHS), default=list(PATHS), help="cpu.path of the engines")
    parser.add_argument("-o", "--output-dir", type=Path, default=record.RESULTS, help="folder of the result")
    args = record.parsed(parser)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    model, recipe = load(args.model), with_settings(load_recipe(RECIPE), ["method=rtn", *args.settings])
    prepare(model, recipe, args.work_dir, args.paths)
    engines = {f"engine{PATHS[path]}": CpuEngine(args.work_dir / f"cpu{PATHS[path]}") for path in args.paths}
    document: Json = {
        "model": model.config["_class_name"],
        "layers": model.config["num_layers"],
        "recipe": RECIPE,
        "settings": args.settings,
        "sqnr_to_reference_db": check(model, recipe, args.work_dir, engines),
        "load_average": [],  # of the last minute, which tells a reader how quiet the machine was
        "batches": [],
    }
    for batch in args.batches:
        time.sleep(1)
        document["load_average"].append(round(os.getloadavg()[0], 2))
        document["batches"].append(measure(model, args.work_dir, engines, batch, args.rounds))
    for engine in engines.values():
        engine.close()
    document["processes"] = load_and_memory(args.work_dir, args.paths, sample_inputs(model, 1, 0))
    print(json.dumps(document, indent=1))
    slug = record.slug(f"{machine.cpu_name()} {machine.cpu_count()}cpu")
    print(record.write(f"denoiser_{slug}", document, args.output_dir))


if __name__ == "__main__":
    main()
