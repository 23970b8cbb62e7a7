"""Blocks of models with several streams and of models that are no chain: what is learned of them by running them, what
calibration sees of them, and that methods match what counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from export.checkpoint import QuantizedLinear
from export.errors import ModelError
from export.models.families import Family, Input
from export.models.load import LoadedModel, denoiser
from export.models.torch_modules import Denoiser
from pipeline.calibrate import memory
from pipeline.calibrate.blocks import (
    BlockRunner,
    Observed,
    WeightOnlyLinear,
    group_by_block,
    run_block,
    tensors,
    with_parts,
)
from pipeline.calibrate.data import CalibrationData
from pipeline.calibrate.learn.reconstruct import Batches, generator, join, output_loss
from pipeline.calibrate.method import Unit
from pipeline.calibrate.methods import awq, fp4dit, qdiffusion, qdit
from pipeline.calibrate.methods.rtn import quantize_linear
from pipeline.calibrate.plan import LayerPlan
from pipeline.calibrate.streams import Stream, stream_shares
from pipeline.generate.sampling import take_samples
from pipeline.methods import METHODS
from tests.support.stream_models import MODELS, calls_of, context, model_of, plans_of

pytestmark = pytest.mark.torch

T, S, J = "transformer_blocks", "single_transformer_blocks", "joint_transformer_blocks"
# name -> its blocks in the order in which they run: path, places of its streams that are read, follows its predecessor?
FLOWS: dict[str, list[tuple[str, set[int], bool]]] = {
    "sd3": [(f"{T}.0", {0, 1}, False), (f"{T}.1", {0, 1}, True), (f"{T}.2", {1}, True)],
    "sd35": [(f"{T}.0", {0, 1}, False), (f"{T}.1", {0, 1}, True), (f"{T}.2", {1}, True)],
    "flux": [(f"{T}.0", {0, 1}, False), (f"{T}.1", {0, 1}, True), (f"{S}.0", {0, 1}, True), (f"{S}.1", {1}, True)],
    "aura": [(f"{J}.0", {0, 1}, False), (f"{J}.1", {0, 1}, True), (f"{S}.0", {0}, False), (f"{S}.1", {0}, True)],
    "sana": [(f"{T}.0", {0}, False), (f"{T}.1", {0}, True)],
    "wan": [("blocks.0", {0}, False), ("blocks.1", {0}, True)],
    "latte": [
        (f"{T}.0", {0}, False), (f"temporal_{T}.0", {0}, False), (f"{T}.1", {0}, False), (f"temporal_{T}.1", {0}, False)
    ],
    "hunyuan": [("blocks.0", {0}, False), ("blocks.1", {0}, True), ("blocks.2", {0}, True), ("blocks.3", {0}, False)],
    "pixart": [(f"{T}.0", {0}, False), (f"{T}.1", {0}, True)],
}  # fmt: skip


def runner_of(name: str) -> tuple[LoadedModel, CalibrationData, dict[str, Any], BlockRunner]:
    model = model_of(name)
    data, blocks = calls_of(model), group_by_block(plans_of(model))
    return model, data, blocks, BlockRunner(model, data, list(blocks))


@pytest.mark.parametrize("name", MODELS)
def test_order_streams_and_links_are_learned_by_running(name: str) -> None:
    runner = runner_of(name)[3]
    learned = [(block, set(runner.shares[block]), flow.link is not None) for block, flow in runner.flows.items()]
    assert learned == FLOWS[name] and runner.blocks == [block for block, _, _ in FLOWS[name]]
    for shares in runner.shares.values():
        assert sum(shares.values()) == pytest.approx(1) and all(share > 0 for share in shares.values())
        assert len(shares) > 1 or set(shares.values()) == {1.0}, "one stream counts as it is"


@pytest.mark.parametrize("name", MODELS)
def test_blocks_see_what_the_whole_model_gives_them(name: str) -> None:
    """Every argument and every stream, in the float network and behind quantized blocks; batches of samples, too."""
    model, data, blocks, runner = runner_of(name)
    done: dict[str, nn.Module] = {}
    for block in runner.blocks:
        observed = runner.observe(block, blocks[block])
        calls, outputs = spied(denoiser(model), block, data)
        noisy, _ = spied(denoiser(model, done), block, data)
        for i, own in enumerate(observed.calls):
            close(own.values(), calls[i])
            close(observed.noisy[i].values(), noisy[i])
            close(observed.outputs[i], [outputs[i][stream.place] for stream in observed.streams])
        apart_and_together(observed)
        layers = [quantize_linear(plan, "absmax") for plan in blocks[block]]
        done |= {layer.name: WeightOnlyLinear(layer) for layer in layers}
        runner.advance(observed, layers)


def apart_and_together(observed: Observed) -> None:
    """The block gives samples out of several calls what it gave them in these."""
    picks = [(1, 1), (0, 2), (1, 0)]
    assert observed.rows is not None
    (outputs,) = run_block(observed.block, [join(observed.calls, picks, observed.rows)], observed.streams)
    for place, output in enumerate(outputs):
        of_samples = [
            call[place].unflatten(0, (count, -1))
            for call, count in zip(observed.outputs, observed.samples, strict=True)
        ]
        close([output], [torch.cat([of_samples[call][sample] for call, sample in picks])])
    assert len(Batches(observed, 8, generator(0, "all")).peers) == 1


def spied(module: Denoiser, block: str, data: CalibrationData) -> tuple[list[list[Any]], list[list[Any]]]:
    """All values into and out of a block in every call of the whole model."""
    seen: list[tuple[list[Any], list[Any]]] = []

    def keep(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.append((tree_leaves((args, kwargs)), tree_leaves(output)))

    handle = module.transformer.get_submodule(block).register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        for call in data.calls:
            module(**tensors(call.inputs))
    handle.remove()
    return [values for values, _ in seen], [outputs for _, outputs in seen]


def close(values: Any, expected: Any) -> None:
    for value, other in zip(values, expected, strict=True):
        if isinstance(value, Tensor):
            torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-4)
        else:
            assert value == other


# --- what a stream is worth ------------------------------------------------------------------------------------------


def squared_jacobians(model: LoadedModel, block: str, inputs: dict[str, Tensor]) -> dict[int, float]:
    """Place of what a block gives -> sum of the squares of the derivatives of the output by it, each by itself."""
    given: dict[int, Tensor] = {}

    def cut(_: nn.Module, __: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        given.update({place: value.detach().requires_grad_() for place, value in enumerate(output)})
        return tuple(given.values())

    handle = model.module.get_submodule(block).register_forward_hook(cut)
    output = denoiser(model)(**inputs)
    handle.remove()
    sums = dict.fromkeys(given, 0.0)
    for number in output.flatten():
        for place, gradient in zip(
            given, torch.autograd.grad(number, list(given.values()), retain_graph=True), strict=True
        ):
            sums[place] += float(gradient.double().square().sum())
    return sums


def test_shares_are_what_errors_of_the_streams_do_to_the_output() -> None:
    model, data, blocks, runner = runner_of("sd3")
    sample = take_samples(data.calls[0].inputs, slice(1), model.shared)
    shares = stream_shares(runner.module, runner.flows, [sample] * 100)[f"{T}.0"]
    squares = squared_jacobians(model, f"{T}.0", tensors(sample))
    assert 0.02 < shares[0] < 0.5, "the text has a part, the picture most of it"
    assert shares[0] == pytest.approx(squares[0] / sum(squares.values()), rel=0.1)
    assert runner.shares == BlockRunner(model, data, list(blocks)).shares, "the same data give the same shares"
    assert not any(x.requires_grad for x in model.module.parameters()), "as they were"


class Piece(nn.Module):
    """Gives (what nobody reads in the end, what goes on, what no layer has a part in)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.aside = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, aside: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        return self.aside(aside + x), x + self.mix(x) * table, 2 * table, None


