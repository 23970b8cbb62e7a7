"""How tensors go through a model's repeated blocks, learned by running it, never from names.

The order in which blocks run; what of a block's call is its predecessor's output or what that one got; and which
tensors of a block's output are streams: made by its quantized layers and read by what comes after, each with its share
of the sensitivity of the model's output, which is how much an error in it counts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_flatten_with_path, tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from export.errors import ModelError
from export.models.torch_modules import Denoiser
from pipeline.backends.base import Arrays

# Of an output's tensors -> what each is worth.
Shares = dict[int, float]
KEEP_IT = "keep its layers (--set 'keep=[\"PATTERN\"]') or use a method that looks at weights alone (--set method=rtn)"


@dataclass(frozen=True)
class BlockCall:
    """Arguments of one call of a block, as the model gives them."""

    args: tuple[object, ...]
    kwargs: Mapping[str, object]

    def values(self) -> list[object]:
        """All arguments in order, what is in tuples, lists and dictionaries one by one."""
        return tree_leaves((self.args, dict(self.kwargs)))

    def with_values(self, values: Sequence[object]) -> BlockCall:
        """The same call with other values in the places of `values()`."""
        return _unflatten(values, tree_flatten((self.args, dict(self.kwargs)))[1])

    def run(self, block: nn.Module) -> list[object]:
        """What the block gives, one by one as `values` are: tensors, and None where it gives nothing."""
        return tree_leaves(block(*self.args, **self.kwargs))

    def layer_input(self) -> Tensor:
        """Of a call of a linear: its input [..., K]."""
        first = self.values()[0]
        assert isinstance(first, Tensor)
        return first


def _unflatten(values: Sequence[object], spec: TreeSpec) -> BlockCall:
    args, kwargs = spec.unflatten(values)
    return BlockCall(args, kwargs)


@contextmanager
def seeing(root: nn.Module, paths: Mapping[str, str], see: Callable[[str, BlockCall], None]) -> Iterator[None]:
    """While it lasts, `see(name, call)` gets every call of the modules at `paths` (name -> path) before it computes."""
    with ExitStack() as stack:
        for name, path in paths.items():

            def hook(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], name: str = name) -> None:
                see(name, BlockCall(args, dict(kwargs)))

            stack.callback(root.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def _seeing_outputs(root: nn.Module, paths: Sequence[str], see: Callable[[str, list[object]], None]) -> Iterator[None]:
    """While it lasts, `see(path, values)` gets what the modules at `paths` give, as `BlockCall.run` has it."""
    with ExitStack() as stack:
        for path in paths:

            def hook(_: nn.Module, __: object, output: object, path: str = path) -> None:
                see(path, tree_leaves(output))

            stack.callback(root.get_submodule(path).register_forward_hook(hook).remove)
        yield


@dataclass(frozen=True)
class Stream:
    """A tensor that goes on from a block: its place among what the block gives, and its share of the sensitivity of the
    model's output to all of the block's streams; 0: it is handed on, but its error is none or read by nobody."""

    place: int
    share: float


@dataclass(frozen=True)
class Link:
    """Where a block's arguments come from, which are all its predecessor's: each value of the call is (True, place of a
    tensor that the predecessor gives) or (False, place among the values of the predecessor's call)."""

    sources: tuple[tuple[bool, int], ...]
    spec: TreeSpec

    @property
    def taken(self) -> frozenset[int]:
        """Places of what it takes from the predecessor's output."""
        return frozenset(place for given, place in self.sources if given)

    @property
    def carried(self) -> frozenset[int]:
        """Places of what it takes from the predecessor's call."""
        return frozenset(place for given, place in self.sources if not given)

    def follow(self, call: BlockCall, outputs: Mapping[int, Tensor]) -> BlockCall:
        """The block's call behind its predecessor's with the tensors `outputs` (place -> tensor)."""
        values = call.values()
        return _unflatten([outputs[i] if given else values[i] for given, i in self.sources], self.spec)


@dataclass(frozen=True)
class BlockFlow:
    """What goes into a block and out of it in a run of the model on `samples` samples, tensors without their numbers.

    given: place -> tensor of a block's output. streams: of these the ones that its quantized layers have a part in.
    link: None where the block needs more than its predecessor got and gave, as the first one does.
    """

    samples: int
    call: BlockCall
    given: Mapping[int, Tensor]
    streams: tuple[int, ...]
    link: Link | None

    def rows_per_sample(self, call: BlockCall, samples: int) -> tuple[int, ...] | None:
        """Rows of each sample in every value of a call on `samples` samples; 0: one value serves all. None: the call's
        samples cannot be told apart. `samples` is not the flow's own number, at which both would look alike."""
        assert samples != self.samples
        values, own = call.values(), self.call.values()
        if len(values) != len(own):
            return None
        rows = (_rows(value, samples, known, self.samples) for value, known in zip(values, own, strict=True))
        told = [count for count in rows if count is not None]
        return tuple(told) if len(told) == len(values) else None


def is_chain(flows: Mapping[str, BlockFlow]) -> bool:
    """Whether every block but the first follows from its predecessor, in a run's order."""
    return all(flow.link is not None for flow in list(flows.values())[1:])


def _rows(value: object, samples: int, known: object, known_samples: int) -> int | None:
    """Rows of a sample in `value`, by what it was with another number of samples."""
    if isinstance(value, Tensor) and isinstance(known, Tensor) and value.ndim == known.ndim:
        if value.ndim and len(known) % known_samples == 0 and len(value) == len(known) // known_samples * samples:
            return len(value) // samples
        return 0 if value.shape[:1] == known.shape[:1] else None
    return 0 if not isinstance(value, Tensor) and value == known else None


def same_values(one: object, other: object) -> bool:
    """The same object, or tensors of the same numbers."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.shape == other.shape and torch.equal(one, other))
    return one is other or bool(one == other)


# --- one run: order, links, streams ----------------------------------------------------------------------------------


@torch.no_grad()
def learn_flows(module: Denoiser, blocks: Sequence[str], inputs: Arrays, samples: int) -> dict[str, BlockFlow]:
    """Block -> its flow, in the order in which the model runs them, from one run on these inputs of `samples` samples.

    Raises ModelError naming a block that the model does not call, or in whose output its layers have no part.
    """
    run = _Run(module, samples)
    paths = {name: name for name in blocks}
    with seeing(module.transformer, paths, run.enter), _seeing_outputs(module.transformer, blocks, run.leave):
        module(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    if missing := [name for name in blocks if name not in run.flows]:
        raise ModelError(f"{missing[0]}: the model does not call it, so there is nothing to calibrate on; {KEEP_IT}")
    return run.flows


Versioned = list[tuple[object, int]]  # values, each with how often it had been written into if it is a tensor


class _Run:
    """Notes flows while the model runs; of tensors with numbers it holds one block's."""

    def __init__(self, module: Denoiser, samples: int) -> None:
        self.module, self.samples = module, samples
        self.flows: dict[str, BlockFlow] = {}
        self._call: BlockCall | None = None  # of the latest block
        self._got: Versioned = []
        self._gave: Versioned = []
        self._link: Link | None = None  # from the block before it

    def enter(self, _: str, call: BlockCall) -> None:
        self._link = None if self._call is None else _link(self._call, self._got, self._gave, call)
        self._call, self._got, self._gave = call, _versioned(call.values()), []

    def leave(self, block: str, outputs: list[object]) -> None:
        assert self._call is not None
        self._gave = _versioned(outputs)
        if block in self.flows:  # it has run before: what it was first called with is what it is calibrated on
            return
        given = {place: value for place, value in enumerate(outputs) if isinstance(value, Tensor)}
        streams = [place for place, value in given.items() if value.is_floating_point()]
        if len(streams) > 1:
            streams = _made_by_layers(self.module, block, self._call)
        if not streams:
            raise ModelError(f"{block}: its quantized layers have no part in what it gives; {KEEP_IT}")
        call, known = tree_map_only(Tensor, _without_numbers, ((self._call.args, dict(self._call.kwargs)), given))
        self.flows[block] = BlockFlow(self.samples, BlockCall(*call), known, tuple(streams), self._link)


def _versioned(values: Sequence[object]) -> Versioned:
    return [(value, value._version if isinstance(value, Tensor) else 0) for value in values]


def _without_numbers(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def _link(before: BlockCall, got: Versioned, gave: Versioned, after: BlockCall) -> Link | None:
    """How a call follows from the one `before`; None if it has a value of its own."""
    pairs, spec = tree_flatten_with_path((after.args, dict(after.kwargs)))
    places = {path: i for i, (path, _) in enumerate(tree_flatten_with_path((before.args, dict(before.kwargs)))[0])}
    sources = list[tuple[bool, int]]()
    for path, value in pairs:
        # What a block hands through is taken from its call; it is both there and in its output.
        if (place := _place_of(value, got)) is not None:
            sources.append((False, place))
        elif (place := _place_of(value, gave)) is not None:
            sources.append((True, place))
        elif path in places and _made_again(value, got[places[path]][0]):
            sources.append((False, places[path]))
        else:
            return None
    return Link(tuple(sources), spec)


def _made_again(value: object, earlier: object) -> bool:
    """No tensor and equal, or another tensor of the same numbers: the same one has been written into by now."""
    return same_values(value, earlier) and not (isinstance(value, Tensor) and value is earlier)


def _place_of(value: object, among: Versioned) -> int | None:
    """Where this very tensor is, if nobody has written into it since."""
    if not isinstance(value, Tensor):
        return None
    now = value._version
    return next((i for i, (other, version) in enumerate(among) if other is value and version == now), None)


def _made_by_layers(module: Denoiser, block: str, call: BlockCall) -> list[int]:
    """Places of the tensors of a block's output that depend on a weight to quantize; others have no error to match."""
    part = module.transformer.get_submodule(block)
    linears = [(path, one) for path, one in part.named_modules() if isinstance(one, nn.Linear)]
    weights = [one.weight for path, one in linears if module.family.kind_of(f"{block}.{path}" if path else block)]
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():  # by `forward`, which no hook watches
            outputs = tree_leaves(part.forward(*call.args, **call.kwargs))
    finally:
        for weight, needed in zip(weights, before, strict=True):
            weight.requires_grad_(needed)
    return [place for place, value in enumerate(outputs) if isinstance(value, Tensor) and value.requires_grad]


# --- what each stream is worth ---------------------------------------------------------------------------------------


def stream_shares(module: Denoiser, flows: Mapping[str, BlockFlow], samples: Sequence[Arrays]) -> dict[str, Shares]:
    """Block -> its streams (place in its output) with their shares of the sensitivity of the model's output; those that
    nothing reads have none. The shares of a block are 1 together. samples: inputs of single samples to measure it on.

    Independent errors of variance e_s in the elements of stream s give the output a squared error of the sum of
    e_s * |J_s|^2 on average, J_s the output's Jacobian by the stream: the share is that of |J_s|^2. It is the weight of
    BRECQ (arXiv 2102.05426), the diagonal of the Fisher information, averaged over a stream. |J_s|^2 is the mean of
    |J_s^T v|^2 over random signs v (Hutchinson's estimator): a backward pass gives it for all streams of all blocks. A
    block of one stream needs none.
    Raises ModelError for a block none of whose streams reaches the output.
    """
    several = {name: flow.streams for name, flow in flows.items() if len(flow.streams) > 1}
    shares = {name: {flow.streams[0]: 1.0} for name, flow in flows.items() if name not in several}
    sums: dict[str, Shares] = {name: dict.fromkeys(places, 0.0) for name, places in several.items()}
    for number, inputs in enumerate(samples if several else ()):
        _add_squared_gradients(module, list(flows), sums, inputs, torch.Generator().manual_seed(number))
    for name, squares in sums.items():
        total = sum(squares.values())
        if not (total > 0 and math.isfinite(total)):
            raise ModelError(
                f"{name}: the squared gradient of the model's output by what it gives is {total}, and must be above 0 "
                f"and finite for its streams to be weighed; {KEEP_IT}"
            )
        shares[name] = {place: square / total for place, square in squares.items() if square}
    return shares


@torch.enable_grad()
def _add_squared_gradients(
    module: Denoiser, blocks: Sequence[str], sums: Mapping[str, Shares], inputs: Arrays, generator: torch.Generator
) -> None:
    """Add to `sums` the squared gradients of the output times random signs. All `blocks` are computed again when their
    gradients are, so that of all but one only the arguments are held."""
    starts: list[Tensor] = []
    arrived: dict[tuple[str, int], float] = defaultdict(float)
    root = module.transformer

    def start(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[object, object] | None:
        """The first block's arguments get gradients; others' come from it."""
        if any(isinstance(value, Tensor) and value.requires_grad for value in tree_leaves((args, kwargs))):
            return None

        def leaf(value: Tensor) -> Tensor:
            if not value.is_floating_point():
                return value
            starts.append(value.detach().clone().requires_grad_())
            return starts[-1].clone()  # some models write into their arguments, which no leaf allows

        replaced: tuple[object, object] = tree_map_only(Tensor, leaf, (args, kwargs))
        return replaced

    def watch(name: str, outputs: list[object]) -> None:
        for place, value in enumerate(outputs):
            if place in sums[name] and isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(partial(note, (name, place)))

    def note(key: tuple[str, int], gradient: Tensor) -> None:
        arrived[key] += float(gradient.double().square().sum())

    with ExitStack() as stack:
        for name in blocks:
            part = root.get_submodule(name)
            stack.enter_context(_computed_again(part))
            stack.callback(part.register_forward_pre_hook(start, with_kwargs=True).remove)
        stack.enter_context(_seeing_outputs(root, list(sums), watch))
        result = module(**{name: torch.from_numpy(value) for name, value in inputs.items()})
        outputs = result if isinstance(result, tuple) else (result,)
        signs = [torch.randint(0, 2, one.shape, generator=generator).to(one.dtype) * 2 - 1 for one in outputs]
        total = torch.stack([(one * sign).sum() for one, sign in zip(outputs, signs, strict=True)]).sum()
        if total.requires_grad:
            torch.autograd.grad(total, starts, allow_unused=True)
    for (name, place), square in arrived.items():
        sums[name][place] += square


@contextmanager
def _computed_again(part: nn.Module) -> Iterator[None]:
    """While it lasts, gradients through the module keep its arguments alone."""
    own = part.__dict__.get("forward")
    part.forward = partial(checkpoint, part.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        if own is None:
            del part.forward
        else:
            part.forward = own
