"""Block reconstruction: batches across calls, the loop against a plain one, and what the methods hand back."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from export.errors import ModelError, RecipeError
from pipeline import methods
from pipeline.calibrate.blocks import ONLY, Observed
from pipeline.calibrate.learn.adaround import Schedule, SoftRounding
from pipeline.calibrate.learn.reconstruct import (
    Batches,
    LearningSettings,
    block_loss,
    generator,
    join,
    output_loss,
    reconstruct,
)
from pipeline.calibrate.method import Unit
from pipeline.calibrate.methods import fp4dit
from pipeline.calibrate.methods.rtn import float_weight, quantize_linear
from pipeline.calibrate.plan import LayerPlan, group_multipliers
from pipeline.calibrate.streams import BlockCall, Stream

pytestmark = pytest.mark.torch

WIDTH, HIDDEN, TOKENS = 16, 32, 5
ROWS = (1, 1, 0, 0)  # hidden, gate, table, mask


class Block(nn.Module):
    """A feed-forward block with a gate per sample, called like a transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, hidden, gate=None, table=None, mask=None):
        return hidden + gate[:, None] * self.down(nn.functional.gelu(self.up(hidden))) + table


def calls_of(batches: list[int], tokens: list[int], noise: float = 0.0) -> list[BlockCall]:
    draw = np.random.default_rng(3)
    table = torch.from_numpy(draw.normal(size=(1, WIDTH))).float()
    calls = []
    for b, t in zip(batches, tokens, strict=True):
        hidden = draw.normal(size=(b, t, WIDTH)) + noise * np.random.default_rng(4).normal(size=(b, t, WIDTH))
        gate = torch.from_numpy(draw.normal(size=(b, WIDTH)) + 2).float()
        calls.append(BlockCall((torch.from_numpy(hidden).float(),), {"gate": gate, "table": table, "mask": None}))
    return calls


def observed_block(
    batches: tuple[int, ...] = (4, 4, 3), tokens: tuple[int, ...] = (TOKENS,) * 3, seed: int = 0
) -> Observed:
    torch.manual_seed(seed)
    block = Block().requires_grad_(False).eval()
    names = {"block.up": "up", "block.down": "down"}
    calls, noisy = (calls_of(list(batches), list(tokens), noise) for noise in (0.0, 0.02))
    return Observed(block, names, calls, noisy, [float(i) for i in range(len(batches))], list(batches), ROWS)


def in_float64(observed: Observed) -> Observed:
    calls, noisy = (
        [
            BlockCall((c.args[0].double(),), {k: None if v is None else v.double() for k, v in c.kwargs.items()})
            for c in of
        ]
        for of in (observed.calls, observed.noisy)
    )
    block = observed.block.double()
    return Observed(block, observed.names, calls, noisy, observed.timesteps, observed.samples, ROWS)


def plans_of(observed: Observed, fmt: str = "E2M1", granularity: str = "exact_group") -> list[LayerPlan]:
    def plan(name: str, path: str) -> LayerPlan:
        ref = SimpleNamespace(name=name, kind="ff.in", module=observed.block.get_submodule(path))
        multipliers = group_multipliers(fmt, "E2M3") if granularity == "exact_group" else (1,)
        return LayerPlan(ref, fmt, "E2M3", granularity, 0 if granularity == "per_channel" else 8, multipliers)

    return [plan(name, path) for name, path in observed.names.items()]


def context(method: str, recipe: str = "mse", seed: int = 0, **options) -> SimpleNamespace:
    row = methods.METHODS[method]
    weights = SimpleNamespace(search=recipe)
    return SimpleNamespace(
        options=row.resolve("fast", options), recipe=SimpleNamespace(weights=weights), seed=seed, data=None
    )


def test_a_batch_is_made_of_different_samples_with_their_targets():
    observed = observed_block()
    batches = Batches(observed, 6, generator(0, "block"))
    everything = torch.cat([call.args[0] for call in observed.noisy])
    targets = torch.cat([output for (output,) in observed.outputs])
    gates = torch.cat([call.kwargs["gate"] for call in observed.noisy])
    seen = set()
    for _ in range(20):
        call, (target,) = batches.draw()
        rows = [int((everything == sample).flatten(1).all(1).nonzero()[0, 0]) for sample in call.args[0]]
        assert len(set(rows)) == 6
        assert torch.equal(target, targets[rows])
        assert torch.equal(call.kwargs["gate"], gates[rows])
        assert call.kwargs["table"] is observed.noisy[0].kwargs["table"]
        assert call.kwargs["mask"] is None
        seen |= set(rows)
    assert seen == set(range(11))


