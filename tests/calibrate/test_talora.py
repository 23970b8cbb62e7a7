"""TALoRA's parts against NumPy, written-out gradients and the reference's finished layers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from export.errors import RecipeError
from export.formats.format import encode, fold_negative_zero, get_format
from pipeline.backends.reference import FakeQuantLinear, Routing
from pipeline.calibrate.learn.talora import (
    BranchedLinear,
    Branches,
    Gates,
    TimestepRouter,
    one_hot_straight_through,
    start,
)
from tests.support.portable import make_linear

N, K, H, R = 6, 16, 3, 2
TIMES = torch.linspace(50, 1000, 20)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_layer(unsigned=False, seed=0):
    rng, fmt = np.random.default_rng(seed), get_format("E2M1")
    static = {
        "activation_format": "UE2M2",
        "activation_scaling": "per_tensor",
        "activation_scale": np.array([0.3], np.float32),
        "activation_zero": np.array([-0.2], np.float32),
    }
    return make_linear(
        fold_negative_zero(fmt, encode(fmt, rng.standard_normal((N, K)) * 3)),
        weight_format="E2M1",
        name="layer",
        kind="ff.out",
        granularity="per_channel",
        group_size=0,
        scales=rng.uniform(0.1, 0.2, (N, 1)).astype(np.float32),
        bias=rng.standard_normal(N).astype(np.float32),
        **(static if unsigned else {"activation_format": "E2M3"}),
    )


def branched(layer, init="zero", seed=1):
    """The layer with branches of numbers that fp16 holds exactly."""
    weight = torch.randn((N, K), generator=generator(seed)) * 0.4
    part = BranchedLinear(layer, weight, Branches(H, R, init), Gates(), seed)
    with torch.no_grad():
        for value in (part.down, part.up):
            value.copy_(torch.randint(-8, 9, value.shape, generator=generator(seed)) / 16)
    return part


def test_one_hot_is_the_first_largest_and_its_gradient_that_of_softmax():
    logits = torch.tensor([[0.2, 1.5, 1.5], [-1.0, -3.0, -2.0]], dtype=torch.float64, requires_grad=True)
    upstream = torch.tensor([[0.7, -0.4, 2.0], [1.0, 0.5, -0.5]], dtype=torch.float64)
    one_hot = one_hot_straight_through(logits)
    np.testing.assert_array_equal(one_hot.detach().numpy(), [[0, 1, 0], [1, 0, 0]])
    (one_hot * upstream).sum().backward()
    for row in range(2):
        z = logits.detach().numpy()[row]
        p = np.exp(z) / np.exp(z).sum()
        jacobian = np.diag(p) - np.outer(p, p)
        np.testing.assert_allclose(logits.grad.numpy()[row], jacobian @ upstream.numpy()[row], rtol=1e-12)


@pytest.mark.parametrize("branches", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_the_router_starts_with_equal_shares_early_timesteps_first(branches, seed):
    router = TimestepRouter(branches, TIMES, generator(seed))
    chosen = router.exported().choose(TIMES.numpy())
    counts = np.bincount(chosen, minlength=branches)
    # A border may fall to the other side of the timestep next to it.
    assert counts.sum() == 20 and (np.abs(counts - 20 / branches) <= 2).all()
    assert (np.diff(chosen) <= 0).all()  # TIMES rise, sampling goes down
    between = np.linspace(50, 1000, 777)
    ideal = branches - 1 - np.minimum((between - 50) / 950 * branches, branches - 1).astype(int)
    choices = router.exported().choose(between)
    # A smooth fit of a step is off near the step only.
    assert (np.abs(choices - ideal) <= 1).all() and (choices == ideal).mean() > 0.9


def test_the_exported_router_has_the_trained_ones_logits():
    router = TimestepRouter(3, TIMES, generator())
    with torch.no_grad():
        for value in router.parameters():
            value.add_(0.3 * torch.randn(value.shape, generator=generator(5)))
    # float32: phases up to 1000 are off by 2^-24 * 1000, and sums of 64 products follow.
    logits, expected = router.logits(TIMES).detach().numpy(), router.exported().logits(TIMES.numpy())
    np.testing.assert_allclose(logits, expected, atol=64 * 1000 * 2.0**-24)
    np.testing.assert_array_equal(router(TIMES).detach().numpy().argmax(1), router.exported().choose(TIMES.numpy()))


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("shape", [(4, 5, K), (4, K), (4, 2, 3, K)])
def test_a_tuned_layer_is_the_finished_one_sample_by_sample(unsigned, shape):
    part = branched(make_layer(unsigned))
    router = TimestepRouter(H, TIMES, generator())
    times = torch.tensor([1000.0, 60.0, 500.0, 980.0])
    part.gates.now = router(times)
    assert len(set(part.gates.now.argmax(1).tolist())) == 3
    finished = part.finished(router.exported())
    reference = FakeQuantLinear(finished, torch.float32, Routing(router.exported()))
    reference.routing.tell(times)
    x = torch.randn(shape, generator=generator(2))
    # Sums of K + R products in another order: some 20 roundings of numbers below 2^4.
    np.testing.assert_allclose(part(x).detach().numpy(), reference(x).numpy(), atol=20 * 16 * 2.0**-24)


def test_the_branch_merges_into_the_weight():
    """y less its quantized part is (up[h] down[h]) x, h of the sample's timestep."""
    part = branched(make_layer())
    router = TimestepRouter(H, TIMES, generator())
    finished = part.finished(router.exported())
    times = torch.tensor([1000.0, 60.0])
    part.gates.now = router(times)
    x = torch.randn((2, 3, K), generator=generator(3))
    for sample, branch in enumerate(router.exported().choose(times.numpy())):
        merged = finished.lora_up[branch].astype(float) @ finished.lora_down[branch].astype(float)
        output = part.low_rank(x)[sample].detach().numpy()
        np.testing.assert_allclose(output, x[sample].numpy() @ merged.T, atol=1e-5)


