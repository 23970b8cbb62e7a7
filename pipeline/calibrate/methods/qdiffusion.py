"""Q-Diffusion (arXiv 2302.04304): BRECQ weights, then static activation steps learned on the block's output (LSQ).

Per output channel weights and one activation scale per layer for all timesteps, of least squared error at first. Then
the rounded weights stay and the activation scales are learned with straight-through rounding (arXiv 1902.08153). The
authors' rate, 4e-4, is for the scales themselves; here a factor on each scale is learned, so that the rate does not
depend on the size of a layer's activations. Weights are symmetric, where theirs are asymmetric, and ranges minimise the
squared error, where their code has the 2.4-norm. Not here: their split of a concatenated skip's two halves (no bundled
family quantizes one) and quantized softmax outputs.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from export.checkpoint import QuantizedLinear
from export.formats.format import decode, get_format, quantize
from pipeline.calibrate.blocks import Observed, Streams, WeightOnlyLinear, streams_of, with_parts
from pipeline.calibrate.learn import ste
from pipeline.calibrate.learn.reconstruct import Batches, block_loss, generator
from pipeline.calibrate.method import Unit
from pipeline.calibrate.methods.baseline import StaticBaseline
from pipeline.calibrate.streams import BlockCall
from pipeline.progress import track

logger = logging.getLogger(__name__)
LEAST_FACTOR = 1e-3  # a scale stays above 0


class StaticLinear(nn.Module):
    """A quantized linear with a static activation quantizer whose scale takes a learned factor.

    The zero is a value of the format times -scale and stays that value, so that x = 0 remains exact.
    """

    scale: Tensor

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        assert layer.activation_scale is not None, f"{layer.name}: a static scale is needed"
        self.layer, self.linear, self.format = layer, WeightOnlyLinear(layer), get_format(layer.activation_format)
        self.register_buffer("scale", torch.from_numpy(layer.activation_scale), persistent=False)
        self.zero_value = (
            None if layer.activation_zero is None else self._value_at_zero(float(layer.activation_zero[0]))
        )
        self.factor = nn.Parameter(torch.ones(1))

    def _value_at_zero(self, zero: float) -> float:
        """The format's value that stands for x = 0."""
        return float(decode(self.format, quantize(self.format, -zero / float(self.scale[0]))))

    def ranges(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero, [1] each."""
        scale = self.scale * self.factor.clamp(min=LEAST_FACTOR)
        return scale, None if self.zero_value is None else 0.0 - scale * self.zero_value  # never -0

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.linear(ste.per_tensor(self.format, x, *self.ranges()))
        return output

    def finished(self) -> QuantizedLinear:
        """The layer with the learned scale."""
        scale, zero = (None if value is None else value.detach().numpy().astype(np.float32) for value in self.ranges())
        return replace(self.layer, activation_scale=scale, activation_zero=zero)


def learn_steps(
    observed: Observed, layers: list[QuantizedLinear], iterations: int, learning_rate: float, name: str, seed: int
) -> list[QuantizedLinear]:
    """Learn the activation scales of a block's layers together; not used where 64 samples are no better off."""
    parts = {layer.name: StaticLinear(layer) for layer in layers}
    block = with_parts(observed.block, {observed.names[layer]: part for layer, part in parts.items()})
    judged = Batches(observed, 64, generator(seed, f"{name} judged")).draw()
    with torch.no_grad():
        before = float(_loss(observed, block, *judged))
    optimiser = torch.optim.Adam([part.factor for part in parts.values()], lr=learning_rate)
    batches = Batches(observed, 16, generator(seed, f"{name} activations"))
    for _ in track(range(iterations), iterations, f"{name} activations"):
        batch = batches.draw()
        optimiser.zero_grad()
        _loss(observed, block, *batch).backward()
        optimiser.step()
    with torch.no_grad():
        after = float(_loss(observed, block, *judged))
    logger.info("%s: loss %.4g with activation scales of least squared error, %.4g learned", name, before, after)
    return [part.finished() for part in parts.values()] if after < before else layers


def _loss(observed: Observed, block: nn.Module, call: BlockCall, target: Streams) -> Tensor:
    return block_loss(streams_of(call.run(block), observed.streams), target, observed.streams)


class QDiffusion(StaticBaseline):
    """The method "qdiffusion"."""

    def quantize(self, unit: Unit) -> list[QuantizedLinear]:
        layers, options = self.quantize_block(unit, {}), self.context.options
        iterations, rate = int(options["step_iterations"]), float(options["step_lr"])
        if not iterations:
            return layers
        return learn_steps(unit.observed, layers, iterations, rate, unit.name, self.context.seed)