def test_samples_of_different_shapes_do_not_meet():
    observed = observed_block(tokens=(5, 7, 5))
    batches = Batches(observed, 16, generator(0, "block"))
    sizes = {tuple(batches.draw()[0].args[0].shape[:2]) for _ in range(30)}
    assert sizes == {(7, 5), (4, 7)}


def test_joining_all_samples_of_one_call_gives_the_call():
    call = calls_of([4], [TOKENS])[0]
    joined = join([call], [(0, row) for row in range(4)], ROWS)
    assert torch.equal(joined.args[0], call.args[0])
    assert torch.equal(joined.kwargs["gate"], call.kwargs["gate"])


def test_loss_sums_over_tokens_and_averages_over_the_rest():
    output, target = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    expected = sum(
        float((output[b, t, c] - target[b, t, c]) ** 2) for b in range(3) for t in range(4) for c in range(5)
    ) / (3 * 5)
    assert float(block_loss((output,), (target,), ONLY)) == pytest.approx(expected, rel=1e-5)


def test_an_error_counts_by_the_share_of_its_stream():
    """Streams of another number of tokens and of another width; one that is handed on and not read."""
    errors = (torch.full((3, 4, 5), 0.5), torch.full((3, 7, 2), 2.0), torch.full((3, 1, 1), 9.0))
    targets = tuple(torch.randn(error.shape) for error in errors)
    outputs = tuple(target + error for target, error in zip(targets, errors, strict=True))
    streams = (Stream(0, 0.75), Stream(1, 0.25), Stream(3, 0.0))
    loss = float(block_loss(outputs, targets, streams))
    assert loss == pytest.approx((4 + 7) * (0.75 * 0.5**2 + 0.25 * 2.0**2), rel=1e-5)
    even = (Stream(0, 0.5), Stream(1, 0.5))
    same = [(torch.zeros(2, 3, 4), torch.ones(2, 3, 4)) for _ in even]
    assert float(block_loss(*zip(*same, strict=True), even)) == 6, "as one stream of all their tokens"


def test_calls_that_do_not_come_apart_are_refused():
    observed = observed_block()
    observed.rows = None
    with pytest.raises(ModelError, match=r"block with block\.up: .* does not come apart into samples; use a method"):
        Batches(observed, 4, generator(0, "block"))
    observed = observed_block()
    last = observed.calls[-1]
    observed.calls[-1] = BlockCall(last.args, {**last.kwargs, "table": 2 * last.kwargs["table"]})
    with pytest.raises(ModelError, match="gives something else than in the call"):
        Batches(observed, 4, generator(0, "block"))


def test_calls_with_other_tables_do_not_meet():
    observed = observed_block()
    for calls in (observed.calls, observed.noisy):
        calls[-1] = BlockCall(calls[-1].args, {**calls[-1].kwargs, "table": 2 * calls[-1].kwargs["table"]})
    batches = Batches(observed, 16, generator(0, "block"))
    assert {len(batches.draw()[0].args[0]) for _ in range(30)} == {3, 8}


