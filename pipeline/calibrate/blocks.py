"""Repeated blocks under calibration: each one's inputs and outputs in the float model, and its inputs as the network
whose earlier blocks have quantized weights gives them. One block's tensors are in memory at a time.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import nn

from export.checkpoint import QuantizedLinear
from export.models.families import shared_names
from export.models.load import LoadedModel, denoiser
from export.models.torch_modules import Denoiser, stated_config
from pipeline.backends.base import Arrays
from pipeline.calibrate.data import CalibrationData
from pipeline.calibrate.plan import LayerPlan
from pipeline.calibrate.streams import BlockCall, Link, Stream, is_chain, learn_flows, seeing, stream_shares
from pipeline.generate.sampling import take_samples

Tensors = list[torch.Tensor]
Streams = tuple[torch.Tensor, ...]
ONLY = (Stream(0, 1.0),)  # of a block that gives one tensor
# Samples, of calls spread evenly, on which the shares of streams are measured.
SHARE_SAMPLES = 4


def block_of(layer: str) -> str:
    """Path of the repeated block that holds a layer; the layer itself where it is in none.

    >>> block_of("transformer_blocks.3.attn1.to_out.0"), block_of("proj_in")
    ('transformer_blocks.3', 'proj_in')
    """
    match = re.match(r"^(?:[^.\d]+\.)*?[^.\d]+\.\d+(?=\.)", layer)
    return match.group(0) if match else layer


def group_by_block(plans: Sequence[LayerPlan]) -> dict[str, list[LayerPlan]]:
    """Block path -> its layers, both in order."""
    blocks: dict[str, list[LayerPlan]] = {}
    for plan in plans:
        blocks.setdefault(block_of(plan.name), []).append(plan)
    return blocks


def paths_inside(block: str, plans: Sequence[LayerPlan]) -> dict[str, str]:
    """Layer name -> path inside the block, "" where the layer is the block."""
    return {plan.name: plan.name.removeprefix(block).lstrip(".") for plan in plans}


@dataclass(eq=False, repr=False)
class Observed:
    """What a method sees of one block. Tensors are float32 and must not be changed.

    block: the float block (copy it to change it); names: layer name -> path inside the block; calls: its calls in the
    float model, noisy: in the network whose earlier blocks have quantized weights (FP4DiT's asymmetric
    reconstruction); timesteps: model input of each call; samples: how many each call has; rows: how many rows of every
    value of a call are a sample's, see `BlockFlow.rows_per_sample`; streams: what goes on from the block.
    """

    block: nn.Module
    names: dict[str, str]
    calls: list[BlockCall]
    noisy: list[BlockCall]
    timesteps: list[float]
    samples: list[int]
    rows: tuple[int, ...] | None
    streams: Sequence[Stream] = ONLY
    _outputs: list[Streams] | None = field(default=None, init=False)
    _kept: dict[tuple[bool, int], dict[str, Tensors]] = field(default_factory=dict, init=False)

    def free(self) -> None:
        """Let go of all tensors: others may still hold this object while the next block is observed."""
        self.calls, self.noisy, self._outputs, self._kept = [], [], None, {}

    @property
    def outputs(self) -> list[Streams]:
        """The float block's streams for each of `calls`."""
        if self._outputs is None:
            self._outputs = run_block(self.block, self.calls, self.streams)
        return self._outputs

    def layer_inputs(self, name: str, noisy: bool = False, rows: int = 0) -> Tensors:
        """Input of a layer in each call as [rows, K]: all rows, or at most `rows`, evenly spread.

        With `rows` the inputs of all layers are kept after the first request; with all rows only those of `name` are
        made, anew each time.
        """

        def spread(x: torch.Tensor) -> torch.Tensor:
            x = x.flatten(0, -2)
            if rows and len(x) > rows:
                x = x[torch.linspace(0, len(x) - 1, rows).round().long()]
            return x.float().clone()

        if not rows:
            return self.recorded([name], spread, noisy)[name]
        if (noisy, rows) not in self._kept:
            self._kept[noisy, rows] = self.recorded(self.names, spread, noisy)
        return self._kept[noisy, rows][name]

    @torch.no_grad()
    def recorded(
        self, names: Iterable[str], take: Callable[[torch.Tensor], torch.Tensor], noisy: bool = False
    ) -> dict[str, Tensors]:
        """Layer name -> what `take` makes of the layer's input [..., K] in each call, from one run of all calls."""
        by_layer: dict[str, Tensors] = {name: [] for name in names}

        def see(name: str, call: BlockCall) -> None:
            by_layer[name].append(take(call.layer_input().detach()))

        with seeing(self.block, {name: self.names[name] for name in by_layer}, see):
            for call in self.noisy if noisy else self.calls:
                call.run(self.block)
        return by_layer


