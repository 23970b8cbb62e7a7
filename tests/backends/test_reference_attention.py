"""Quantized attention in PyTorch: the numbers of the op, in float32 and in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from export.dialect.ops import OPS, attributes
from export.formats.attention import AttentionFormats
from export.models import load as models
from pipeline.backends import reference
from pipeline.backends.reference import ReferenceEngine, fake_quant, quantized_attention
from tests.support import tiny
from tests.support.attentions import FORMATS, Operands, agreeing, bound, operands

INT8 = AttentionFormats("INT8", "INT8")
DTYPES = (torch.float32, torch.float64)


def in_numpy(given: Operands, formats: AttentionFormats, scale: float) -> np.ndarray:
    choices = {"layer": "attn", "qk_format": formats.qk, "pv_format": formats.pv, "scale": scale}
    return np.asarray(OPS["QuantizedAttention"].numpy(*given, **attributes("QuantizedAttention", **choices))[0])


def in_torch(
    given: Operands, formats: AttentionFormats, scale: float, dtype: torch.dtype, centre: bool = True
) -> np.ndarray:
    q, k, v, mask = (torch.from_numpy(array).to(dtype) for array in given)
    out = quantized_attention(formats, q, k, v, mask, scale, centre)
    assert (out.dtype, out.shape) == (dtype, q.shape)
    return out.numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["none", "penalty", "infinite", "partial"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 3, 5, 7, 8), (3, 2, 9, 33, 72)], ids=str)
def test_the_numbers_are_the_ops(shape: tuple[int, ...], mask: str, dtype: torch.dtype) -> None:
    given, scale = agreeing(*shape, formats=INT8, mask=mask), shape[-1] ** -0.5
    limit = bound(given, INT8, scale)
    assert (np.abs(in_torch(given, INT8, scale, dtype) - in_numpy(given, INT8, scale)) <= limit.error).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_every_kind_of_format(formats: AttentionFormats, dtype: torch.dtype) -> None:
    given, scale = agreeing(2, 2, 11, 19, 24, formats=formats, mask="penalty"), 24**-0.5
    limit = bound(given, formats, scale)
    assert (np.abs(in_torch(given, formats, scale, dtype) - in_numpy(given, formats, scale)) <= limit.error).all()


@pytest.mark.parametrize("queries", [1, 4])
def test_few_queries_at_a_time_give_the_same(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given, scale = operands(2, 3, 9, 33, 72, mask="partial"), 72**-0.5
    whole = in_torch(given, INT8, scale, torch.float32)
    monkeypatch.setattr(reference, "SCORES_AT_ONCE", queries * 33)
    np.testing.assert_array_equal(in_torch(given, INT8, scale, torch.float32), whole)


def test_no_mask_is_a_mask_of_zeros() -> None:
    q, k, v, mask = map(torch.from_numpy, operands(2, 2, 5, 7, 8))
    assert torch.equal(quantized_attention(INT8, q, k, v, None, 0.5), quantized_attention(INT8, q, k, v, mask, 0.5))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "mask"])
def test_broken_numbers_spoil_what_they_spoil_in_the_op(name: str, bad: float) -> None:
    given = operands(1, 2, 5, 6, 8, mask="partial")
    getattr(given, name)[0, 0, 2, 3] = bad
    expected = np.isnan(in_numpy(given, INT8, 0.5))
    assert expected.any() and not expected.all()
    for dtype in DTYPES:
        np.testing.assert_array_equal(np.isnan(in_torch(given, INT8, 0.5, dtype)), expected)


def test_the_mean_of_k_is_left_in_for_studies_alone() -> None:
    given, scale = operands(1, 2, 16, 64, 72), 72**-0.5
    q, k, v, _ = (torch.from_numpy(array).double() for array in given)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v).numpy()
    errors = [np.linalg.norm(in_torch(given, INT8, scale, torch.float64, centre) - exact) for centre in (True, False)]
    assert errors[0] < 0.7 * errors[1]


def test_a_model_computes_its_attentions_so(tmp_path_factory: pytest.TempPathFactory) -> None:
    """And shares them with no other module made of the same model."""
    model = models.load(str(tiny.folder("pixart", tmp_path_factory.mktemp("model"))))
    layers, inputs = tiny.quantized(model), models.sample_inputs(model, 2, 0, tokens=5)
    plain, quantized, again = (
        ReferenceEngine(fake_quant(model, layers, torch.float64, formats).double(), torch.float64).run(inputs)["sample"]
        for formats in (None, INT8, None)
    )
    np.testing.assert_array_equal(plain, again)
    difference = np.linalg.norm(quantized - plain) / np.linalg.norm(plain)
    assert 1e-5 < difference < 0.1
