"""Repeated blocks under calibration: each one's inputs and outputs in the float model, and its inputs as the network
whose earlier blocks have quantized weights gives them. One block's tensors are in memory at a time.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from export.checkpoint import QuantizedLinear
from export.models.families import shared_names
from pipeline.backends.base import Arrays
from pipeline.calibrate.data import CalibrationData
from pipeline.calibrate.plan import LayerPlan
from pipeline.generate.sampling import take_samples

if TYPE_CHECKING:
    from export.models.load import LoadedModel

logger = logging.getLogger(__name__)
Tensors = list[torch.Tensor]


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


@dataclass(frozen=True)
class BlockCall:
    """Arguments of one call of a block, as the model gives them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> torch.Tensor:
        """The tensor that goes from block to block, [B, S, C]."""
        states: torch.Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return states

    def with_hidden(self, hidden: torch.Tensor) -> BlockCall:
        if self.args:
            return BlockCall((hidden, *self.args[1:]), self.kwargs)
        return BlockCall((), self.kwargs | {"hidden_states": hidden})

    def run(self, block: nn.Module) -> Any:
        return block(*self.args, **self.kwargs)


class Observed:
    """What a method sees of one block. Tensors are float32 and must not be changed.

    block: the float block (copy it to change it); names: layer name -> path inside the block; calls: its calls in the
    float model, noisy: in the network whose earlier blocks have quantized weights (FP4DiT's asymmetric
    reconstruction); timesteps: model input of each call.
    """

    def __init__(
        self,
        block: nn.Module,
        names: dict[str, str],
        calls: list[BlockCall],
        noisy: list[BlockCall],
        timesteps: list[float],
    ) -> None:
        self.block, self.names, self.calls, self.noisy, self.timesteps = block, names, calls, noisy, timesteps
        self._outputs: Tensors | None = None
        self._kept: dict[tuple[bool, int], dict[str, Tensors]] = {}

    def free(self) -> None:
        """Let go of all tensors: others may still hold this object while the next block is observed."""
        self.calls, self.noisy, self._outputs, self._kept = [], [], None, {}

    @property
    def outputs(self) -> Tensors:
        """The float block's output for each of `calls`, [B, S, C]."""
        if self._outputs is None:
            self._outputs = run_block(self.block, self.calls)
        return self._outputs

    def layer_inputs(self, name: str, noisy: bool = False, rows: int = 0) -> Tensors:
        """Input of a layer in each call as [rows, K]: all rows, or at most `rows`, evenly spread.

        With `rows` the inputs of all layers are kept after the first request; with all rows only those of `name` are
        made, anew each time.
        """
        if not rows:
            return self._record([name], noisy, 0)[name]
        if (noisy, rows) not in self._kept:
            self._kept[noisy, rows] = self._record(list(self.names), noisy, rows)
        return self._kept[noisy, rows][name]

    @torch.no_grad()
    def _record(self, names: Sequence[str], noisy: bool, rows: int) -> dict[str, Tensors]:
        recorded: dict[str, Tensors] = {name: [] for name in names}
        handles = []
        for name in names:
            part = self.block.get_submodule(self.names[name])
            handles.append(part.register_forward_pre_hook(_keeper(recorded[name], rows)))
        try:
            for call in self.noisy if noisy else self.calls:
                call.run(self.block)
        finally:
            for handle in handles:
                handle.remove()
        return recorded


def _keeper(into: Tensors, rows: int) -> Callable[[Any, tuple[Any, ...]], None]:
    """Hook that keeps a linear's input."""

    def keep(_: Any, arguments: tuple[Any, ...]) -> None:
        x = arguments[0].detach().flatten(0, -2)
        if rows and len(x) > rows:
            x = x[torch.linspace(0, len(x) - 1, rows).round().long()]
        into.append(x.float().clone())

    return keep


def run_block(block: nn.Module, calls: Sequence[BlockCall]) -> Tensors:
    """Output of the block for each call. Calls that miss a tensor (a block of one layer) are refused by the block."""
    return list(_outputs(block, calls))


@torch.no_grad()
def _outputs(block: nn.Module, calls: Iterable[BlockCall]) -> Iterator[torch.Tensor]:
    """The outputs one by one; each call is read when its output is asked for."""
    for call in calls:
        yield _first(call.run(block))


def _replace_hidden(calls: list[BlockCall], outputs: Iterator[torch.Tensor]) -> None:
    """Put the next block's input in place of each call's, one by one: old and new need not be in memory together."""
    for i, hidden in enumerate(outputs):
        calls[i] = calls[i].with_hidden(hidden)


