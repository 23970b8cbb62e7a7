"""Casts and transposes of stored weights are done when the file is written, everything else stays."""

import numpy as np
import onnx_ir as ir
import pytest

from pipeline.backends.cpu.fold_weights import FoldWeights
from tests.support.portable import op_types, run

pytestmark = pytest.mark.torch

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[B,3] x) => (float[B,2] y) <float16[2,3] w> { BODY }"""
BODY = "c = Cast <to = 1> (w) t = Transpose <perm = [1, 0]> (c) y = MatMul(x, t)"


def model_of(body=BODY):
    weight = ir.tensor(np.arange(6, dtype=np.float16).reshape(2, 3), name="w")
    return ir.from_onnx_text(TEXT.replace("BODY", body), initializers=[weight] if "(w)" in body else [])


def test_a_cast_and_a_transpose_of_a_weight_become_one_lazy_weight():
    model, x = model_of(), np.eye(3, dtype=np.float32)
    before = run(model, {"x": x})[0]
    rewrite = FoldWeights()
    assert rewrite(model).modified and rewrite.fired == 2
    assert op_types(model) == ["MatMul"]
    (weight,) = model.graph.initializers.values()
    assert isinstance(weight.const_value, ir.LazyTensor) and weight.name == "t" and weight.dtype == ir.DataType.FLOAT
    np.testing.assert_array_equal(run(model, {"x": x})[0], before)


def test_a_weight_with_two_readers_is_kept_for_the_other():
    model = model_of(BODY + " z = Identity(w)")
    model.graph.outputs.append(next(n for n in model.graph if n.op_type == "Identity").outputs[0])
    assert FoldWeights()(model).modified
    assert set(model.graph.initializers) == {"w", "t"}


@pytest.mark.parametrize("body", ["t = Transpose <perm = [1, 0]> (x) y = Transpose(t)", "y = Cast <to = 1> (x)"])
def test_activations_are_no_candidates(body):
    rewrite = FoldWeights()
    assert not rewrite(model_of(body)).modified and not rewrite.refusals


def test_a_graph_output_is_refused():
    model = model_of("c = Cast <to = 1> (w) y = MatMul(x, c)".replace("y = MatMul(x, c)", "y = Identity(x)"))
    cast = next(n for n in model.graph if n.op_type == "Cast")
    model.graph.outputs.append(cast.outputs[0])
    rewrite = FoldWeights()
    assert not rewrite(model).modified
    assert "output of the graph" in rewrite.refusals[0].reason
