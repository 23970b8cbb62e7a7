"""What engines are measured against in one process: PyTorch and onnxruntime, each in full precision and in a form that
is quick. Peers in processes of their own: peers.py."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.backends.base import Arrays, Engine
from pipeline.bench.convert import CONVERSIONS, ONNX_FP32, ONNX_INT8, FloatModel, Job
from pipeline.bench.runners import OnnxRunner, Spec, TorchRunner, torch_runner, weights_bytes
from pipeline.bench.worker import Worker, WorkerError, save_arrays
from pipeline.recipe import Recipe

if TYPE_CHECKING:
    from export.models.load import LoadedModel

logger = logging.getLogger(__name__)
MEMORY_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Contestant:
    """One way to run the denoiser. `memory_of`: what a fresh process opens to measure its memory, or None."""

    name: str
    run: Callable[[Arrays], Arrays]
    weights_bytes: int
    memory_of: Spec | None = None
    close: Callable[[], None] = lambda: None

    @staticmethod
    def of_engine(name: str, engine: Engine, bundle: Path, threads: int) -> Contestant:
        """The engine of target `name`; it is closed by whoever opened it."""
        spec = Spec("engine", threads, str(bundle), name)
        return Contestant(name, engine.run, weights_bytes(bundle, name), spec)


def baselines(model: LoadedModel, recipe: Recipe, folder: Path, threads: int) -> list[Contestant]:
    """PyTorch in float32 and bfloat16, onnxruntime in float32 and with dynamically quantized INT8 weights; of an
    autoencoder, whose convolutions have no dynamic INT8 there, the float ones.

    Their models are written into `folder`, which must last as long as they: float32 twice and INT8, 9 bytes per
    parameter.
    """
    size = FloatModel.of_recipe(recipe)
    floats = [*_torch(model, threads), _onnxruntime("onnxruntime_fp32", ONNX_FP32, model, size, folder, threads)]
    if not model.family.quantizes:
        return floats
    return [*floats, _onnxruntime("onnxruntime_int8", ONNX_INT8, model, size, folder, threads)]


def _torch(model: LoadedModel, threads: int) -> list[Contestant]:
    """One set of weights for both."""
    exact = torch_runner(model, threads)
    rounded = TorchRunner(exact.module, exact.names, threads, "bfloat16")
    size_bytes = 4 * sum(parameter.numel() for parameter in model.module.parameters())
    return [
        Contestant("torch_fp32", exact.run, size_bytes),
        Contestant("torch_bf16", rounded.run, size_bytes),
    ]


def _onnxruntime(
    name: str, conversion: str, model: LoadedModel, size: FloatModel, folder: Path, threads: int
) -> Contestant:
    made = CONVERSIONS[conversion]
    job = Job(conversion, size, str(folder))
    path = job.file(conversion)
    path.parent.mkdir()
    made.make(model, job, path)
    runner, spec = OnnxRunner(path, threads), Spec("onnxruntime", threads, str(path))
    return Contestant(name, runner.run, spec.size_bytes(), spec, runner.close)


def peak_memory(runner: Contestant, inputs: Arrays) -> int | None:
    """Peak resident bytes of a fresh process that opens this contestant and runs one call; None where not measured."""
    if runner.memory_of is None:
        return None
    with tempfile.TemporaryDirectory(prefix="ditc-") as scratch:
        folder = Path(scratch)
        try:
            worker = Worker(
                runner.memory_of, save_arrays(folder / "inputs.npz", inputs), folder / "log", MEMORY_TIMEOUT_S
            )
            peak = worker.call()["peak_rss_bytes"]
            worker.close()
        except WorkerError as error:
            logger.warning("memory of %s could not be measured: %s", runner.name, error)
            return None
    return peak
