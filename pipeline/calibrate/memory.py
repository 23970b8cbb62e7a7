"""How much memory a calibration takes, told before it starts: one sample runs through the model and is measured.

Bytes of everything that grows with the model or the samples. What does not (libraries, a second of Python objects) is
left out, and so are the holes that the C library leaves between arrays below 32 MiB. Factors of copies are counted in
the code that makes them and checked against measured peaks by a test.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from export.errors import ModelError
from export.models.load import LoadedModel, denoiser
from pipeline.backends.base import Arrays
from pipeline.calibrate.blocks import first_calls, float_copy, paths_inside
from pipeline.calibrate.plan import LayerPlan
from pipeline.calibrate.streams import KEEP_IT, BlockCall, BlockFlow, is_chain, learn_flows, seeing

F32, F64 = 4, 8
# Arrays as large as the weights while rounding is learned: the weight, low, gap, inverse, v, its gradient, Adam's two
# moments; one iteration's sigmoid, share, soft weight and regulariser (two), and gradients of the last three.
ROUNDING_ARRAYS = 16
# A batch's activations while learning: those that gradients keep, and as much again for gradients and temporaries.
LEARNING_ACTIVATIONS = 2
# Float64 arrays of a layer's inputs while its static range is searched: parts, joined, sorted, sums, squares (two).
RANGE_ARRAYS = 6
# Float64 arrays [K, K] of GPTQ: H, permuted, damped, its inverse, the factor, a solver's copy; arrays [K, N]: 3.
HESSIAN_ARRAYS, GPTQ_WEIGHTS = 6, 3
# Float64 arrays [N, K] while a balance is searched: the balanced weight and its copy, both sides of its singular
# values, their product, the rest, and the best and the tried layers of all that read one tensor.
SEARCHED_WEIGHTS = 8


@dataclass(frozen=True)
class LayerSize:
    """A linear [n, k] that gets `rows` input rows from one sample."""

    rows: int
    n: int
    k: int


@dataclass(frozen=True)
class BlockSize:
    """A block: bytes of one sample's arguments that its predecessor makes, of the others, of what it gives, and of the
    activations that gradients keep; weights."""

    hidden: int
    others: int
    given: int
    kept: int
    weights: int
    layers: tuple[LayerSize, ...]


@dataclass(frozen=True)
class Sizes:
    """A calibration: samples in all, calls that they come in, samples of the largest call, bytes of a sample's inputs.

    is_chain: see BlockRunner. weighs: some block gives several streams, so that their shares are measured.
    """

    samples: int
    calls: int
    per_call: int
    inputs: int
    blocks: tuple[BlockSize, ...]
    is_chain: bool
    weighs: bool = False

    @property
    def layers(self) -> list[LayerSize]:
        return [layer for block in self.blocks for layer in block.layers]

    @property
    def linear_bytes(self) -> int:
        """All linears in float32."""
        return F32 * sum(layer.n * layer.k for layer in self.layers)

    def observing(self, block: BlockSize) -> int:
        """What observing holds: inputs in the float and in the quantized network and outputs of all samples, a call's
        activations, the block three times (float, quantized, changed); where it is no chain, what is done so far."""
        calls = self.samples * (2 * block.hidden + block.given + (1 if self.is_chain else 2) * block.others)
        return calls + self.per_call * block.kept + 3 * F32 * block.weights + (not self.is_chain) * self.linear_bytes

    @property
    def weighing(self) -> int:
        """What measuring the shares of streams holds, on one sample: what all blocks are called with, and of one block
        the activations with their gradients and the weights in float32."""
        if not self.weighs:
            return 0
        arguments = sum(block.hidden + block.given for block in self.blocks) + max(one.others for one in self.blocks)
        return arguments + max(LEARNING_ACTIVATIONS * block.kept + F32 * block.weights for block in self.blocks)

    def rows(self, layer: LayerSize, rows: int) -> int:
        """Elements of a layer's inputs with at most `rows` rows of each call; 0: all."""
        all_rows = self.samples * layer.rows
        return layer.k * (min(all_rows, self.calls * rows) if rows else all_rows)

    def kept_rows(self, block: BlockSize, rows: int) -> int:
        """Bytes of the inputs of all layers of a block, and of a range search in the largest."""
        sizes = [self.rows(layer, rows) for layer in block.layers]
        return F32 * sum(sizes) + RANGE_ARRAYS * F64 * max(sizes)

    def total(self, units: Sequence[int], apart: int) -> int:
        """Bytes in all. units: what the method holds for each block; apart: what it holds before or after them."""
        held = [self.observing(block) + unit for block, unit in zip(self.blocks, units, strict=True)]
        return self.samples * self.inputs + self.linear_bytes // F32 + max(*held, apart, self.weighing)


