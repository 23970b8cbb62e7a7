"""Block reconstruction: learn the rounding of all linears of a block together, so that the block's output stays.

BRECQ (arXiv 2102.05426) as FP4DiT runs it: the input is what the network with quantized weights gives, the target the
float block's output, activations stay float, Adam over random batches of samples of all timesteps. The error is the
plain squared one; where a block gives several streams, each counts by its share of the sensitivity of the model's
output (`stream_shares`): BRECQ's option of the Fisher information as a weight, but one number for each stream.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from export.checkpoint import QuantizedLinear
from export.errors import ModelError
from pipeline.calibrate.blocks import Observed, Streams, WeightOnlyLinear, run_block, streams_of, with_parts
from pipeline.calibrate.learn.adaround import Schedule, SoftRounding, undecided
from pipeline.calibrate.streams import BlockCall, Stream, same_values
from pipeline.progress import track

Pick = tuple[int, int]  # which call, which sample in it
# Relative error of a sample in another batch: far above what another order of sums does to float32, far below 1.
SAME_SAMPLE = 1e-3
ANOTHER = "use a method that learns from whole calls (--set method=NAME: rtn, qdit, adaround, awq, svdquant)"


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
    outputs = run_block(block, [observed.noisy[i] for i in places], observed.streams)
    samples = [observed.samples[i] for i in places]
    losses = [
        float(block_loss(output, observed.outputs[i], observed.streams))
        for output, i in zip(outputs, places, strict=True)
    ]
    return sum(loss * n for loss, n in zip(losses, samples, strict=True)) / sum(samples)


def reconstruct(
    observed: Observed, roundings: dict[str, SoftRounding], settings: LearningSettings, name: str, seed: int
) -> None:
    """Learn `v` of all roundings (layer name -> rounding). The same arguments give the same bytes."""
    linears = {layer: observed.block.get_submodule(path) for layer, path in observed.names.items()}
    soft = {layer: SoftLinear(rounding, linears[layer].bias) for layer, rounding in roundings.items()}
    block = with_parts(observed.block, {observed.names[layer]: part for layer, part in soft.items()})
    optimiser = torch.optim.Adam([part.rounding.v for part in soft.values()], lr=settings.learning_rate, fused=True)
    batches = Batches(observed, settings.batch, generator(seed, name))
    iterations = settings.schedule.iterations
    for iteration in track(range(iterations), iterations, name):
        call, target = batches.draw()
        loss = block_loss(streams_of(call.run(block), observed.streams), target, observed.streams)
        beta = settings.schedule.beta(iteration)
        if beta is not None:
            loss = loss + settings.strength * sum(undecided(part.share, beta) for part in soft.values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def block_loss(outputs: Streams, targets: Streams, streams: Sequence[Stream]) -> Tensor:
    """Squared error summed over the second axis (tokens) and averaged over the others, as the authors' code has it.

    Of several streams [B, T_s, ...]: the sum of share_s * mean squared error_s, times the sum of T_s. Then an error
    counts by what it changes in the model's output, and streams that are worth the same for each of their tokens give
    what one stream of all these tokens would.
    """
    counted = [
        (stream.share, output, target)
        for stream, output, target in zip(streams, outputs, targets, strict=True)
        if stream.share
    ]
    tokens = sum(target.shape[1] for _, _, target in counted)
    losses = [
        share * (tokens / target.shape[1]) * (output - target).square().sum(1).mean()
        for share, output, target in counted
    ]
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()


def generator(seed: int, name: str) -> torch.Generator:
    """Random numbers that depend on the seed and the block only, so that a resumed run draws the same."""
    # Only the low 32 bits of a seed count in torch's CPU generator.
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


class Batches:
    """Random batches of samples out of a block's noisy calls: of all timesteps and both guidance halves.

    Samples share a batch if their tensors have the same shapes, and what serves all samples of a call is the same; a
    batch is of the shapes of a randomly drawn sample. Raises ModelError where samples cannot be taken out of calls.
    """

    def __init__(self, observed: Observed, size: int, generator: torch.Generator) -> None:
        self.observed, self.size, self.generator = observed, size, generator
        self.rows = self._rows()
        self.picks: list[Pick] = [(i, row) for i, count in enumerate(observed.samples) for row in range(count)]
        kinds = _kinds(observed.noisy, self.rows)
        self.peers = {kind: [pick for pick in self.picks if kinds[pick[0]] == kind] for kind in set(kinds)}
        self.kinds = kinds
        self._refuse_unlike()

    def draw(self) -> tuple[BlockCall, Streams]:
        """One batch of at most `size` different samples, and their targets."""
        drawn = int(torch.randint(len(self.picks), (1,), generator=self.generator))
        peers = self.peers[self.kinds[self.picks[drawn][0]]]
        order = torch.randperm(len(peers), generator=self.generator)[: self.size]
        picks = [peers[i] for i in order.tolist()]
        return join(self.observed.noisy, picks, self.rows), self._targets(picks)

    def _targets(self, picks: Sequence[Pick]) -> Streams:
        outputs, samples = self.observed.outputs, self.observed.samples
        return tuple(
            torch.cat([_sample(outputs[i][place], row, len(outputs[i][place]) // samples[i]) for i, row in picks])
            for place in range(len(self.observed.streams))
        )

    def _rows(self) -> tuple[int, ...]:
        rows, observed = self.observed.rows, self.observed
        whole = (
            len(stream) % count == 0
            for outputs, count in zip(observed.outputs, observed.samples, strict=True)
            for stream in outputs
        )
        if rows is None or not all(whole):
            raise ModelError(f"{self._block()}: what it is called with does not come apart into samples; {ANOTHER}")
        return rows

    def _refuse_unlike(self) -> None:
        """The float block must give two samples by themselves what it gave them in their calls."""
        peers = max(self.peers.values(), key=len)
        picks = [peers[0], peers[-1]][: len(peers)]
        joined = join(self.observed.calls, picks, self.rows)
        (outputs,) = run_block(self.observed.block, [joined], self.observed.streams)
        for output, target in zip(outputs, self._targets(picks), strict=True):
            if (output - target).norm() > SAME_SAMPLE * target.norm():
                raise ModelError(
                    f"{self._block()}: a sample out of a call gives something else than in the call, so that batches "
                    f"of samples cannot be made; {ANOTHER}"
                )

    def _block(self) -> str:
        """What the block is, for messages."""
        return f"block with {next(iter(self.observed.names))}"


def join(calls: Sequence[BlockCall], picks: Sequence[Pick], rows: Sequence[int]) -> BlockCall:
    """One call with the picked samples; what serves all samples is taken from the first. rows: see `Observed`."""
    values = [calls[i].values() for i, _ in picks]
    return calls[picks[0][0]].with_values([
        torch.cat([_sample(own[place], row, count) for own, (_, row) in zip(values, picks, strict=True)])
        if count
        else values[0][place]
        for place, count in enumerate(rows)
    ])  # fmt: skip


def _sample(value: object, row: int, count: int) -> Tensor:
    """One sample of a tensor with so many rows for each."""
    assert isinstance(value, Tensor)
    return value[row * count : (row + 1) * count]


def _kinds(calls: Sequence[BlockCall], rows: Sequence[int]) -> list[int]:
    """A number for each call: that of the first call whose samples it can share a batch with."""
    first: list[int] = []
    values = [call.values() for call in calls]
    for own in values:
        alike = (i for i in dict.fromkeys(first) if all(map(_go_together, own, values[i], rows)))
        first.append(next(alike, len(first)))
    return first


def _go_together(one: object, other: object, count: int) -> bool:
    """Can samples of `one` and `other`, of so many rows each, be in one batch?"""
    if isinstance(one, Tensor) and isinstance(other, Tensor) and count:
        return one.shape[1:] == other.shape[1:]
    return same_values(one, other)