class Pieces(nn.Module):
    config: ClassVar[dict[str, Any]] = {}
    writes = False  # into what a block gave, before the next one gets it

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Piece() for _ in range(3))
        self.unused_blocks = nn.ModuleList([Piece()])

    def forward(self, hidden_states: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        x, aside, table = hidden_states, hidden_states, torch.ones(8)
        for block in self.blocks:
            aside, x, table, _ = block(x, aside=aside, table=table)
            if self.writes:
                x += 1
        return (x,)


def pieces() -> LoadedModel:
    torch.manual_seed(0)
    family = Family(
        "pieces", "Pieces", lambda _: True, ((r".*blocks\.\d+\.\w+", "other"),), (),
        lambda _: (Input("hidden_states", ("batch", 5, 8)),),
        lambda module, inputs: module(**inputs)[0], "none",
    )  # fmt: skip
    return replace(model_of("sana"), family=family, config={}, module=Pieces().requires_grad_(False).eval())


def test_only_what_layers_make_and_the_output_reads_counts() -> None:
    model = pieces()
    blocks = group_by_block(plans_of(model))
    del blocks["unused_blocks.0"]
    runner = BlockRunner(model, calls_of(model), list(blocks))
    assert runner.is_chain and [flow.streams for flow in runner.flows.values()] == [(0, 1)] * 3
    observed = runner.observe("blocks.0", blocks["blocks.0"])
    assert observed.streams == (Stream(0, 0.0), Stream(1, 1.0), Stream(2, 0.0)), "the next block takes all three"
    layers = [quantize_linear(plan, "absmax") for plan in blocks["blocks.0"]]
    aside = replace(layers[1], scales=3 * layers[1].scales)
    assert output_loss(observed, layers) == output_loss(observed, [layers[0], aside]) > 0
    runner.advance(observed, layers)
    assert [stream.place for stream in runner.observe("blocks.1", blocks["blocks.1"]).streams] == [0, 1, 2]
    model.module.writes = True
    assert [flow.link for flow in BlockRunner(model, calls_of(model), list(blocks)).flows.values()] == [None] * 3


def test_blocks_and_layers_that_do_not_run_are_refused_before_work() -> None:
    model = pieces()
    blocks = group_by_block(plans_of(model))
    one = take_samples(calls_of(model).calls[0].inputs, slice(1), model.shared)
    with pytest.raises(ModelError, match=r"unused_blocks\.0: the model does not call it.*--set 'keep="):
        memory.measure(model, blocks, one, 5, 2, 3)
    del blocks["unused_blocks.0"]
    model.module.blocks[1].spare = nn.Linear(8, 8)
    blocks["blocks.1"] = [plan for plan in plans_of(model) if plan.name.startswith("blocks.1.")]
    with pytest.raises(ModelError, match=r"blocks\.1\.spare: its block does not call it"):
        memory.measure(model, blocks, one, 5, 2, 3)
    for block in model.module.blocks:
        block.forward = lambda x, aside, table: (aside * 1, x * 1, table)
    with pytest.raises(ModelError, match=r"blocks\.0: its quantized layers have no part in what it gives"):
        BlockRunner(model, calls_of(model), list(blocks))


def test_streams_that_never_reach_the_output_are_refused() -> None:
    model = pieces()
    blocks = [f"blocks.{i}" for i in range(3)]
    forward = model.module.forward
    model.module.forward = lambda hidden_states: (forward(hidden_states)[0].detach(),)
    with pytest.raises(ModelError, match=r"blocks\.0: the squared gradient of the model's output .* is 0\.0"):
        BlockRunner(model, calls_of(model), blocks)


# --- methods ---------------------------------------------------------------------------------------------------------


def learned(observed: Observed, plans: list[LayerPlan], iterations: int = 120) -> list[QuantizedLinear]:
    """By fp4dit."""
    options = METHODS["fp4dit"].resolve("fast", {"iterations": iterations, "lr": 2e-3})
    method = fp4dit.ScaleAwareRounding(context(options))
    return method.quantize(Unit("block", plans, observed))


def errors(observed: Observed, layers: list[QuantizedLinear]) -> list[float]:
    """Mean squared error of each stream with these layers, in the network quantized so far."""
    block = with_parts(observed.block, {observed.names[one.name]: WeightOnlyLinear(one) for one in layers})
    outputs = run_block(block, observed.noisy, observed.streams)
    pairs = [zip(*streams, strict=True) for streams in zip(outputs, observed.outputs, strict=True)]
    by_call = [[float((a - b).square().mean()) for a, b in pair] for pair in pairs]
    return np.mean(by_call, axis=0).tolist()


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_learned_rounding_follows_the_picture(name: str) -> None:
    """The stream that the output comes from, which is the second that a block gives; the first is the text."""
    _, _, blocks, runner = runner_of(name)
    first, block = runner.blocks[:2]
    runner.advance(runner.observe(first, blocks[first]), nearest_of(blocks[first]))
    observed = runner.observe(block, blocks[block])
    nearest = errors(observed, nearest_of(blocks[block]))
    by_share = errors(observed, learned(observed, blocks[block]))
    both, observed.streams = observed.streams, (Stream(0, 1.0), Stream(1, 0.0))
    by_first = errors(observed, learned(observed, blocks[block]))
    assert [stream.share > 0 for stream in both] == [True, True]
    assert by_share[1] < 0.8 * nearest[1]
    assert by_first[1] > 0.95 * nearest[1] and by_first[0] < 0.8 * nearest[0]


def nearest_of(plans: list[LayerPlan]) -> list[QuantizedLinear]:
    return [quantize_linear(plan, "mse") for plan in plans]


@pytest.mark.parametrize("name", MODELS)
def test_methods_take_every_kind_of_block(name: str) -> None:
    """Learned rounding and activation scales, GPTQ, a searched balance: in the last blocks, behind quantized ones."""
    _, _, blocks, runner = runner_of(name)
    for block in runner.blocks:
        observed, plans = runner.observe(block, blocks[block]), blocks[block]
        if block in runner.blocks[-2:]:
            made = [learned(observed, plans, 4)]
            assert output_loss(observed, made[0]) <= output_loss(observed, nearest_of(plans))
            for method, cls, options in (
                ("qdit", qdit.QDit, {"rows": 16}),
                ("awq", awq.Awq, {"rows": 16, "steps": 2}),
                ("qdiffusion", qdiffusion.QDiffusion, {"iterations": 2, "step_iterations": 2, "rows": 16}),
            ):
                resolved = METHODS[method].resolve("fast", options)
                made.append(cls(context(resolved)).quantize(Unit(block, plans, observed)))
            for layers in made:
                assert [layer.name for layer in layers] == [plan.name for plan in plans]
                assert all(np.isfinite(layer.dequantized()).all() for layer in layers)
        runner.advance(observed, nearest_of(plans))


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_memory_is_measured(name: str) -> None:
    model, data, blocks, runner = runner_of(name)
    one = take_samples(data.calls[0].inputs, slice(1), model.shared)
    sizes = memory.measure(model, blocks, one, data.samples, len(data.calls), 3)
    assert sizes.is_chain == runner.is_chain and len(sizes.blocks) == len(blocks)
    assert (sizes.weighing > 0) == any(len(places) > 1 for _, places, _ in FLOWS[name])
    for size, block in zip(sizes.blocks, runner.blocks, strict=True):
        observed = runner.observe(block, blocks[block])
        arguments = sum(x.nbytes for x in runner.flows[block].call.values() if isinstance(x, Tensor))
        assert size.hidden + size.others == arguments and size.hidden > 0
        assert size.given * observed.samples[0] >= sum(stream.nbytes for stream in observed.outputs[0])
        runner.advance(observed, nearest_of(blocks[block]))
