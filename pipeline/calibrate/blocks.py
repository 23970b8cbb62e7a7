"""Repeated blocks under calibration: each one's inputs and outputs in the float model, and its inputs as the network
whose earlier blocks have quantized weights gives them. One block's tensors are in memory at a time.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
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
from pipeline.generate.sampling import take_samples

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


def paths_inside(block: str, plans: Sequence[LayerPlan]) -> dict[str, str]:
    """Layer name -> path inside the block, "" where the layer is the block."""
    return {plan.name: plan.name.removeprefix(block).lstrip(".") for plan in plans}


@dataclass(frozen=True)
class BlockCall:
    """Arguments of one call of a block, as the model gives them."""

    args: tuple[object, ...]
    kwargs: Mapping[str, object]

    @property
    def hidden(self) -> torch.Tensor:
        """The tensor that goes from block to block, [B, S, C]; of a linear its input."""
        hidden = self.args[0] if self.args else self.kwargs["hidden_states"]
        assert isinstance(hidden, torch.Tensor)
        return hidden

    def with_hidden(self, hidden: torch.Tensor) -> BlockCall:
        if self.args:
            return BlockCall((hidden, *self.args[1:]), self.kwargs)
        return BlockCall((), {**self.kwargs, "hidden_states": hidden})

    def run(self, block: nn.Module) -> torch.Tensor:
        """The hidden states that the block gives."""
        return hidden_states(block(*self.args, **self.kwargs))


def hidden_states(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """A block's output, or the first of several."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def seeing(root: nn.Module, paths: Mapping[str, str], see: Callable[[str, BlockCall], None]) -> Iterator[None]:
    """While it lasts, `see(name, call)` gets every call of the modules at `paths` (name -> path) before it computes."""
    with ExitStack() as stack:
        for name, path in paths.items():

            def hook(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], name: str = name) -> None:
                see(name, BlockCall(args, dict(kwargs)))

            stack.callback(root.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


@dataclass(eq=False, repr=False)
class Observed:
    """What a method sees of one block. Tensors are float32 and must not be changed.

    block: the float block (copy it to change it); names: layer name -> path inside the block; calls: its calls in the
    float model, noisy: in the network whose earlier blocks have quantized weights (FP4DiT's asymmetric
    reconstruction); timesteps: model input of each call.
    """

    block: nn.Module
    names: dict[str, str]
    calls: list[BlockCall]
    noisy: list[BlockCall]
    timesteps: list[float]
    _outputs: Tensors | None = field(default=None, init=False)
    _kept: dict[tuple[bool, int], dict[str, Tensors]] = field(default_factory=dict, init=False)

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
            by_layer[name].append(take(call.hidden.detach()))

        with seeing(self.block, {name: self.names[name] for name in by_layer}, see):
            for call in self.noisy if noisy else self.calls:
                call.run(self.block)
        return by_layer


def run_block(block: nn.Module, calls: Sequence[BlockCall]) -> Tensors:
    """Output of the block for each call. Calls that miss a tensor (a block of one layer) are refused by the block."""
    return list(_outputs(block, calls))


@torch.no_grad()
def _outputs(block: nn.Module, calls: Iterable[BlockCall]) -> Iterator[torch.Tensor]:
    """The outputs one by one; each call is read when its output is asked for."""
    for call in calls:
        yield call.run(block)


def _replace_hidden(calls: list[BlockCall], outputs: Iterator[torch.Tensor]) -> None:
    """Put the next block's input in place of each call's, one by one: old and new need not be in memory together."""
    for i, hidden in enumerate(outputs):
        calls[i] = calls[i].with_hidden(hidden)


class _Captured(Exception):  # not an error: the call that was waited for has come
    """Ends a model run early."""


class BlockRunner:
    """Runs the calibration calls from block to block, for the float model and for the quantized one.

    Where a block's output is simply the next one's input the calls go on from there; else (long skips, several
    streams) the whole model runs again up to the block.
    """

    def __init__(self, model: LoadedModel, data: CalibrationData, blocks: Sequence[str]) -> None:
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
        if self._calls is None or self._noisy is None:
            self._calls = self._capture(self.module, block)
            self._noisy = self._capture(denoiser(self.model, self.done), block) if self.done else list(self._calls)
        return Observed(part, paths_inside(block, plans), self._calls, self._noisy, self.timesteps)

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


@torch.no_grad()
def looks_like_chain(module: Denoiser, blocks: Sequence[str], inputs: Arrays) -> bool:
    """Does every block get its predecessor's output and otherwise what the first one gets?"""
    shared = shared_names(module.family.inputs(stated_config(module.transformer)))
    calls: list[BlockCall] = []
    outputs: list[torch.Tensor] = []
    with ExitStack() as stack:
        paths = {name: name for name in blocks}
        stack.enter_context(seeing(module.transformer, paths, lambda _, call: calls.append(call)))
        for part in map(module.transformer.get_submodule, blocks):
            hook = part.register_forward_hook(lambda _, __, output: outputs.append(hidden_states(output)))
            stack.callback(hook.remove)
        module(**tensors(take_samples(inputs, slice(1), shared)))
    follows = all(
        call.hidden is output and _same(call.with_hidden(calls[0].hidden), calls[0])
        for output, call in zip(outputs, calls[1:], strict=False)
    )
    return len(calls) == len(blocks) > 1 and follows


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


def _same(one: BlockCall, other: BlockCall) -> bool:
    """The same objects in the same places, tensors by their numbers."""
    left, right = (*one.args, *one.kwargs.values()), (*other.args, *other.kwargs.values())
    return one.kwargs.keys() == other.kwargs.keys() and len(left) == len(right) and all(map(_equal, left, right))


def _equal(one: object, other: object) -> bool:
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
