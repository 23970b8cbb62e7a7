"""How each kind of contestant is opened: an engine of a bundle, PyTorch, onnxruntime, OpenVINO, each at its best."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from pipeline.backends.base import Arrays
from pipeline.backends.sessions import opened, session_options
from pipeline.bench.convert import FloatModel

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from openvino import InferRequest
    from torch import nn

    from export.models.load import LoadedModel

Precision = Literal["float32", "bfloat16", "int8"]
# OpenVINO computes in bfloat16 where a processor has it, which is slower than float32 there, and worse.
OPENVINO_PROPERTIES = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "INFERENCE_PRECISION_HINT": "f32"}


class Runner(Protocol):
    """A denoiser that can be called."""

    def run(self, inputs: Arrays) -> Arrays:
        """`sample` for inputs by name."""

    def forget(self) -> None:
        """Drop what is kept of a condition between calls, as at the first step of a picture."""

    def close(self) -> None:
        """Free it."""


@dataclass(frozen=True)
class Spec:
    """What one process opens; made of text and numbers, so that it can be handed to it.

    runtime: a key of RUNTIMES. path: the bundle of an engine, or the file of a graph. target: of an engine. model,
    precision: of PyTorch. properties: of OpenVINO, beside OPENVINO_PROPERTIES.
    """

    runtime: str
    threads: int
    path: str | None = None
    target: str | None = None
    model: FloatModel | None = None
    precision: Precision = "float32"
    properties: Mapping[str, str] = field(default_factory=dict)

    def size_bytes(self) -> int:
        """Of the files that hold the weights: those beside a graph, or of a bundle's target."""
        if self.path is None:
            return 0
        path = Path(self.path)
        if self.target is None:
            return sum(file.stat().st_size for file in path.parent.glob(f"{path.stem}.*"))
        return weights_bytes(path, self.target)


# The part of a bundle's target folder that is weights.
WEIGHT_SUFFIXES = (".data", ".engine")


def weights_bytes(bundle: Path, target: str) -> int:
    """Bytes of the weights of a bundle's target; those of the portable model lie at the root."""
    folder = bundle / target if (bundle / target).is_dir() else bundle
    files = folder.rglob("*") if folder != bundle else bundle.iterdir()
    return sum(file.stat().st_size for file in files if file.suffix in WEIGHT_SUFFIXES)


# --- the runtimes ---------------------------------------------------------------------------------------------------


def open_engine(spec: Spec, inputs: Arrays) -> Runner:
    """An engine of ours."""
    from pipeline.backends import BACKENDS

    assert spec.path is not None and spec.target is not None
    engine = BACKENDS[spec.target].load(Path(spec.path), spec.threads)
    return EngineRunner(engine.run, getattr(engine, "forget", lambda: None), engine.close)


@dataclass(frozen=True)
class EngineRunner:
    """An engine; those that keep nothing of a condition forget nothing."""

    run: Callable[[Arrays], Arrays]
    forget: Callable[[], None]
    close: Callable[[], None]


def open_stock_session(path: Path, threads: int = 0) -> InferenceSession:
    """onnxruntime as it comes, but for idle threads, which sleep; threads 0: as many as `machine.threads` allows."""
    return opened(path, session_options(threads))


class OnnxRunner:
    """Stock onnxruntime on a graph."""

    def __init__(self, path: Path, threads: int) -> None:
        self.sessions = [open_stock_session(path, threads)]
        self.names = [output.name for output in self.sessions[0].get_outputs()]

    def run(self, inputs: Arrays) -> Arrays:
        return dict(zip(self.names, self.sessions[0].run(self.names, inputs), strict=True))

    def forget(self) -> None:
        """It keeps nothing."""

    def close(self) -> None:
        self.sessions.clear()