def rounding_bytes(block: BlockSize, batch: int) -> int:
    """What learning the rounding of all linears of a block holds, in batches of so many samples."""
    weights = F32 * sum(layer.n * layer.k for layer in block.layers)
    return ROUNDING_ARRAYS * weights + LEARNING_ACTIVATIONS * batch * block.kept


def layer_rounding_bytes(sizes: Sizes, layer: LayerSize) -> int:
    """What learning one layer by itself holds: its inputs in both networks, four sums of them [K, K], the learning."""
    return F32 * (2 * sizes.rows(layer, 0) + ROUNDING_ARRAYS * layer.n * layer.k) + 4 * F64 * layer.k**2


def tuning_bytes(sizes: Sizes, batch: int) -> int:
    """What tuning branches end to end holds: linears (float, quantized, the error of one), predictions, activations of
    a batch in all blocks with the rounding of each linear's input besides."""
    rounded = F32 * sum(layer.rows * layer.k for layer in sizes.layers)
    activations = sum(block.kept for block in sizes.blocks) + rounded
    return 2 * sizes.linear_bytes + sizes.samples * sizes.inputs + LEARNING_ACTIVATIONS * batch * activations


def gptq_bytes(block: BlockSize) -> int:
    """What GPTQ holds at the layer where it is most."""
    return F64 * max(HESSIAN_ARRAYS * one.k**2 + GPTQ_WEIGHTS * one.n * one.k for one in block.layers)


def searched_bytes(block: BlockSize) -> int:
    """What a search of balances holds beside its rows, at the layer where it is most."""
    return F64 * SEARCHED_WEIGHTS * max(one.n * one.k for one in block.layers)


def measure(
    model: LoadedModel, units: Mapping[str, Sequence[LayerPlan]], one: Arrays, samples: int, calls: int, per_call: int
) -> Sizes:
    """The sizes of a calibration whose units are these blocks; `one` are the model inputs of one sample."""
    module = denoiser(model)
    flows = learn_flows(module, list(units), one, 1)
    calls_of = first_calls(module, list(units), one)
    sizes = []
    for (name, flow), after in zip(flows.items(), (*list(flows.values())[1:], None), strict=True):
        part = module.transformer.get_submodule(name)
        sizes.append(_block_size(part, calls_of[name], name, units[name], flow, after))
    inputs = sum(value.nbytes for value in one.values())
    weighs = any(len(flow.streams) > 1 for flow in flows.values())
    return Sizes(samples, calls, per_call, inputs, tuple(sizes), is_chain(flows), weighs)


def _block_size(
    part: nn.Module, call: BlockCall, name: str, plans: Sequence[LayerPlan], flow: BlockFlow, after: BlockFlow | None
) -> BlockSize:
    """Sizes of a block in a call of one sample; `after`: the flow of the block behind it.

    Raises ModelError for a layer that the block does not run.
    """
    block, rows = float_copy(part).requires_grad_(True), dict[str, int]()

    def see(layer: str, one: BlockCall) -> None:
        x = one.layer_input()
        rows[layer] = x.numel() // x.shape[-1]

    with torch.enable_grad(), kept_for_gradients() as kept, seeing(block, paths_inside(name, plans), see):
        call.run(block)
    if missing := [plan.name for plan in plans if plan.name not in rows]:
        raise ModelError(f"{missing[0]}: its block does not call it, so there is nothing to calibrate on; {KEEP_IT}")
    hidden, others = _argument_bytes(flow, after)
    layers = (LayerSize(rows[p.name], p.linear.module.out_features, p.linear.module.in_features) for p in plans)
    return BlockSize(
        hidden,
        others,
        sum(tensor.nbytes for tensor in flow.given.values()),
        kept_bytes(kept, block),
        sum(value.numel() for value in block.parameters()),
        tuple(layers),
    )


def _argument_bytes(flow: BlockFlow, after: BlockFlow | None) -> tuple[int, int]:
    """Bytes of what a block is called with: what each block gets anew, and what is handed from block to block."""
    sizes = [value.nbytes if isinstance(value, Tensor) else 0 for value in flow.call.values()]
    if flow.link is not None:
        handed = [not given for given, _ in flow.link.sources]
    else:  # the first: what is handed on from here
        link = None if after is None else after.link
        handed = [link is not None and place in link.carried for place in range(len(sizes))]
    others = sum(size for size, is_handed in zip(sizes, handed, strict=True) if is_handed)
    return sum(sizes) - others, others


@contextmanager
def kept_for_gradients() -> Iterator[dict[int, int]]:
    """Address -> bytes of every storage that gradients keep while it lasts (they live as long as the graph)."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def kept_bytes(kept: Mapping[int, int], module: nn.Module) -> int:
    """Bytes of what gradients keep beside the module's own parameters and buffers."""
    own = {value.untyped_storage().data_ptr() for value in (*module.parameters(), *module.buffers())}
    return sum(size for place, size in kept.items() if place not in own)
