"""Block reconstruction: learn the rounding of all linears of a block together, so that the block's output stays.

BRECQ (arXiv 2102.05426) as FP4DiT runs it: the input is what the network with quantized weights gives, the target the
float block's output, activations stay float, Adam over random batches of samples of all timesteps. The error is the
plain squared one: BRECQ's option of the Fisher information as its weight is left out.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn

from export.checkpoint import QuantizedLinear
from pipeline.calibrate.blocks import BlockCall, Observed, WeightOnlyLinear, run_block
from pipeline.calibrate.learn.adaround import Schedule, SoftRounding, undecided
from pipeline.progress import track

Pick = tuple[int, int]  # which call, which sample in it


@dataclass(frozen=True)
class LearningSettings:
    """How to learn. strength: weight of the regulariser; batch: samples per iteration."""

    schedule: Schedule
    learning_rate: float
    strength: float = 0.01
    batch: int = 16


class SoftLinear(nn.Module):
    """A linear with softly rounded weight; `share` is the h of its latest call, for the regulariser."""

    def __init__(self, rounding: SoftRounding, bias: Tensor | None) -> None:
        super().__init__()
        self.rounding, self.bias = rounding, bias
        self.share: Tensor = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        weight, self.share = self.rounding()
        return nn.functional.linear(x, weight, self.bias)


def output_loss(observed: Observed, layers: Sequence[QuantizedLinear], calls: int = 0) -> float:
    """`block_loss` of the block with these layers (float activations): mean over `calls` calls, evenly spread; 0: all.

    The block's input is that of the network quantized so far, the target the float output, as in learning.
    """
    block = with_parts(observed.block, {observed.names[layer.name]: WeightOnlyLinear(layer) for layer in layers})
    count = min(calls or len(observed.noisy), len(observed.noisy))
    places = torch.linspace(0, len(observed.noisy) - 1, count).round().long().tolist()
    outputs = run_block(block, [observed.noisy[i] for i in places])
    samples = [len(output) for output in outputs]
    losses = [float(block_loss(output, observed.outputs[i])) for output, i in zip(outputs, places, strict=True)]
    return sum(loss * n for loss, n in zip(losses, samples, strict=True)) / sum(samples)


def with_parts(block: nn.Module, parts: dict[str, nn.Module]) -> nn.Module:
    """A copy of the block with the modules at these paths replaced; the path "" is the block itself."""
    if "" in parts:
        return parts[""]
    copied = copy.deepcopy(block)
    for path, part in parts.items():
        copied.set_submodule(path, part)
    return copied


def reconstruct(
    observed: Observed, roundings: dict[str, SoftRounding], settings: LearningSettings, name: str, seed: int
) -> None:
    """Learn `v` of all roundings (layer name -> rounding). The same arguments give the same bytes."""
    linears = {layer: observed.block.get_submodule(path) for layer, path in observed.names.items()}
    soft = {layer: SoftLinear(rounding, linears[layer].bias) for layer, rounding in roundings.items()}
    block = with_parts(observed.block, {observed.names[layer]: part for layer, part in soft.items()})
    optimiser = torch.optim.Adam([part.rounding.v for part in soft.values()], lr=settings.learning_rate, fused=True)
    batches = Batches(observed.noisy, observed.outputs, settings.batch, generator(seed, name))
    iterations = settings.schedule.iterations
    for iteration in track(range(iterations), iterations, name):
        call, target = batches.draw()
        loss = block_loss(call.run(block), target)
        beta = settings.schedule.beta(iteration)
        if beta is not None:
            loss = loss + settings.strength * sum(undecided(part.share, beta) for part in soft.values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def block_loss(output: Tensor, target: Tensor) -> Tensor:
    """Squared error summed over the second axis (tokens) and averaged over the others, as the authors' code has it."""
    return (output - target).square().sum(1).mean()


def generator(seed: int, name: str) -> torch.Generator:
    """Random numbers that depend on the seed and the block only, so that a resumed run draws the same."""
    # Only the low 32 bits of a seed count in torch's CPU generator.
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


class Batches:
    """Random batches of samples out of many calls: of all timesteps and both guidance halves.

    Samples share a batch if their tensors have the same shapes; a batch is of the shapes of a randomly drawn sample.
    """

    def __init__(
        self, calls: Sequence[BlockCall], targets: Sequence[Tensor], size: int, generator: torch.Generator
    ) -> None:
        self.calls, self.targets, self.size, self.generator = calls, targets, size, generator
        shapes = [_shapes(call) for call in calls]
        self.picks: list[Pick] = [(i, row) for i, call in enumerate(calls) for row in range(len(call.hidden))]
        self.peers = {shape: [pick for pick in self.picks if shapes[pick[0]] == shape] for shape in set(shapes)}
        self.shapes = shapes

    def draw(self) -> tuple[BlockCall, Tensor]:
        """One batch of at most `size` different samples, and their targets."""
        drawn = int(torch.randint(len(self.picks), (1,), generator=self.generator))
        peers = self.peers[self.shapes[self.picks[drawn][0]]]
        order = torch.randperm(len(peers), generator=self.generator)[: self.size]
        picks = [peers[i] for i in order.tolist()]
        return join(self.calls, picks), torch.cat([self.targets[call][row : row + 1] for call, row in picks])


def join(calls: Sequence[BlockCall], picks: Sequence[Pick]) -> BlockCall:
    """One call with the picked samples; what has no batch axis is taken from the first."""
    anchor = calls[picks[0][0]]
    args = tuple(
        _join([(calls[i].args[place], calls[i], row) for i, row in picks]) for place in range(len(anchor.args))
    )
    kwargs = {key: _join([(calls[i].kwargs[key], calls[i], row) for i, row in picks]) for key in anchor.kwargs}
    return BlockCall(args, kwargs)


def _join(items: list[tuple[object, BlockCall, int]]) -> object:
    batches = [(value, row) for value, call, row in items if _is_batch(value, call)]
    return torch.cat([value[row : row + 1] for value, row in batches]) if batches else items[0][0]


def _is_batch(value: object, call: BlockCall) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(call.hidden)


def _shapes(call: BlockCall) -> tuple[tuple[int, ...] | None, ...]:
    """Shapes of one sample."""
    values = (*call.args, *call.kwargs.values())
    return tuple(tuple(value.shape[1:]) if _is_batch(value, call) else None for value in values)