def run_block(block: nn.Module, calls: Sequence[BlockCall], streams: Sequence[Stream] = ONLY) -> list[Streams]:
    """The streams that the block gives for each call. Calls that miss a tensor (a block of one layer) are refused by
    the block."""
    return list(_outputs(block, calls, streams))


@torch.no_grad()
def _outputs(block: nn.Module, calls: Iterable[BlockCall], streams: Sequence[Stream]) -> Iterator[Streams]:
    """The outputs one by one; each call is read when its output is asked for."""
    for call in calls:
        yield streams_of(call.run(block), streams)


def streams_of(outputs: Sequence[object], streams: Sequence[Stream]) -> Streams:
    """The streams among what a block gives."""
    given = (outputs[stream.place] for stream in streams)
    return tuple(tensor for tensor in given if isinstance(tensor, torch.Tensor))


def with_parts(block: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of the block with the modules at these paths replaced; the path "" is the block itself."""
    if "" in parts:
        return parts[""]
    copied = copy.deepcopy(block)
    for path, part in parts.items():
        copied.set_submodule(path, part)
    return copied


def _follow(calls: list[BlockCall], link: Link, streams: Sequence[Stream], outputs: Iterator[Streams]) -> None:
    """Put the next block's call in place of each, one by one: old and new need not be in memory together."""
    places = [stream.place for stream in streams]
    for i, given in enumerate(outputs):
        calls[i] = link.follow(calls[i], dict(zip(places, given, strict=True)))


class _Captured(Exception):  # not an error: the call that was waited for has come
    """Ends a model run early."""


class BlockRunner:
    """Runs the calibration calls from block to block, for the float model and for the quantized one.

    Where all that a block gets is what its predecessor got and gave, the calls go on from there; else (long skips,
    something between two blocks) the whole model runs again up to the block. blocks: in the order in which they run.
    """

    def __init__(self, model: LoadedModel, data: CalibrationData, blocks: Sequence[str]) -> None:
        self.model, self.data = model, data
        self.module = denoiser(model)
        self.timesteps = [call.timestep for call in data.calls]
        self.samples = [call.samples for call in data.calls]
        # One sample, unless a call has one: rows of samples are told by what another number of samples changes.
        known = next(number for number in range(1, len(data.calls) + 2) if number not in self.samples)
        picked = [number % self.samples[0] for number in range(known)]
        shared = shared_names(self.module.family.inputs(stated_config(self.module.transformer)))
        self.flows = learn_flows(self.module, blocks, take_samples(data.calls[0].inputs, picked, shared), known)
        self.blocks = list(self.flows)
        self.shares = stream_shares(self.module, self.flows, _spread_samples(data, shared))
        self._link: Link | None = None  # from the block that is observed to the next
        self.done: dict[str, nn.Module] = {}  # finished layers; stays empty for a chain, which needs none of them
        self._calls: list[BlockCall] | None = None
        self._noisy: list[BlockCall] | None = None

    @property
    def is_chain(self) -> bool:
        """Whether every block but the first follows from its predecessor."""
        return is_chain(self.flows)

    def observe(self, block: str, plans: Sequence[LayerPlan]) -> Observed:
        """The block's calls. Blocks must be observed in order, each followed by `advance`."""
        part = float_copy(self.module.transformer.get_submodule(block))
        self._link = self._link_behind(block)
        if self._calls is None or self._noisy is None:
            self._calls = self._capture(self.module, block)
            self._noisy = self._capture(denoiser(self.model, self.done), block) if self.done else list(self._calls)
        rows = {
            self.flows[block].rows_per_sample(call, samples)
            for call, samples in zip(self._calls, self.samples, strict=True)
        }
        return Observed(
            part,
            paths_inside(block, plans),
            self._calls,
            self._noisy,
            self.timesteps,
            self.samples,
            rows.pop() if len(rows) == 1 else None,
            self._streams(block),
        )

    def _link_behind(self, block: str) -> Link | None:
        """To the next block, if there is one."""
        after = self.blocks[self.blocks.index(block) + 1 :]
        return self.flows[after[0]].link if after else None

    def _streams(self, block: str) -> tuple[Stream, ...]:
        """Those with a share, and what else the next block takes."""
        shares, taken = self.shares[block], frozenset[int]() if self._link is None else self._link.taken
        return tuple(Stream(place, shares.get(place, 0.0)) for place in sorted({*shares, *taken}))

    def advance(self, observed: Observed, layers: Sequence[QuantizedLinear]) -> None:
        """Go on behind a block that is finished, whose `observed` is then empty."""
        replacements = {layer.name: WeightOnlyLinear(layer) for layer in layers}
        if not self.is_chain:
            self.done |= replacements
        link = self._link
        if link is None:
            self._calls = self._noisy = None
        else:
            self._calls, self._noisy = observed.calls, observed.noisy
            _follow(self._calls, link, observed.streams, iter(observed.outputs))
            quantized = with_parts(observed.block, {observed.names[name]: one for name, one in replacements.items()})
            _follow(self._noisy, link, observed.streams, _outputs(quantized, observed.noisy, observed.streams))
        observed.free()

    @torch.no_grad()
    def _capture(self, module: Denoiser, block: str) -> list[BlockCall]:
        """The block's arguments in every calibration call; the model runs no further than that."""
        calls: list[BlockCall] = []

        def see(_: str, call: BlockCall) -> None:
            calls.append(call)
            raise _Captured

        with seeing(module.transformer, {block: block}, see):
            for call in self.data.calls:
                with suppress(_Captured):
                    module(**tensors(call.inputs))
        return calls


def _spread_samples(data: CalibrationData, shared: frozenset[str]) -> list[Arrays]:
    """Model inputs of at most SHARE_SAMPLES single samples, of calls and places in a call (guidance halves) spread."""
    count = min(SHARE_SAMPLES, len(data.calls))
    calls = [data.calls[i] for i in torch.linspace(0, len(data.calls) - 1, count).round().long().tolist()]
    rows = [number * call.samples // count for number, call in enumerate(calls)]
    return [take_samples(call.inputs, slice(row, row + 1), shared) for call, row in zip(calls, rows, strict=True)]


@torch.no_grad()
def first_calls(module: Denoiser, blocks: Sequence[str], inputs: Arrays) -> dict[str, BlockCall]:
    """Block -> its call in one run of the denoiser."""
    calls: dict[str, BlockCall] = {}
    with seeing(module.transformer, {name: name for name in blocks}, calls.__setitem__):
        module(**tensors(inputs))
    return calls


def tensors(inputs: Arrays) -> dict[str, torch.Tensor]:
    """The same arrays in torch, sharing their memory."""
    return {name: torch.from_numpy(value) for name, value in inputs.items()}


def float_copy(block: nn.Module) -> nn.Module:
    """A float32 copy of the block; linears that are upcast at every call become plain ones."""
    float_block = copy.deepcopy(block).float()
    for path, part in list(float_block.named_modules()):
        if type(part) is not nn.Linear and isinstance(part, nn.Linear):
            plain = nn.Linear(part.in_features, part.out_features, part.bias is not None, device="meta")
            plain.weight, plain.bias = part.weight, part.bias
            float_block.set_submodule(path, plain)
    return float_block.requires_grad_(False).eval()


class WeightOnlyLinear(nn.Linear):
    """A quantized layer with float activations: its weight dequantized, balanced inputs balanced."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight = nn.Parameter(torch.from_numpy(layer.dequantized()).float(), requires_grad=False)
        if layer.bias is not None:
            self.bias = nn.Parameter(torch.from_numpy(layer.bias), requires_grad=False)
        multiplier, offset = (getattr(layer, key, None) for key in ("input_multiplier", "input_offset"))
        self.input_multiplier = None if multiplier is None else torch.from_numpy(multiplier)
        self.input_offset = None if offset is None else torch.from_numpy(offset)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = input if self.input_multiplier is None else input * self.input_multiplier
        return super().forward(x if self.input_offset is None else x + self.input_offset)
