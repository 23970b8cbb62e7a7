"""Which tensor of a `cuda` engine with FP16 activations is beyond FP16, found on the CPU.

The lowered graph is run as the engine runs it, step by step: in float32, and with FP16 between the steps. The first
step whose result is finite in one and not in the other has overflowed. A GPU is not needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from export.formats.operands import HALF_MAX
from pipeline.backends.base import Arrays
from pipeline.progress import raise_if_stopped

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.backends.cuda.module import LoweredModule


@dataclass(frozen=True)
class Overflow:
    """step: the node whose result is beyond FP16, which reaches `largest` in float32. layer: the quantized linear that
    it belongs to, or the next one behind it; None at the output. inside: is it that linear's own output?"""

    step: str
    layer: str | None
    largest: float
    inside: bool

    def __str__(self) -> str:
        place = f"the output of {self.layer}" if self.inside else f"before {self.layer or 'the output'}, {self.step}"
        return f"FP16 overflow: {place} reaches {self.largest:.3g}, FP16 holds {HALF_MAX:g}; use cuda.activations=fp32"


def find_overflow(path: Path, calls: dict[str, Arrays]) -> tuple[str, Overflow] | None:
    """(call, overflow) of the first of `calls` that has one; None without. path: a graph lowered for `cuda`."""
    import torch

    from export.onnx_files import load_model
    from pipeline.backends.cuda.module import LoweredModule

    tensors = {text: {name: torch.from_numpy(array) for name, array in call.items()} for text, call in calls.items()}
    largest: dict[str, list[float]] = {}
    with torch.inference_mode():
        module = LoweredModule(load_model(path), "fp32").finish()
        for text, inputs in tensors.items():
            largest[text] = [size for _, size in _sizes(module, inputs)]
        module = LoweredModule(load_model(path), "fp16").finish()
        for text, inputs in tensors.items():
            for size, (place, half) in zip(largest[text], _sizes(module, inputs), strict=True):
                if half == float("inf") > size:
                    return text, _overflow(module, place, size)
    return None


def _sizes(module: LoweredModule, inputs: dict[str, Tensor]) -> Iterator[tuple[int, float]]:
    """(index of the step, the largest absolute number of its float results) step by step; inf if one is not finite.

    An input in FP16 comes before them all, with the index -1.
    """
    tensors = module.start(inputs)
    for name in module.inputs:
        yield -1, _largest([tensors[name]])
    for place, step in enumerate(module.steps):
        raise_if_stopped()
        yield place, _largest(step.advance(tensors))


def _largest(tensors: Sequence[Tensor]) -> float:
    import torch

    floats = [x for x in tensors if isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel()]
    sizes = [float(x.abs().max()) if bool(torch.isfinite(x).all()) else float("inf") for x in floats]
    return max(sizes, default=0.0)


def _overflow(module: LoweredModule, place: int, largest: float) -> Overflow:
    from pipeline.backends.cuda.torch_gemm import Gemm

    behind = module.steps[max(place, 0) :]
    layer = next((step.name for step in behind if isinstance(step.run, Gemm)), None)
    step = module.steps[place].name if place >= 0 else "an input"
    return Overflow(step, layer, largest, inside=step == layer)