def test_gradients_are_those_written_out():
    """Loss <g, y>: up[h] gets g (down[h] x)^T, down[h] gets up[h]^T g x^T, gate h <g, up[h] down[h] x>; others 0."""
    part = branched(make_layer())
    gates = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], requires_grad=True)
    part.gates.now = gates
    x = torch.randn((2, 1, K), generator=generator(4))
    g = torch.randn((2, 1, N), generator=generator(5))
    (part(x) * g).sum().backward()
    down, up = part.down.detach().numpy().reshape(H, R, K), part.up.detach().numpy().reshape(N, H, R)
    up_grad, down_grad = part.up.grad.numpy().reshape(N, H, R), part.down.grad.numpy().reshape(H, R, K)
    assert not up_grad[:, 0].any() and not down_grad[0].any()
    for sample, h in ((0, 1), (1, 2)):
        x_row, g_row = x[sample, 0].numpy(), g[sample, 0].numpy()
        np.testing.assert_allclose(up_grad[:, h], np.outer(g_row, down[h] @ x_row), atol=1e-5)
        np.testing.assert_allclose(down_grad[h], np.outer(up[:, h].T @ g_row, x_row), atol=1e-5)
        expected = [g_row @ up[:, other] @ down[other] @ x_row for other in range(H)]
        np.testing.assert_allclose(gates.grad[sample].numpy(), expected, atol=1e-5)


def test_the_input_gets_the_gradient_of_both_paths():
    part = branched(make_layer())
    part.gates.now = torch.tensor([[1.0, 0.0, 0.0]])
    x = torch.randn((1, 1, K), generator=generator(6), requires_grad=True)
    g = torch.randn((1, 1, N), generator=generator(7))
    (part(x) * g).sum().backward()
    merged = part.weight + part.up[:, :R] @ part.down[:R]  # per token nothing is clipped: rounding counts as identity
    np.testing.assert_allclose(x.grad[0, 0].numpy(), (g[0, 0] @ merged).detach().numpy(), atol=1e-5)


def test_zero_start_is_the_quantized_layer():
    layer = make_layer(unsigned=True)
    part = BranchedLinear(layer, torch.zeros(N, K), Branches(H, R, "zero"), Gates(), 0)
    part.gates.now = torch.nn.functional.one_hot(torch.tensor([2]), H).float()
    x = torch.randn((1, 4, K), generator=generator(8))
    np.testing.assert_array_equal(part(x).detach().numpy(), FakeQuantLinear(layer, torch.float32)(x).numpy())
    assert part.down.detach().any()  # else nothing could learn


def test_svd_start_is_the_best_approximation_of_the_error_in_every_branch():
    error = torch.randn((N, K), generator=generator(9))
    down, up = start(error, Branches(H, R, "svd"), generator())
    u, s, v = np.linalg.svd(error.double().numpy(), full_matrices=False)
    expected = (u[:, :R] * s[:R]) @ v[:R]
    for h in range(H):
        part = slice(h * R, (h + 1) * R)
        np.testing.assert_allclose((up[:, part] @ down[part]).numpy(), expected, atol=1e-5)


def test_svd_start_with_a_rank_above_the_weights():
    error = torch.randn((3, K), generator=generator(9))
    down, up = start(error, Branches(1, 5, "svd"), generator())
    assert down.shape == (5, K) and up.shape == (3, 5)
    np.testing.assert_allclose((up @ down).numpy(), error.numpy(), atol=1e-5)


def test_finished_branches_fit_into_fp16():
    part = branched(make_layer())
    with torch.no_grad():
        part.up += 1e-5
    finished = part.finished(TimestepRouter(H, TIMES, generator()).exported())
    for array in (finished.lora_up, finished.lora_down):
        np.testing.assert_array_equal(array, array.astype(np.float16))
    assert replace(finished).size_bytes - part.layer.size_bytes == 2 * H * R * (N + K)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 4, "zero"), "lora_count 0 and lora_rank 4 must be positive; use_lora=false"),
        ((2, -1, "zero"), "lora_rank -1 must be positive"),
        ((2, 4, "ones"), "lora_init 'ones'; use one of zero, svd"),
    ],
)
def test_bad_options_are_told(values, message):
    with pytest.raises(RecipeError, match=message):
        Branches(*values)
