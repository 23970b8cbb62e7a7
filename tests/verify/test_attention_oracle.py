"""The oracle of 8-bit attention: right by definition, wide enough for every right engine, far too narrow for a wrong
one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from export.formats.format import decode, get_format, quantize
from pipeline.verify.attention_oracle import AttentionCheck, AttentionNumbers, AttentionProbe, HeadOracle
from pipeline.verify.attention_oracle import check_attention as check
from tests.support.attention_engines import (
    RIGHT,
    Faults,
    Form,
    attend,
    codes_of,
    sum_backwards_by_size,
    sum_in_turn,
    sum_of_tiles,
)

F32 = np.float32
HEADS, CHANNELS, QUERIES = 2, 32, 12
FORMS = {
    "plain": Form(),
    "in turn, by reciprocals": Form(sum_in_turn, by_reciprocal=True, exp_ulps=2),
    "largest sums, fused": Form(sum_backwards_by_size, exp_ulps=2, fused=True),
    "tiles, folded": Form(sum_of_tiles, by_reciprocal=True, exp_ulps=2, folded=True),
}


def numbers(fmt: str = "INT8") -> AttentionNumbers:
    return AttentionNumbers(fmt, fmt, float(F32(CHANNELS**-0.5)))


def tensors(kind: str, keys: int, seed: int = 0) -> dict[str, Any]:
    """q, k, v [1, H, T, D] and a mask, of one kind of difficulty."""
    rng = np.random.default_rng([seed, keys])
    q, k, v = (rng.normal(size=(1, HEADS, count, CHANNELS)) for count in (QUERIES, keys, keys))
    mask = np.zeros((1, 1, 1, 1))
    if kind == "outliers":
        k[..., 0] += 20
        q[:, :, 0, 1], v[:, :, 0, 3] = 30, 100
        v[..., 2] *= 20
    elif kind == "means":
        k += 3 * rng.normal(size=(1, HEADS, 1, CHANNELS))
    elif kind == "large means":
        k += 30 * rng.normal(size=(1, HEADS, 1, CHANNELS))
    elif kind == "padding":
        k += 3 * rng.normal(size=(1, HEADS, 1, CHANNELS))
        k[:, :, keys // 3 :] = k[:, :, -1:]
    elif kind == "equal keys":
        k[:] = k[:, :, :1]
    elif kind == "mask":
        mask = np.where(rng.random((1, 1, 1, keys)) < 0.4, -10000, 0)
    elif kind == "lowest mask":
        mask = np.where(np.arange(keys) % 3 == 1, float(np.finfo(F32).min), 0).reshape(1, 1, 1, keys)
    elif kind == "all masked":
        mask = np.full((1, 1, 1, keys), -10000)
    elif kind == "keys taken away":
        mask = np.where(rng.random((1, 1, QUERIES, keys)) < 0.4, -np.inf, 0)
        mask[..., 0] = 0
    elif kind == "flat":
        q *= 0.01
    elif kind == "peaked":
        q *= 8
    elif kind == "zeros":
        q[:, :, 0], k[:, :, 0], v[..., 0] = 0, 0, 0
    return {name: array.astype(F32) for name, array in {"q": q, "k": k, "v": v, "mask": mask}.items()}


KINDS = (
    "plain", "outliers", "means", "large means", "padding", "equal keys", "mask", "lowest mask", "all masked",
    "keys taken away", "flat", "peaked", "zeros",
)  # fmt: skip


def engine(of: dict[str, Any], numbers: AttentionNumbers, form: Form = FORMS["plain"], faults: Faults = RIGHT) -> Any:
    """The output of a float32 engine, [1, H, Tq, D]."""
    q, k, v = of["q"], of["k"], of["v"]
    mask = np.broadcast_to(of["mask"], (1, HEADS, q.shape[2], k.shape[2]))
    with np.errstate(invalid="ignore"):
        heads = [attend(q[0, h], k[0, h], v[0, h], mask[0, h], numbers, form, faults) for h in range(HEADS)]
    return np.stack(heads)[None]


def judged(of: dict[str, Any], output: Any, numbers: AttentionNumbers) -> AttentionCheck:
    return check(AttentionProbe(of["q"], of["k"], of["v"], of["mask"], output), numbers)


@pytest.mark.parametrize("fmt", ["INT8", "E2M3", "E3M0"])
def test_outputs_are_those_of_the_definition(fmt: str) -> None:
    """In float64, where no number lies on a midpoint."""
    of, spec = tensors("means", 9), numbers(fmt)
    q, k, v = (of[name][0, 0].astype(np.float64) for name in "qkv")
    row = get_format(fmt)

    def rounded(x: Any) -> Any:
        scale = np.abs(x).max(axis=1, keepdims=True) / row.max_value
        return decode(row, quantize(row, x / scale)) * scale

    score = rounded(q) @ rounded(k - k.mean(axis=0)).T * spec.scale
    p = np.rint(255 * np.exp(score - score.max(axis=1, keepdims=True)))
    output, bound, _ = HeadOracle(of["k"][0, 0], of["v"][0, 0], spec).outputs(of["q"][0, 0], np.zeros((1, 9)))
    np.testing.assert_allclose(output, p @ rounded(v.T).T / p.sum(axis=1, keepdims=True), rtol=1e-12, atol=1e-12)
    assert (bound > 0).all() and np.median(bound / np.abs(output)) < 1e-5


@pytest.mark.parametrize("keys", [1, 2, 7, 77])
@pytest.mark.parametrize("kind", KINDS)
def test_every_right_engine_is_within_the_bound(kind: str, keys: int) -> None:
    of = tensors(kind, keys)
    for name, form in FORMS.items():
        findings = judged(of, engine(of, numbers(), form), numbers())
        assert findings.output_error <= 1, f"{name}: {findings}"
        assert findings.nonfinite == 0 and findings.rows == findings.rows_of == HEADS * QUERIES


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_every_right_engine_is_within_the_bound_of_many_cases(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for kind in KINDS:
        of = tensors(kind, int(rng.integers(1, 701)), seed + 1)
        fmt = ("INT8", "INT6", "INT4", "E2M3", "E2M1", "E1M2", "E3M0")[seed % 7]
        for name, form in FORMS.items():
            findings = judged(of, engine(of, numbers(fmt), form), numbers(fmt))
            assert findings.output_error <= 1, f"{kind}, {fmt}, {name}: {findings}"


# Right code with one thing wrong in it -> how many times the bound that is, at least, for normal numbers of 77 keys.
FAULTS: dict[str, tuple[Faults, float]] = {
    "K's mean stays": (Faults(centred=False), 1e5),
    "token scales of q times 1.001": (Faults(query_scale=1.001), 1e4),
    "token scales of k times 1.001": (Faults(key_scale=1.001), 1e4),
    "127 in place of 255": (Faults(p_max=127), 1e5),
    "divided by the exponentials' sum": (Faults(sum_of_exponentials=True), 1e3),
    "truncated": (Faults(truncated=True), 1e5),
    "exponentials of another base": (Faults(sharp=1.0005), 1e3),
}


@pytest.mark.parametrize("kind", ["plain", "means", "mask", "lowest mask", "peaked"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_far_beyond_the_bound(fault: str, kind: str) -> None:
    of, (faults, least) = tensors(kind, 77), FAULTS[fault]
    assert judged(of, engine(of, numbers(), faults=faults), numbers()).output_error > least


LONG_FAULTS: dict[str, tuple[Faults, float]] = {
    "token scales of q times 1.0001": (Faults(query_scale=1.0001), 1e4),
    "token scales of k times 1.0001": (Faults(key_scale=1.0001), 1e4),
    "K's mean added up in float32": (Faults(narrow_mean=True), 1e4),
}


@pytest.mark.parametrize("fault", LONG_FAULTS)
def test_a_fault_is_beyond_the_bound_of_many_keys_with_large_means(fault: str) -> None:
    of, (faults, least) = tensors("large means", 4096), LONG_FAULTS[fault]
    assert judged(of, engine(of, numbers()), numbers()).output_error <= 1
    assert judged(of, engine(of, numbers(), faults=faults), numbers()).output_error > least


def _mask_of_another_sample(of: dict[str, Any]) -> Any:
    return engine({**of, "mask": np.roll(of["mask"], 1, axis=-1)}, numbers())


def _scale_of_another_channel(of: dict[str, Any]) -> Any:
    scales = np.stack([codes_of("INT8", of["v"][0, head].T, Form())[1][:, 0] for head in range(HEADS)])
    return engine(of, numbers()) * (np.roll(scales, 1, axis=-1) / scales)[None, :, None]


def _key_dropped(of: dict[str, Any]) -> Any:
    return engine({**of, "k": of["k"][:, :, :-1], "v": of["v"][:, :, :-1]}, numbers())


def _heads_swapped(of: dict[str, Any]) -> Any:
    return engine(of, numbers())[:, ::-1]


def _another_format(of: dict[str, Any]) -> Any:
    return engine(of, replace(numbers(), pv_format="INT6"))


def _another_scale(of: dict[str, Any]) -> Any:
    return engine(of, replace(numbers(), scale=numbers().scale * 1.0001))


@pytest.mark.parametrize(
    "fault", [_scale_of_another_channel, _key_dropped, _heads_swapped, _another_format, _another_scale]
)
def test_a_fault_in_its_operands_is_far_beyond_the_bound(fault: Callable[[dict[str, Any]], Any]) -> None:
    of = tensors("plain", 77)
    assert judged(of, fault(of), numbers()).output_error > 1e3


def test_a_mask_of_another_sample_is_far_beyond_the_bound() -> None:
    of = tensors("mask", 77)
    assert judged(of, _mask_of_another_sample(of), numbers()).output_error > 1e5


def test_a_single_flip_is_beyond_the_bound_and_found_where_it_is() -> None:
    of = tensors("plain", 77)
    output = engine(of, numbers())
    output[0, 1, 5, 7] *= 1 + 1e-5
    findings = judged(of, output, numbers())
    assert findings.output_error > 5 and findings.worst == (0, 1, 5, 7)


def test_numbers_that_are_not_finite_are_counted_and_beyond_any_bound() -> None:
    of = tensors("plain", 7)
    output = engine(of, numbers())
    output[0, 0, 3, 0], of["k"][0, 1, 2, 0] = np.nan, np.inf
    findings = judged(of, output, numbers())
    assert findings.nonfinite == 2 and findings.output_error == np.inf


def test_a_row_without_keys_is_nan_and_nothing_else() -> None:
    of = tensors("plain", 7)
    of["mask"] = np.zeros((1, 1, QUERIES, 7), F32)
    of["mask"][0, 0, 4] = -np.inf
    output = engine(of, numbers())
    assert np.isnan(output[0, :, 4]).all()
    findings = judged(of, output, numbers())
    assert findings.output_error <= 1 and findings.nonfinite == 0
    output[0, :, 4] = 0
    assert judged(of, output, numbers()).output_error == np.inf


def test_of_a_long_attention_each_head_is_looked_at_but_not_each_query() -> None:
    of = tensors("plain", 77)
    probe = AttentionProbe(of["q"], of["k"], of["v"], of["mask"], engine(of, numbers()))
    findings = check(probe, numbers(), most_scores=HEADS * QUERIES * 77 // 4)
    assert (findings.rows, findings.rows_of) == (HEADS * QUERIES // 4, HEADS * QUERIES)
    assert findings.output_error <= 1
    assert check(replace(probe, output=_heads_swapped(of)), numbers(), most_scores=1).rows == HEADS
