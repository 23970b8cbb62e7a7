"""One quantizer per tensor: q, k and v share; other tensors and other formats do not."""

import numpy as np

from pipeline.passes.share_quantizers import ShareQuantizers
from tests.support.portable import activations, op_types, portable, random_linear, run

QKV = """
  q = fpq.QuantizedLinear <layer="q"> (x)
  k = fpq.QuantizedLinear <layer="k"> (x)
  v = fpq.QuantizedLinear <layer="v"> (x)
  qk = Add(q, k)
  y = Add(qk, v)
"""


def qkv(**changes):
    return [random_linear(name, seed=i, **changes) for i, name in enumerate("qkv")]


def test_readers_of_one_tensor_share_codes_and_their_decoding():
    model = portable(QKV, qkv())
    feeds = {"x": activations(np.random.default_rng(0))}
    before = run(model, feeds)
    rewrite = ShareQuantizers()
    assert rewrite(model).modified
    assert rewrite.fired == 4  # two quantizers and two decoders
    assert op_types(model).count("QuantizeActivation") == op_types(model).count("DequantizeActivation") == 1
    assert not rewrite.refusals
    np.testing.assert_array_equal(run(model, feeds)[0], before[0])


def test_a_second_run_changes_nothing():
    model = portable(QKV, qkv())
    ShareQuantizers()(model)
    assert not ShareQuantizers()(model).modified


def test_different_tensors_keep_their_quantizers():
    body = """
      h = fpq.QuantizedLinear <layer="q"> (x)
      x2 = Neg(x)
      g = fpq.QuantizedLinear <layer="k"> (x2)
      y = Add(h, g)
    """
    model = portable(body, qkv()[:2])
    assert not ShareQuantizers()(model).modified
    assert op_types(model).count("QuantizeActivation") == 2


def test_different_formats_of_one_tensor_are_refused_with_both_names():
    layers = [random_linear("q"), random_linear("k", activation="INT8"), random_linear("v", seed=2)]
    model = portable(QKV, layers)
    rewrite = ShareQuantizers()
    rewrite(model)
    assert op_types(model).count("QuantizeActivation") == 2  # v shares with q
    (refusal,) = rewrite.refusals
    assert refusal.culprit == "k/quantize"
    assert "E2M3 (q/quantize)" in refusal.reason and "INT8" in refusal.reason