@pytest.mark.parametrize("scale_aware", [True, False])
def test_the_loop_is_the_plain_one(scale_aware):
    """Same batches, plain Adam, formulas as in the paper, autograd through all of them, float64."""
    observed, iterations, lr = in_float64(observed_block()), 12, 1e-3 if scale_aware else 1e-2
    plans = plans_of(observed)
    bases = [quantize_linear(plan, "mse") for plan in plans]
    weights = [torch.from_numpy(float_weight(plan)) for plan in plans]
    roundings = {b.name: SoftRounding(w, b, scale_aware).double() for w, b in zip(weights, bases, strict=True)}
    reconstruct(observed, roundings, LearningSettings(Schedule(iterations), lr, 0.01, 4), "block", 7)
    plain = [SoftRounding(w, b, scale_aware).double() for w, b in zip(weights, bases, strict=True)]
    optimiser = torch.optim.Adam([rounding.v for rounding in plain], lr=lr)
    batches = Batches(observed, 4, generator(7, "block"))
    for iteration in range(iterations):
        call, (target,) = batches.draw()
        x, gate, table = call.args[0], call.kwargs["gate"], call.kwargs["table"]
        shares = [(torch.sigmoid(r.v * r.inverse) * 1.2 - 0.1).clamp(0, 1) for r in plain]
        up, down = (r.low + r.gap * share for r, share in zip(plain, shares, strict=True))
        inner = nn.functional.gelu(x @ up.T + observed.block.up.bias)
        output = x + gate[:, None] * (inner @ down.T) + table
        loss = ((output - target) ** 2).sum(1).mean()
        if iteration >= 0.2 * iterations:
            beta = 2 + 18 * (1 - (iteration - 0.2 * iterations) / (0.8 * iterations))
            loss = loss + 0.01 * sum((1 - (2 * share - 1).abs() ** beta).sum() for share in shares)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for ours, theirs in zip(roundings.values(), plain, strict=True):
        start = ours.neighbours.fraction.double()
        assert float((theirs.share_up().detach() - start).abs().max()) > 0.01  # it has moved
        assert torch.allclose(ours.v, theirs.v, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["fp4dit", "fp_adaround", "brecq", "adaround"])
@pytest.mark.parametrize(("fmt", "granularity"), [("E2M1", "exact_group"), ("E3M0", "per_channel"), ("INT4", "group")])
def test_methods_beat_rounding_to_nearest(method, fmt, granularity):
    observed = observed_block()
    plans = plans_of(observed, fmt, granularity)
    calibrator = methods.METHODS[method].load()(context(method, iterations=150))
    layers = calibrator.quantize(Unit("block", plans, observed))
    nearest = [quantize_linear(plan, "mse") for plan in plans]
    assert [layer.name for layer in layers] == [plan.name for plan in plans]
    assert output_loss(observed, layers) < output_loss(observed, nearest)
    for layer, base in zip(layers, nearest, strict=True):
        assert np.array_equal(layer.scales, base.scales)
        assert (layer.codes != base.codes).any()


def test_a_method_is_deterministic_and_depends_on_the_seed():
    def codes(seed: int) -> bytes:
        observed = observed_block()
        method = fp4dit.ScaleAwareRounding(context("fp4dit", iterations=60, batch=4, seed=seed))
        return b"".join(layer.codes.tobytes() for layer in method.quantize(Unit("block", plans_of(observed), observed)))

    assert codes(0) == codes(0) != codes(1)


def test_the_float_block_is_left_alone():
    observed = observed_block()
    before = [parameter.clone() for parameter in observed.block.parameters()]
    fp4dit.ScaleAwareRounding(context("fp4dit", iterations=5)).quantize(Unit("block", plans_of(observed), observed))
    assert all(torch.equal(a, b) for a, b in zip(before, observed.block.parameters(), strict=True))
    assert isinstance(observed.block.up, nn.Linear)


def test_worse_than_nearest_is_not_used(caplog):
    """Rounding variables of another seed, as a coin would have it, lose and are refused."""
    observed = observed_block()
    plans = plans_of(observed)
    nearest = [quantize_linear(plan, "mse") for plan in plans]
    wrong = [
        SoftRounding(torch.from_numpy(float_weight(plan)), b, True) for plan, b in zip(plans, nearest, strict=True)
    ]
    with torch.no_grad():
        for rounding in wrong:
            rounding.v.copy_(torch.from_numpy(np.random.default_rng(0).normal(size=rounding.v.shape)))
    kept = fp4dit.better(observed, "block", nearest, [rounding.layer() for rounding in wrong])
    assert kept is nearest
    assert "not better and not used" in caplog.text


