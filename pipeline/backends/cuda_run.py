"""Runs a `cuda` engine: the lowered graph as a torch module on an NVIDIA GPU, captured as a CUDA graph.

What depends on the condition alone (keys and values of cross-attention) is a module of its own, which runs when the
condition changes. For each set of input shapes there are fixed input tensors and one captured graph; a call copies in
what is new, replays, copies out.

No machine with a GPU was at hand: capture and kernels are compiled, not run. The same modules run on the CPU
(device="cpu", without capture), where they are proven equal to the graph in onnxruntime.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.errors import ContractError, EnvironmentLacksError, RecipeError
from pipeline import machine
from pipeline.backends.base import Arrays
from pipeline.backends.rtx_run import visible_sm

logger = logging.getLogger(__name__)
MODEL, CONDITION, METADATA = "model.onnx", "condition.onnx", "metadata.json"
SCHEMA_VERSION = 1
MIN_SM = 80
# Calls before the capture: kernels are compiled in the first, and torch's libraries ask for their memory.
WARM_UPS = 2


def machine_problem(metadata: Mapping[str, Any], sm: int, triton: str) -> str:
    """Why a GPU of capability `sm` (0: none) with that release of triton ('': none) cannot run; empty if it can."""
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
    return ""


def read_metadata(folder: Path) -> dict[str, Any]:
    """metadata.json of a built engine. Raises ContractError for a damaged file or another schema."""
    path = folder / METADATA
    try:
        found = dict(json.loads(path.read_text()))
        if found["schema_version"] != SCHEMA_VERSION:
            raise ContractError(
                f"{path}: schema {found['schema_version']}, this version reads {SCHEMA_VERSION}; build the engine again"
            )
        return found | {"inputs": dict(found["inputs"]), "options": dict(found["options"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ContractError(f"{path} cannot be read ({error}); build the engine again") from error


def check_inputs(expected: Mapping[str, Mapping[str, Any]], inputs: Arrays) -> None:
    """Raise RecipeError for a missing or unknown input, or one of another number of axes or fixed size."""
    if wrong := sorted(set(expected) ^ set(inputs)):
        raise RecipeError(f"inputs {wrong} are missing or unknown; the engine takes {', '.join(sorted(expected))}")
    for name, row in expected.items():
        shape, found = row["shape"], inputs[name].shape
        fits = len(shape) == len(found) and all(
            size == known for size, known in zip(found, shape, strict=True) if isinstance(known, int)
        )
        if not fits:
            raise RecipeError(f"input {name} has shape {found}; the engine takes {tuple(shape)}")


@dataclass
class Captured:
    """One CUDA graph: write `inputs`, replay, read `outputs`. condition: the number of the condition in `inputs`."""

    graph: Any
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    condition: int = 0

    @classmethod
    def make(cls, module: Any, inputs: dict[str, Any]) -> Captured:
        """Warm up on a stream of its own, as captures must, then capture. Outputs lie in the graph's own memory."""
        import torch

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                module(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = module(inputs)
        return cls(graph, inputs, outputs)

    def run(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        for name, tensor in arrays.items():
            self.inputs[name].copy_(tensor)
        self.graph.replay()
        return self.outputs


class Part:
    """A module with its captured graphs; on the CPU it just runs."""

    def __init__(self, path: Path, options: Mapping[str, str], device: str) -> None:
        import onnx_ir as ir

        from pipeline.backends.cuda_module import LoweredModule

        module = LoweredModule(ir.load(path), **options).finish()
        self.inputs, self.device = module.inputs, device
        self.module: Any = module.to(device).eval()
        self.captured: dict[tuple[Any, ...], Captured] = {}

    def run(self, tensors: dict[str, Any], kept: Mapping[str, Any], condition: int = 0) -> dict[str, Any]:
        """Outputs on the device. kept: inputs there already, which are copied only if `condition` is another one."""
        kept = {name: tensor for name, tensor in kept.items() if name in self.inputs}
        if self.device == "cpu":
            found: dict[str, Any] = self.module({**tensors, **kept})
            return found
        key = tuple((name, tuple(tensor.shape)) for name, tensor in sorted({**tensors, **kept}.items()))
        if key not in self.captured:
            placed = {name: tensor.to(self.device, copy=True) for name, tensor in {**tensors, **kept}.items()}
            self._capture(key, placed)
        captured = self.captured[key]
        new = tensors if captured.condition == condition else {**tensors, **kept}
        captured.condition = condition
        return captured.run(new)

    def _capture(self, key: tuple[Any, ...], placed: dict[str, Any]) -> None:
        """Capture for new shapes. Older graphs read weights where they were: if linears have expanded, they go."""
        before = self.module.expanded
        made = Captured.make(self.module, placed)
        if self.module.expanded != before:
            self.captured.clear()
        self.captured[key] = made
        logger.info("captured a CUDA graph for %s", key)


class CudaEngine:
    """A lowered graph on the current GPU. One call at a time.

    Whether the condition has changed is decided by comparing all its numbers with a copy, so callers may reuse or
    overwrite their arrays.
    """

    def __init__(self, folder: Path, device: str = "cuda") -> None:
        """Raises EnvironmentLacksError before anything is read where this machine cannot run the engine.

        device "cpu" runs the module without kernels and without capture: a proof of the executor, not a fast engine.
        """
        machine.require(("torch", "onnx_ir"), "running the target cuda")
        self.metadata = read_metadata(folder)
        if device != "cpu":
            problem = machine_problem(self.metadata, visible_sm(), machine.tool_version("triton"))
            if problem:
                raise EnvironmentLacksError(problem)
        options, path = self.metadata["options"], folder / CONDITION
        self.step: Part | None = Part(folder / MODEL, options, device)
        self.condition = Part(path, options, device) if path.is_file() else None
        self.kept_for: Arrays = {}
        self.kept: dict[str, Any] = {}
        self.conditions = 0

    def run(self, inputs: Arrays) -> Arrays:
        """Outputs by name for inputs by name, NumPy on both sides."""
        import torch

        if self.step is None:
            raise RecipeError("the engine is closed; load it again")
        check_inputs(self.metadata["inputs"], inputs)
        with torch.inference_mode():
            if self.condition is not None:
                self._prepare(self.condition, {name: inputs[name] for name in self.condition.inputs})
            found = self.step.run(self._tensors(self.step.inputs, inputs), self.kept, self.conditions)
            return {name: tensor.to("cpu", copy=True).numpy() for name, tensor in found.items()}

    def _prepare(self, part: Part, condition: Arrays) -> None:
        """Make `kept` belong to this condition."""
        if self.kept and all(np.array_equal(array, self.kept_for[name]) for name, array in condition.items()):
            return
        self.kept = part.run(self._tensors(part.inputs, condition), {})
        self.kept_for = {name: np.array(array) for name, array in condition.items()}
        self.conditions += 1

    def _tensors(self, names: Sequence[str], inputs: Arrays) -> dict[str, Any]:
        """The arrays called `names`, those that the model has, as tensors on the host."""
        import torch

        rows = {name: row for name, row in self.metadata["inputs"].items() if name in names}
        return {name: torch.from_numpy(np.ascontiguousarray(inputs[name], row["dtype"])) for name, row in rows.items()}

    def close(self) -> None:
        """Free the GPU; the engine cannot run afterwards."""
        self.step = self.condition = None
        self.kept, self.kept_for = {}, {}
