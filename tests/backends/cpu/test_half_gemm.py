"""Linears with a weight stored in float16 become HalfGemm, and nothing else does."""

import re

import numpy as np
import onnx_ir as ir
import pytest

from pipeline.backends.cpu.half_gemm import OP, HalfGemms
from tests.support import native
from tests.support.portable import op_types, run

pytestmark = pytest.mark.kernels
TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[B,3] x) => (float[B,5] y) <float16[5,3] w, float16[3,5] v, float[5] b, float[1,5] wide> { BODY }"""
LINEARS = {
    "matmul": "c = Cast <to = 1> (v) y = MatMul(x, c)",
    "gemm by output": "c = Cast <to = 1> (w) y = Gemm <transB = 1> (x, c, b)",
    "gemm": "c = Cast <to = 1> (v) y = Gemm(x, c)",
}
OTHERS = {
    "another reader": ("c = Cast <to = 1> (v) m = MatMul(x, c) n = MatMul(x, c) y = Add(m, n)", "has another reader"),
    "a factor": ("c = Cast <to = 1> (v) y = Gemm <alpha = 0.5> (x, c)", "more than x w + bias"),
    "no vector": ("c = Cast <to = 1> (v) y = Gemm(x, c, wide)", "not a number for each channel"),
    "computed": (
        "h = Cast <to = 10> (x) t = Transpose(h) c = Cast <to = 1> (t) m = MatMul(x, c) y = Expand(m, m)",
        None,
    ),
}


def model_of(body):
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(size).astype(np.float16) for name, size in (("w", (5, 3)), ("v", (3, 5)))}
    arrays |= {name: rng.standard_normal(size).astype(np.float32) for name, size in (("b", 5), ("wide", (1, 5)))}
    used = set(re.findall(r"\w+", body))
    tensors = [ir.tensor(array, name=name) for name, array in arrays.items() if name in used]
    return ir.from_onnx_text(TEXT.replace("BODY", body), initializers=tensors)


@pytest.mark.parametrize("name", LINEARS)
def test_a_linear_with_a_float16_weight_becomes_one_op(name):
    native.need_compiler()
    model, x = model_of(LINEARS[name]), np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)
    before = run(model, {"x": x})[0]
    rewrite = HalfGemms()
    assert rewrite(model).modified and rewrite.fired == 1
    assert op_types(model) == [OP]
    np.testing.assert_allclose(native.run(model, {"x": x})[0], before, rtol=0, atol=3 * 2.0**-24 * 20)


@pytest.mark.parametrize("name", OTHERS)
def test_others_stay_with_the_reason(name):
    body, reason = OTHERS[name]
    model, rewrite = model_of(body), HalfGemms()
    assert not rewrite(model).modified
    reasons = [refusal.reason for refusal in rewrite.refusals]
    assert all(reason in text for text in reasons) and bool(reasons) == (reason is not None)
