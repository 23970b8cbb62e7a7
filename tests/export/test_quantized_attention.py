"""QuantizedAttention: NumPy reference = function body in onnxruntime = onnx.reference, and the rules of its numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

from export.dialect.ops import OPS, attributes
from export.errors import ContractError, RecipeError
from export.formats.attention import MOST_CHANNELS, MOST_KEYS, WEIGHT_MAX, AttentionFormats, attention_format_names
from export.formats.format import get_format
from export.formats.operands import INT32_MAX
from tests.support.attentions import FORMATS, Operands, bound, operands
from tests.support.op_models import LEVELS, model_of, session_of

OP = "QuantizedAttention"
INT8 = AttentionFormats("INT8", "INT8")
SHAPES = ((1, 1, 1, 1, 1), (2, 3, 5, 7, 8), (3, 2, 9, 33, 72), (1, 2, 17, 130, 32))


def choices(formats: AttentionFormats, channels: int) -> dict[str, Any]:
    return {"layer": "attn", "qk_format": formats.qk, "pv_format": formats.pv, "scale": channels**-0.5}


def by_reference(given: Operands, formats: AttentionFormats = INT8) -> np.ndarray:
    (out,) = OPS[OP].numpy(*given, **attributes(OP, **choices(formats, given.q.shape[-1])))
    assert (out.dtype, out.shape) == (np.float32, given.q.shape)
    return out


def by_bodies(given: Operands, formats: AttentionFormats = INT8) -> dict[str, np.ndarray]:
    """The function body at three levels of onnxruntime and in onnx.reference."""
    model = model_of(OP, [array.shape for array in given], **choices(formats, given.q.shape[-1]))
    feed = dict(zip(OPS[OP].inputs, given, strict=True))
    runs = {level: session_of(model, level).run(None, feed)[0] for level in LEVELS}
    with np.errstate(invalid="ignore"):
        (runs["onnx.reference"],) = ReferenceEvaluator(model).run(None, feed)
    return runs


def in_floats(given: Operands) -> np.ndarray:
    """The attention that is quantized, float64."""
    q, k, v, mask = (array.astype(np.float64) for array in given)
    score = q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5 + mask
    weight = np.exp(score - score.max(axis=-1, keepdims=True))
    return weight @ v / weight.sum(axis=-1, keepdims=True)


def sqnr_db(expected: np.ndarray, actual: np.ndarray) -> float:
    return float(10 * np.log10(np.sum(expected**2) / np.sum((actual - expected) ** 2)))


@pytest.mark.parametrize("mask", ["none", "penalty", "infinite", "partial"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_body_is_the_reference(shape: tuple[int, ...], mask: str) -> None:
    given = operands(*shape, mask=mask)
    expected, limit = by_reference(given), bound(given, INT8, shape[-1] ** -0.5)
    assert limit.undecided < 1e-3, "the bound would forgive anything"
    for where, out in by_bodies(given).items():
        assert (np.abs(out - expected) <= limit.error).all(), where


@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_every_kind_of_format(formats: AttentionFormats) -> None:
    given = operands(2, 2, 11, 19, 24, mask="penalty", seed=1)
    expected, limit = by_reference(given, formats), bound(given, formats, 24**-0.5)
    for where, out in by_bodies(given, formats).items():
        assert (np.abs(out - expected) <= limit.error).all(), where


def test_an_offset_of_each_channel_of_k_costs_nothing() -> None:
    """It adds the same to all scores of a query. Left in, it would take the codes that tokens differ by."""
    given = operands(2, 2, 32, 64, 72)
    given.k[:] = np.round(given.k * 64) / 64  # means of 64 such numbers are float32, also beside 512
    assert sqnr_db(in_floats(given), by_reference(given)) > 30
    shifted = Operands(given.q, given.k + np.float32(512), given.v, given.mask)
    np.testing.assert_array_equal(by_reference(shifted), by_reference(given))


def test_many_keys_of_equal_weight_keep_their_weight() -> None:
    """Codes of the exponentials: however many keys share a row, none rounds to zero as codes of the softmax would."""
    given = operands(1, 1, 3, 2048, 8)
    given.q[:] = 0
    mean = given.v.mean(axis=-2, keepdims=True)
    step = np.abs(given.v).max(axis=-2, keepdims=True) / 127
    assert (np.abs(by_reference(given) - mean) <= step / 2).all()


def test_sums_over_keys_are_exact_where_float32_is_not() -> None:
    """255 * 127 * 1024 is more than 2^24; the other half is small and opposite, and its last unit counts."""
    keys = 1025
    q, k = np.zeros((1, 1, 1, 4), np.float32), np.zeros((1, 1, keys, 4), np.float32)
    v = np.full((1, 1, keys, 4), 127, np.float32)
    v[..., -1, :] = np.arange(1, 5)
    given = Operands(q, k, v, np.zeros((1, 1, 1, 1), np.float32))
    total = 255 * (127 * (keys - 1) + np.arange(1, 5, dtype=np.int64))
    expected = (total.astype(np.float32) / np.float32(255 * keys)).reshape(1, 1, 1, 4)
    np.testing.assert_array_equal(by_reference(given), expected)
    for where, out in by_bodies(given).items():
        np.testing.assert_array_equal(out, expected, err_msg=where)


# --- NaN and Inf -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_what_a_broken_number_touches_is_nan_and_nothing_else(name: str, bad: float) -> None:
    given = operands(2, 2, 5, 6, 8)
    healthy = by_reference(given)
    getattr(given, name)[1, 0, 2, 3] = bad
    broken = np.zeros(healthy.shape, bool)
    broken[{"q": np.s_[1, 0, 2], "k": np.s_[1, 0], "v": np.s_[1, 0, :, 3]}[name]] = True
    for where, out in {"reference": by_reference(given), **by_bodies(given)}.items():
        np.testing.assert_array_equal(np.isnan(out), broken, err_msg=where)
        np.testing.assert_allclose(out[~broken], healthy[~broken], atol=0.05, err_msg=where)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_sees_no_key_or_a_broken_mask_is_nan(bad: float) -> None:
    given = operands(1, 2, 4, 5, 8, mask="partial")
    given.mask[0, 0, 1] = -np.inf
    given.mask[0, 0, 3, 4] = bad
    for where, out in {"reference": by_reference(given), **by_bodies(given)}.items():
        assert np.isnan(out[:, :, [1, 3]]).all() and np.isfinite(out[:, :, [0, 2]]).all(), where


def test_zeros_and_tiny_numbers_have_scales() -> None:
    given = operands(1, 1, 3, 4, 8)
    for array in (given.q, given.k, given.v):
        array[:] = 0
    given.v[..., 1] = 1e-35
    for where, out in {"reference": by_reference(given), **by_bodies(given)}.items():
        np.testing.assert_array_equal(out, np.zeros_like(out), err_msg=where)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_limits_are_what_the_sums_hold() -> None:
    kmax = max(get_format(name).kmax for name in attention_format_names())
    assert WEIGHT_MAX * kmax * MOST_KEYS <= INT32_MAX and WEIGHT_MAX * MOST_KEYS <= 2**24
    assert kmax**2 * MOST_CHANNELS <= 2**24 < kmax**2 * (MOST_CHANNELS + 1)
    assert attention_format_names() == ("E2M1", "E1M2", "E3M0", "E2M3", "INT4", "INT6", "INT8")


@pytest.mark.parametrize(
    ("keys", "channels", "words"),
    [
        (0, 8, "attn: quantized attention over 0 keys, but 1 to 65793 add up exactly"),
        (MOST_KEYS + 1, 1, "over 65794 keys"),
        (1, MOST_CHANNELS + 1, "over 1041 channels, but 1 to 1040 add up exactly; leave attention.qk"),
    ],
)
def test_sizes_whose_sums_would_round_are_refused(keys: int, channels: int, words: str) -> None:
    q, k = np.zeros((1, 1, 1, channels), np.float32), np.zeros((1, 1, keys, channels), np.float32)
    with pytest.raises(ContractError, match=words):
        by_reference(Operands(q, k, k, np.zeros((1, 1, 1, 1), np.float32)))


@pytest.mark.parametrize(("qk", "pv"), [("E3M2", "INT8"), ("INT8", "UE2M2"), ("INT9", "INT8")])
def test_formats_that_are_no_bytes_are_refused(qk: str, pv: str) -> None:
    with pytest.raises(RecipeError, match="use one of E2M1, "):
        attributes(OP, layer="attn", qk_format=qk, pv_format=pv, scale=1.0)
