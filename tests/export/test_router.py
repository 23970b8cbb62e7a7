"""The router against its formula written out number by number, and the bound that says when rounding may matter."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from export.errors import ContractError
from export.router import Router, frequencies
from tests.support import learned

TIMES = np.arange(1000)


def slow_logits(router: Router, t: float) -> list[float]:
    half = len(router.frequencies)
    wave = [math.cos(t * float(f)) for f in router.frequencies] + [math.sin(t * float(f)) for f in router.frequencies]
    hidden = []
    for row, bias in zip(router.w1, router.b1, strict=True):
        v = float(bias) + sum(float(row[i]) * wave[i] for i in range(2 * half))
        hidden.append(v / (1 + math.exp(-v)))
    return [
        float(b) + sum(float(w) * h for w, h in zip(row, hidden, strict=True))
        for row, b in zip(router.w2, router.b2, strict=True)
    ]


def test_logits_and_choice_follow_the_formula() -> None:
    router = learned.router()
    times = [0.0, 1.0, 499.5, 999.0]
    expected = np.array([slow_logits(router, t) for t in times])
    np.testing.assert_allclose(router.logits(times), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(router.choose(times), expected.argmax(1))
    assert set(router.choose(TIMES)) == set(range(learned.BRANCHES))


def test_the_first_branch_wins_a_tie() -> None:
    router = learned.router()
    tied = replace(router, w2=np.zeros_like(router.w2), b2=np.float32([1, 2, 2]))
    assert (tied.choose(TIMES) == 1).all()
    assert tied.undecided(TIMES).all()


def test_frequencies_are_those_of_diffusers() -> None:
    import torch
    from diffusers.models.embeddings import get_timestep_embedding

    expected = get_timestep_embedding(torch.tensor([123.0]), 16, flip_sin_to_cos=True, downscale_freq_shift=0)[0]
    phase = 123.0 * frequencies(16)
    np.testing.assert_allclose(np.concatenate([np.cos(phase), np.sin(phase)]), expected.numpy(), atol=1e-5)


def test_float32_never_changes_a_decided_choice() -> None:
    """1000 timesteps of 50 routers, computed in float32 in another order, differ only where `undecided` says so."""
    for seed in range(50):
        router, t = learned.router(seed), TIMES.astype(np.float32)
        phase = t[:, None] * router.frequencies
        wave = np.concatenate([np.cos(phase), np.sin(phase)], axis=1, dtype=np.float32)
        hidden = wave @ router.w1.T + router.b1
        hidden = hidden * (1 / (1 + np.exp(-hidden)))
        choices = (hidden @ router.w2.T + router.b2).argmax(1)
        undecided = router.undecided(TIMES)
        assert ((choices == router.choose(TIMES)) | undecided).all()
        assert undecided.mean() < 0.02


def test_one_branch_is_always_decided() -> None:
    router = learned.router(branches=1)
    assert (router.choose(TIMES) == 0).all() and not router.undecided(TIMES).any()


def test_equal_by_content() -> None:
    one, same, other = learned.router(), learned.router(), learned.router(seed=1)
    assert one == same and hash(one) == hash(same) and one is not same
    assert one != other and one != "router"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w1": np.zeros((5, 7), np.float32)}, r"router: w1 is float32 \(5, 7\); it must be float32 \(5, 8\)"),
        ({"b2": np.zeros(3)}, r"router: b2 is float64 \(3,\); it must be float32 \(3,\)"),
        ({"b1": np.full(5, np.nan, np.float32)}, "router: b1 has NaN or Inf; train it again"),
    ],
)
def test_broken_rules(changes: dict, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        replace(learned.router(), **changes)
