"""Runs a `cuda` engine: the lowered graph as a torch module on an NVIDIA GPU, captured as a CUDA graph.

What depends on the condition alone (keys and values of cross-attention) is a module of its own, which runs when the
condition changes. For each set of input shapes there are fixed input tensors and one captured graph; a call copies in
what is new, replays, copies out.

No machine with a GPU was at hand: capture and kernels are compiled, not run. The same modules run on the CPU
(device="cpu", without capture), where they are proven equal to the graph in onnxruntime.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NotRequired

import numpy as np
from typing_extensions import TypedDict

from export.errors import ContractError, EnvironmentLacksError, RecipeError
from pipeline import machine
from pipeline.backends import feeds, metadata_file
from pipeline.backends.base import CONDITION, MODEL, Arrays
from pipeline.files import is_out_of_memory
from pipeline.machine import visible_sm
from plugins.gpu.compile import MINIMUM_TRITON

if TYPE_CHECKING:
    import torch
    from torch import Tensor

logger = logging.getLogger(__name__)
# Of all inputs, by name.
InputShapes = tuple[tuple[str, tuple[int, ...]], ...]
SCHEMA_VERSION = 1
MIN_SM = 80
# Calls before the capture: kernels are compiled in the first, and torch's libraries ask for their memory.
WARM_UPS = 2


class CudaNeeds(TypedDict):
    """The least GPU that runs the engine."""

    least_sm: NotRequired[metadata_file.ComputeCapability]


class CudaInput(TypedDict):
    """A size that may vary is given by its name."""

    dtype: str
    shape: list[metadata_file.Size | str]


class EngineOptions(TypedDict):
    """Of the recipe, see CudaOptions."""

    weights: Literal["auto", "packed", "expanded"]
    activations: Literal["fp16", "fp32"]


class CudaMetadata(CudaNeeds):
    """metadata.json of the target."""

    options: EngineOptions
    inputs: dict[str, CudaInput]


def machine_problem(metadata: CudaNeeds, sm: int, triton: str) -> str | None:
    """Why a GPU of capability `sm` (0: none) with that release of triton ('': none) cannot run; None if it can."""
    least = metadata.get("least_sm", MIN_SM)
    if not sm:
        return (
            "running the target cuda needs an NVIDIA GPU and a PyTorch with CUDA; none is visible here. Run it on a "
            "machine with one, or build with --target cpu"
        )
    if sm < least:
        return f"the target cuda needs SM {least} or newer, this GPU is SM {sm}; build with --target cpu"
    if not triton:
        return "running the target cuda needs triton; install with: pip install triton"
    if tuple(int(part) for part in triton.split(".")[:2]) < MINIMUM_TRITON:
        release = ".".join(map(str, MINIMUM_TRITON))
        return f"running the target cuda needs triton {release} or newer, this is {triton}; pip install -U triton"
    return None


@contextmanager
def without_tf32() -> Iterator[None]:
    """Convolutions and products of float32 numbers are those of float32 while it lasts, as the gates' limits have it.

    cuDNN rounds their factors to 10 bits by torch's default. A captured call keeps what it was captured with.
    """
    import torch

    switches: tuple[Any, ...] = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


@dataclass
class Captured:
    """One CUDA graph: write `inputs`, replay, read `outputs`. condition: the number of the condition in `inputs`."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    condition: int = 0

    @classmethod
    def make(cls, module: Callable[[dict[str, Tensor]], dict[str, Tensor]], inputs: dict[str, Tensor]) -> Captured:
        """Warm up on a stream of its own, as captures must, then capture. Outputs lie in the graph's own memory."""
        import torch

        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        stream.wait_stream(current)
        with without_tf32():
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    module(inputs)
            current.wait_stream(stream)
            # A capture that fails may leave its stream the current one: the outer context puts this one back.
            # What other threads do on the GPU meanwhile is not part of the capture and does not break it.
            with torch.cuda.stream(current), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                outputs = module(inputs)
        return cls(graph, inputs, outputs)

    def run(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, tensor in tensors.items():
            self.inputs[name].copy_(tensor)
        self.graph.replay()
        return self.outputs


class Part:
    """A module with its captured graphs; on the CPU it just runs."""

    def __init__(self, path: Path, options: EngineOptions, device: str) -> None:
        from export.onnx_files import load_model, reading
        from pipeline.backends.cuda.module import LoweredModule

        self.path = path
        with reading(path):
            module = LoweredModule(load_model(path), options["activations"], options["weights"]).finish()
        self.inputs, self.device = module.inputs, device
        self.module = module.to(device).eval()
        self.captured: dict[InputShapes, Captured] = {}

    def run(self, tensors: dict[str, Tensor], kept: Mapping[str, Tensor], condition: int = 0) -> dict[str, Tensor]:
        """Outputs on the device, of tensors anywhere.

        kept: inputs there already, which are copied only if `condition` is another one."""
        kept = {name: tensor for name, tensor in kept.items() if name in self.inputs}
        if self.device == "cpu":
            return self._compute({**tensors, **kept})
        key = tuple((name, tuple(tensor.shape)) for name, tensor in sorted({**tensors, **kept}.items()))
        if key not in self.captured:
            placed = {name: tensor.to(self.device, copy=True) for name, tensor in {**tensors, **kept}.items()}
            self._capture(key, placed)
        captured = self.captured[key]
        new = tensors if captured.condition == condition else {**tensors, **kept}
        captured.condition = condition
        return captured.run(new)

    def _compute(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One call of the module. Raises ContractError for a graph whose steps do not fit each other.

        Lack of memory and what the GPU reports stay what they are.
        """
        try:
            results: dict[str, Tensor] = self.module(tensors)
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error) or "CUDA" in str(error):
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise ContractError(
                f"{self.path} cannot be run ({reason}); verify the bundle, or build it again"
            ) from error
        return results

    def _capture(self, key: InputShapes, placed: dict[str, Tensor]) -> None:
        """Capture for new shapes. Older graphs read weights where they were: if linears have expanded, they go."""
        before = self.module.expanded
        captured = Captured.make(self._compute, placed)
        if self.module.expanded != before:
            self.captured.clear()
        self.captured[key] = captured
        logger.info("captured a CUDA graph for %s", key)


@dataclass(frozen=True)
class Seen:
    """An input of the condition: the caller's tensor and its count of changes in place, and a copy of its numbers.

    version: None where torch does not count (in inference mode); such a tensor is never taken for unchanged. It is read
    before the numbers are, so that a change in between makes the next call look again.
    """

    tensor: Tensor
    version: int | None
    copy: Tensor

    def is_(self, tensor: Tensor) -> bool:
        """Is it the same tensor, not written since?"""
        return tensor is self.tensor and self.version is not None and tensor._version == self.version


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written in place, None where torch does not count."""
    return None if tensor.is_inference() else tensor._version


class CudaEngine:
    """A lowered graph on the current GPU. It may be called from any number of threads: a captured graph owns its
    memory, so a lock lets one call run at a time, and a call on another stream waits for the one before.

    Whether the condition has changed is decided by comparing its numbers with a copy, which is also what is computed
    with, so callers may reuse or overwrite what they pass; a tensor that torch knows to be unchanged since the last
    call is not compared.
    """

    def __init__(self, folder: Path, device: str = "cuda") -> None:
        """Raises EnvironmentLacksError before anything is read where this machine cannot run the engine.

        device "cpu" runs the module without kernels and without capture: a proof of the executor, not a fast engine.
        """
        machine.require(("torch", "onnx", "onnx_ir"), "running the target cuda", "cuda")
        self.metadata = metadata_file.read(folder, CudaMetadata, metadata_file.VERSION_1)
        if device != "cpu":
            problem = machine_problem(self.metadata, visible_sm(), machine.tool_version("triton"))
            if problem:
                raise EnvironmentLacksError(problem)
        options, path = self.metadata["options"], folder / CONDITION
        rows = self.metadata["inputs"].items()
        self.declared = tuple(feeds.Declared(name, row["dtype"], tuple(row["shape"])) for name, row in rows)
        self.device = device
        self.lock = threading.Lock()
        self.step: Part | None = Part(folder / MODEL, options, device)
        self.condition = Part(path, options, device) if path.is_file() else None
        self.seen: dict[str, Seen] = {}
        self.kept: dict[str, Tensor] = {}
        self.conditions = 0
        self.done: torch.cuda.Event | None = None

    def run(self, inputs: Arrays) -> Arrays:
        """Outputs by name for inputs by name, NumPy on both sides. Raises RecipeError for inputs that do not fit."""
        import torch

        copies = {name: np.array(array, order="C") for name, array in inputs.items()}
        feeds.check_feeds(self.declared, copies)
        with self.lock:
            results = self._run({name: torch.from_numpy(array) for name, array in copies.items()})
            return {name: tensor.to("cpu", copy=True).numpy() for name, tensor in results.items()}

    def run_tensors(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As `run`, of tensors of any float or integer type on any device; the outputs are new tensors on the
        engine's."""
        feeds.check_feeds(self.declared, inputs, cast=True, bounded=False)
        with self.lock:
            known = {name for name, row in self.seen.items() if row.is_(inputs[name])}
            feeds.check_numbers({name: tensor for name, tensor in inputs.items() if name not in known})
            results = self._run(inputs)
            outputs = {name: tensor.clone() for name, tensor in results.items()}  # not in inference mode: plain tensors
            self._note()
        return outputs

    def _wait(self) -> None:
        """What the caller's stream does next comes after the last call, whichever stream that was on."""
        if self.done is not None:
            import torch

            torch.cuda.current_stream().wait_event(self.done)

    def _note(self) -> None:
        """The last call of this stream reads and writes the engine's memory up to here."""
        if self.device != "cpu":
            import torch

            self.done = torch.cuda.current_stream().record_event()

    def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs in the engine's own memory, which the next call overwrites."""
        import torch

        if self.step is None:
            raise RecipeError("the engine is closed; load it again")
        self._wait()
        with torch.inference_mode():
            if self.condition is not None:
                self._prepare(self.condition, {name: inputs[name] for name in self.condition.inputs})
            copies = {name: row.copy for name, row in self.seen.items()}
            return self.step.run(self._typed(self.step.inputs, {**inputs, **copies}), self.kept, self.conditions)

    def _prepare(self, part: Part, condition: Mapping[str, Tensor]) -> None:
        """Make `kept` and the copies in `seen` belong to this condition."""
        import torch

        new = [name for name, tensor in condition.items() if name not in self.seen or not self.seen[name].is_(tensor)]
        versions = {name: version_of(condition[name]) for name in new}
        placed = {name: tensor.to(self.device) for name, tensor in self._typed(new, condition).items()}
        changed = [name for name in new if name not in self.seen or not torch.equal(placed[name], self.seen[name].copy)]
        copies = {name: placed[name].clone() if name in changed else self.seen[name].copy for name in new}
        seen = self.seen | {name: Seen(condition[name], versions[name], copies[name]) for name in new}
        if changed:
            self.seen = {}  # nothing is known if what follows fails
            self.kept = part.run(self._typed(part.inputs, {name: row.copy for name, row in seen.items()}), {})
            self.conditions += 1
        self.seen = seen

    def _typed(self, names: Sequence[str], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs called `names`, those that the model has, in the model's types, where they are."""
        import torch

        rows = {name: row for name, row in self.metadata["inputs"].items() if name in names}
        return {name: inputs[name].to(getattr(torch, row["dtype"])).contiguous() for name, row in rows.items()}

    def close(self) -> None:
        """Free the GPU, after the call that is running; later calls raise RecipeError."""
        with self.lock:
            self.step = self.condition = None
            self.kept, self.seen = {}, {}
