"""What engines are measured against: PyTorch and onnxruntime, each in full precision and in the form that is quick."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.backends.base import Arrays, Engine
from pipeline.backends.sessions import opened, session_options
from pipeline.files import tree
from pipeline.recipe import Recipe

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

    from export.models.load import LoadedModel

logger = logging.getLogger(__name__)
# The part of a bundle's target folder that is weights.
WEIGHT_SUFFIXES = (".data", ".engine")
MEMORY_TIMEOUT_S = 600


@dataclass(frozen=True)
class Contestant:
    """One way to run the denoiser. `memory_of`: what a fresh process opens to measure its memory, or None."""

    name: str
    run: Callable[[Arrays], Arrays]
    weights_bytes: int
    memory_of: tuple[str, str] | None = None
    close: Callable[[], None] = lambda: None

    @staticmethod
    def of_engine(name: str, engine: Engine, bundle: Path) -> Contestant:
        """The engine of target `name`; it is closed by whoever opened it."""
        folder = bundle / name
        own = [folder / file for file in tree(folder)] or list(bundle.iterdir())  # the portable model is at the root
        files = [path for path in own if path.suffix in WEIGHT_SUFFIXES]
        return Contestant(name, engine.run, sum(path.stat().st_size for path in files), (name, str(bundle)))


def baselines(model: LoadedModel, recipe: Recipe, folder: Path, threads: int) -> list[Contestant]:
    """PyTorch in float32 and bfloat16, onnxruntime in float32 and with dynamically quantized INT8 weights.

    Their models are written into `folder`, which must last as long as they: float32 twice and INT8, 9 bytes per
    parameter.
    """
    from export.to_onnx import export_float

    exported = folder / "float.onnx"
    export_float(model, exported, recipe.sampling.height, recipe.sampling.width)
    quantized = folder / "int8.onnx"
    quantize_int8(exported, quantized)
    return [
        *_torch(model, threads),
        _onnxruntime("onnxruntime_fp32", exported, threads),
        _onnxruntime("onnxruntime_int8", quantized, threads),
    ]


def _torch(model: LoadedModel, threads: int) -> list[Contestant]:
    """The float module in float32 and under bfloat16 autocast, one set of weights for both; float32 in and out."""
    import torch

    from export.models.load import denoiser, float_linears

    # Large models keep 16-bit linears that are upcast at each call: a float32 baseline must not pay for that.
    module = denoiser(model, float_linears(model))
    names = [row.name for row in model.inputs]

    def run(inputs: Arrays, dtype: torch.dtype) -> Arrays:
        tensors = [torch.from_numpy(np.ascontiguousarray(inputs[key])) for key in names]
        torch.set_num_threads(threads)
        with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return {"sample": module(*tensors).float().numpy()}

    size_bytes = 4 * sum(parameter.numel() for parameter in model.module.parameters())
    kinds = {"torch_fp32": torch.float32, "torch_bf16": torch.bfloat16}
    return [Contestant(name, partial(run, dtype=dtype), size_bytes) for name, dtype in kinds.items()]


def quantize_int8(source: Path, destination: Path) -> None:
    """The INT8 form that onnxruntime's own tool makes with its defaults, of what `export_float` wrote."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # The tool transposes the weights of Gemm nodes but not the shapes noted for them, which it infers again if absent.
    plain = source.with_name(f"plain-{source.name}")
    stored = onnx.load(source, load_external_data=False)
    del stored.graph.value_info[:]
    onnx.save(stored, plain)
    # It also logs advice on preprocessing to the root logger for every model.
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        quantize_dynamic(plain, destination, weight_type=QuantType.QInt8, use_external_data_format=True)
    finally:
        logging.root.setLevel(level)


def open_stock_session(path: Path, threads: int = 0) -> InferenceSession:
    """onnxruntime as it comes, but for idle threads, which sleep; threads 0: as many as `machine.threads` allows."""
    return opened(path, session_options(threads))


def _onnxruntime(name: str, path: Path, threads: int) -> Contestant:
    sessions = [open_stock_session(path, threads)]

    def run(inputs: Arrays) -> Arrays:
        return {"sample": sessions[0].run(["sample"], inputs)[0]}

    size = sum(item.stat().st_size for item in path.parent.glob(f"{path.name}*"))
    return Contestant(name, run, size, ("onnxruntime", str(path)), sessions.clear)


# --- memory --------------------------------------------------------------------------------------------------------


def peak_memory(runner: Contestant, inputs: Arrays) -> int | None:
    """Peak resident bytes of a fresh process that opens this contestant and runs one call; None where not measured."""
    if runner.memory_of is None:
        return None
    with tempfile.TemporaryDirectory(prefix="ditc-") as folder:
        np.savez(Path(folder) / "inputs.npz", **inputs)  # type: ignore[arg-type]
        command = [sys.executable, "-m", "pipeline.bench.baselines", *runner.memory_of, f"{folder}/inputs.npz"]
        try:
            done = subprocess.run(
                command,
                check=False,
                capture_output=True,
                text=True,
                encoding="utf-8",
                errors="replace",
                timeout=MEMORY_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            logger.warning("memory of %s could not be measured within %d s", runner.name, MEMORY_TIMEOUT_S)
            return None
    if done.returncode:
        logger.warning("memory of %s could not be measured: %s", runner.name, done.stderr.strip().splitlines()[-1:])
        return None
    return int(json.loads(done.stdout)["peak_rss_bytes"])


def main(arguments: list[str]) -> int:
    """The fresh process: open, run one call, say how much memory that took."""
    from pipeline import machine

    kind, path, inputs_path = arguments
    with np.load(inputs_path, allow_pickle=False) as stored:
        inputs = {name: stored[name] for name in stored.files}
    if kind == "onnxruntime":
        open_stock_session(Path(path)).run(["sample"], inputs)
    else:
        from pipeline.backends import BACKENDS

        BACKENDS[kind].load(Path(path)).run(inputs)
    sys.stdout.write(json.dumps({"peak_rss_bytes": machine.peak_memory_bytes()}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