@pytest.mark.parametrize("method", ["fp4dit", "fp_adaround", "brecq", "adaround"])
def test_rounding_variables_of_another_block_are_not_used(method, monkeypatch, caplog):
    """Planted: each of two blocks of equal shapes is given what the other has learned, and falls back to nearest."""
    blocks = [observed_block(seed=seed) for seed in (2, 3)]
    units = [Unit("block", plans_of(observed), observed) for observed in blocks]
    nearest = [[quantize_linear(plan, "mse").codes for plan in unit.plans] for unit in units]
    whole = SoftRounding.layer

    def codes(unit, change):
        """Codes of the unit's layers; `change` meets every rounding when it has been learned."""
        monkeypatch.setattr(SoftRounding, "layer", lambda rounding: (change(rounding), whole(rounding))[1])
        return [layer.codes for layer in methods.METHODS[method].load()(method_context).quantize(unit)]

    method_context, learned = context(method, iterations=40), [{}, {}]
    for unit, own, base in zip(units, learned, nearest, strict=True):
        result = codes(unit, lambda rounding, own=own: own.update({rounding.base.name: rounding.v.detach().clone()}))
        assert all((a != b).any() for a, b in zip(result, base, strict=True))
    assert "not used" not in caplog.text
    for unit, other, base in zip(units, reversed(learned), nearest, strict=True):
        result = codes(unit, lambda rounding, other=other: rounding.v.data.copy_(other[rounding.base.name]))
        assert all(np.array_equal(a, b) for a, b in zip(result, base, strict=True))
    assert caplog.text.count("not better and not used") == (4 if method == "adaround" else 2)


def test_a_layer_that_learning_makes_worse_stays_rounded_to_nearest(caplog):
    """Two iterations of a far too large rate leave the rounding to chance."""
    observed = observed_block()
    plans = plans_of(observed)
    method = methods.METHODS["adaround"].load()(context("adaround", iterations=2, lr=100.0))
    layers = method.quantize(Unit("block", plans, observed))
    for layer, plan in zip(layers, plans, strict=True):
        nearest = quantize_linear(plan, "mse")
        assert np.array_equal(layer.codes, nearest.codes)
        assert f"{plan.name}: learned rounding is not better and not used" in caplog.text


@pytest.mark.parametrize("option", ["iterations", "lr", "batch"])
def test_options_that_learn_nothing_are_refused(option):
    with pytest.raises(RecipeError, match=f"calibrate.options.{option} 0.* must be above 0; method=rtn"):
        fp4dit.ScaleAwareRounding(context("fp4dit", **{option: 0})).settings()


@pytest.mark.parametrize("method", ["fp4dit", "fp_adaround"])
def test_layers_with_group_sizes_of_their_own_are_learned(method):
    observed = observed_block()
    calibrator = methods.METHODS[method].load()(context(method, iterations=60, group_sizes="4,16"))
    plans = calibrator.plan(plans_of(observed))
    nearest = [quantize_linear(plan, "mse") for plan in plans]
    layers = calibrator.quantize(Unit("block", plans, observed))
    assert [(layer.group_size, layer.multipliers.shape) for layer in layers] == [(4, (32, 4)), (16, (16, 2))]
    assert output_loss(observed, layers) < output_loss(observed, nearest)
    for layer, base in zip(layers, nearest, strict=True):
        assert np.array_equal(layer.multipliers, base.multipliers) and (layer.codes != base.codes).any()
    with pytest.raises(RecipeError, match=r"block\.up: group size 3; use a divisor of K=16"):
        methods.METHODS[method].load()(context(method, group_sizes="3,16")).plan(plans_of(observed))


def test_a_stray_linear_is_reconstructed_by_itself():
    torch.manual_seed(1)
    linear = nn.Linear(WIDTH, 8).requires_grad_(False)
    calls = [BlockCall((torch.randn(6, WIDTH),), {}) for _ in range(3)]
    observed = Observed(linear, {"head": ""}, calls, calls, [0.0, 1.0, 2.0], [6, 6, 6], (1,))
    ref = SimpleNamespace(name="head", kind="ff.in", module=linear)
    plan = LayerPlan(ref, "E2M1", "E2M3", "per_channel", 0, (1,))
    method = fp4dit.ScaleAwareRounding(context("fp4dit", iterations=100))
    layers = method.quantize(Unit("head", [plan], observed))
    assert output_loss(observed, layers) < output_loss(observed, [quantize_linear(plan, "mse")])