class TorchRunner:
    """A module of float32 weights, eager, its arithmetic in float32 or under autocast in bfloat16; or compiled."""

    def __init__(self, module: nn.Module, names: list[str], threads: int, precision: Precision = "float32") -> None:
        """names: of the inputs, in the order of the module's arguments."""
        self.module, self.names, self.threads, self.precision = module, names, threads, precision

    def run(self, inputs: Arrays) -> Arrays:
        import torch

        from export.models.torch_modules import first_output

        tensors = [torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in self.names]
        torch.set_num_threads(self.threads)
        # A compiled module is made for calls without gradients, not for tensors of inference mode.
        without_gradients = torch.no_grad() if self.precision == "int8" else torch.inference_mode()
        with without_gradients, torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bfloat16"):
            return {"sample": first_output(self.module(*tensors)).float().numpy()}

    def forget(self) -> None:
        """It keeps nothing."""

    def close(self) -> None:
        """Its memory goes with the last reference."""


def torch_runner(model: LoadedModel, threads: int, precision: Precision = "float32") -> TorchRunner:
    """The float model in PyTorch; "int8": torchao's dynamic INT8 for weights and activations, compiled by Inductor."""
    from export.models.load import denoiser, float_linears

    # Large models keep 16-bit linears that are upcast at each call: a float32 baseline must not pay for that.
    module: nn.Module = denoiser(model, float_linears(model))
    if precision == "int8":
        module = _compiled_int8(module)
    return TorchRunner(module, [row.name for row in model.inputs], threads, precision)


def _compiled_int8(module: nn.Module) -> nn.Module:
    import torch
    import torch._inductor.config as inductor
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    inductor.freezing = True
    compiled: nn.Module = torch.compile(module, dynamic=False)
    return compiled


class OpenVinoRunner:
    """OpenVINO's CPU plugin on a converted model, compiled for the shapes of each batch that it meets."""

    def __init__(self, path: Path, threads: int, properties: Mapping[str, str], inputs: Arrays) -> None:
        import openvino

        self.core, self.path = openvino.Core(), path
        self.properties = OPENVINO_PROPERTIES | {"INFERENCE_NUM_THREADS": str(threads)} | dict(properties)
        self.requests: dict[tuple[tuple[int, ...], ...], InferRequest] = {}
        self._request(inputs)

    def _request(self, inputs: Arrays) -> InferRequest:
        shapes = tuple(inputs[name].shape for name in sorted(inputs))
        if shapes not in self.requests:
            model = self.core.read_model(self.path)
            model.reshape({name: list(value.shape) for name, value in inputs.items()})
            self.requests[shapes] = self.core.compile_model(model, "CPU", self.properties).create_infer_request()
        return self.requests[shapes]

    def run(self, inputs: Arrays) -> Arrays:
        output = self._request(inputs).infer(inputs, share_inputs=True, share_outputs=True)[0]
        return {"sample": np.array(output)}  # the shared one is overwritten by the next call

    def forget(self) -> None:
        """It keeps nothing."""

    def close(self) -> None:
        self.requests.clear()


def _open_onnx(spec: Spec, inputs: Arrays) -> Runner:
    assert spec.path is not None
    return OnnxRunner(Path(spec.path), spec.threads)


def _open_torch(spec: Spec, inputs: Arrays) -> Runner:
    assert spec.model is not None
    return torch_runner(spec.model.load(), spec.threads, spec.precision)


def _open_openvino(spec: Spec, inputs: Arrays) -> Runner:
    assert spec.path is not None
    return OpenVinoRunner(Path(spec.path), spec.threads, spec.properties, inputs)


@dataclass(frozen=True)
class Runtime:
    """open(spec, inputs): inputs of the first call, by whose shapes some compile. imports: what is imported before the
    time of opening counts."""

    open: Callable[[Spec, Arrays], Runner]
    imports: tuple[str, ...]


RUNTIMES = {
    "engine": Runtime(open_engine, ("onnxruntime", "pipeline.backends.cpu.engine")),
    "onnxruntime": Runtime(_open_onnx, ("onnxruntime",)),
    "torch": Runtime(_open_torch, ("torch", "export.models.load", "export.models.torch_modules")),
    "openvino": Runtime(_open_openvino, ("openvino",)),
}