def _first(output: Any) -> torch.Tensor:
    """The hidden states of a block's output, which may be a tuple."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


class _Captured(Exception):  # not an error: the call that was waited for has come
    """Ends a model run early."""


class BlockRunner:
    """Runs the calibration calls from block to block, for the float model and for the quantized one.

    Where a block's output is simply the next one's input the calls go on from there; else (long skips, several
    streams) the whole model runs again up to the block.
    """

    def __init__(self, model: LoadedModel, data: CalibrationData, blocks: Sequence[str]) -> None:
        from export.models.load import denoiser

        self.model, self.data, self.blocks = model, data, list(blocks)
        self.module = denoiser(model)
        self.timesteps = [call.timestep for call in data.calls]
        self.done: dict[str, nn.Module] = {}  # finished layers; stays empty for a chain, which needs none of them
        self._calls: list[BlockCall] | None = None
        self._noisy: list[BlockCall] | None = None
        self.is_chain = looks_like_chain(self.module, self.blocks, data.calls[0].inputs)

    def observe(self, block: str, plans: Sequence[LayerPlan]) -> Observed:
        """The block's calls. Blocks must be observed in order, each followed by `advance`."""
        part = float_copy(self.module.transformer.get_submodule(block))
        names = {plan.name: plan.name.removeprefix(block).lstrip(".") for plan in plans}
        if self._calls is None or self._noisy is None:
            self._calls = self._capture(self.module, block)
            self._noisy = self._capture(self._quantized(), block) if self.done else list(self._calls)
        return Observed(part, names, self._calls, self._noisy, self.timesteps)

    def advance(self, observed: Observed, layers: Sequence[QuantizedLinear]) -> None:
        """Go on behind a block that is finished, whose `observed` is then empty."""
        replacements = {layer.name: WeightOnlyLinear(layer) for layer in layers}
        if self.is_chain:
            self._calls, self._noisy = observed.calls, observed.noisy
            _replace_hidden(self._calls, iter(observed.outputs))
            quantized = copy.deepcopy(observed.block)
            for name, linear in replacements.items():
                quantized.set_submodule(observed.names[name], linear)
            _replace_hidden(self._noisy, _outputs(quantized, observed.noisy))
        else:
            self.done |= replacements
            self._calls = self._noisy = None
        observed.free()

    def _quantized(self) -> nn.Module:
        from export.models.load import denoiser

        module: nn.Module = denoiser(self.model, self.done)
        return module

    @torch.no_grad()
    def _capture(self, module: Any, block: str) -> list[BlockCall]:
        """The block's arguments in every calibration call."""
        calls: list[BlockCall] = []

        def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append(BlockCall(args, dict(kwargs)))
            raise _Captured

        with _hook(module.transformer.get_submodule(block), keep):
            for call in self.data.calls:
                run_captured(module, call.inputs)
        return calls


@torch.no_grad()
def looks_like_chain(module: Any, blocks: Sequence[str], inputs: Arrays) -> bool:
    """Does every block get its predecessor's output and otherwise what the first one gets?"""
    seen: list[tuple[BlockCall, torch.Tensor]] = []
    handles = [
        module.transformer.get_submodule(block).register_forward_hook(
            lambda _, args, kwargs, output: seen.append((BlockCall(args, dict(kwargs)), _first(output))),
            with_kwargs=True,
        )
        for block in blocks
    ]
    try:
        shared = shared_names(module.family.inputs(module.transformer.config))
        module(**_tensors(take_samples(inputs, slice(1), shared)))
    finally:
        for handle in handles:
            handle.remove()
    first = seen[0][0]
    follows = all(
        call.hidden is output and _same(call.with_hidden(first.hidden), first)
        for (_, output), (call, _) in pairwise(seen)
    )
    return len(seen) == len(blocks) > 1 and follows


@torch.no_grad()
def first_calls(module: Any, blocks: Sequence[str], inputs: Arrays) -> dict[str, BlockCall]:
    """Block -> its call in one run of the denoiser."""
    calls: dict[str, BlockCall] = {}
    with ExitStack() as stack:
        for name in blocks:
            keep = partial(_keep_call, calls, name)
            stack.enter_context(_hook(module.transformer.get_submodule(name), keep))
        module(**_tensors(inputs))
    return calls


def _keep_call(into: dict[str, BlockCall], name: str, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    into[name] = BlockCall(args, dict(kwargs))


def run_captured(module: Any, inputs: Arrays) -> None:
    """Run the model until a hook has what it wants."""
    try:
        module(**_tensors(inputs))
    except _Captured:
        return


def _tensors(inputs: Arrays) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in inputs.items()}


@contextmanager
def _hook(part: nn.Module, keep: Callable[..., None]) -> Iterator[None]:
    handle = part.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _same(one: BlockCall, other: BlockCall) -> bool:
    """The same objects in the same places, tensors by their numbers."""
    left, right = (*one.args, *one.kwargs.values()), (*other.args, *other.kwargs.values())
    return one.kwargs.keys() == other.kwargs.keys() and len(left) == len(right) and all(map(_equal, left, right))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one is other or (one.shape == other.shape and torch.equal(one, other))
    return one is other or bool(one == other)


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
