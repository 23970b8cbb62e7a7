"""MatMul of decoded operands becomes PackedGemm, with its bias where that is a constant vector."""

import numpy as np
import pytest

from pipeline.passes.pack_gemm import PackGemm
from tests.support.portable import activations, op_types, portable, random_linear, run

BODY = 'y = fpq.QuantizedLinear <layer="a"> (x)'


@pytest.mark.parametrize("granularity, group", [("per_channel", 0), ("exact_group", 16), ("group", 32)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_becomes_one_gemm_with_the_same_result(granularity, group, bias):
    model = portable(BODY, [random_linear(granularity=granularity, group=group, bias=bias)])
    feeds = {"x": activations(np.random.default_rng(0))}
    before = run(model, feeds)[0]
    rewrite = PackGemm()
    assert rewrite(model).modified and rewrite.fired == 1
    assert op_types(model) == ["QuantizeActivation", "PackedGemm"]
    after = run(model, feeds)[0]
    # Both sum 64 float32 products of the same numbers in different order and scale before or after.
    slack = 2 * 64 * 2.0**-24 * np.abs(before).max(axis=-1, keepdims=True) + 1e-30
    assert (np.abs(after - before) <= slack * 10).all()


def test_layer_kind_and_names_survive():
    model = portable(BODY, [random_linear(granularity="exact_group", group=16)])
    PackGemm()(model)
    gemm = next(node for node in model.graph if node.op_type == "PackedGemm")
    assert gemm.name == "a/gemm" and gemm.attributes["layer"].value == "a"
    assert gemm.metadata_props["fpq.kind"] == "other"
    assert gemm.attributes["group_size"].value == 16
    assert [value.name for value in gemm.inputs[2:]] == ["a.codes", "a.scales", "a.multipliers", "a.bias"]


def test_a_second_run_changes_nothing():
    model = portable(BODY, [random_linear()])
    PackGemm()(model)
    assert not PackGemm()(model).modified


def test_a_float_activation_is_refused():
    model = portable(BODY, [random_linear()])
    matmul = next(node for node in model.graph if node.op_type == "MatMul")
    matmul.replace_input_with(0, model.graph.inputs[0])
    rewrite = PackGemm()
    assert not rewrite(model).modified
    assert rewrite.refusals[0].culprit == "a" and "float activation" in rewrite.refusals[0].reason


def test_a_bias_that_is_not_constant_stays_outside():
    body = 'h = fpq.QuantizedLinear <layer="a"> (x)\n y = Add(h, z)'
    model = portable(body, [random_linear(bias=False)], inputs="float[B,S,64] x, float[16] z")
    feeds = {"x": activations(np.random.default_rng(1)), "z": np.arange(16, dtype=np.float32)}
    rewrite = PackGemm()
    assert rewrite(model).modified
    assert op_types(model) == ["QuantizeActivation", "PackedGemm", "Add"]
    assert "z is not a constant vector" in rewrite.refusals[0].reason
    assert np.isfinite(run(model, feeds)[0]).all()


def test_a_product_that_is_also_an_output_keeps_its_add():
    body = 'h = fpq.QuantizedLinear <layer="a"> (x)\n y = Neg(h)'
    model = portable(body, [random_linear()])
    matmul = next(node for node in model.graph if node.op_type == "MatMul")
    model.graph.outputs.append(matmul.outputs[0])
    assert PackGemm()(model).modified
    assert op_types(model) == ["QuantizeActivation", "PackedGemm", "Add", "Neg"]


def test_a_plain_matmul_is_no_candidate():
    model = portable(BODY + "\n w = Transpose<perm=[0,2,1]>(x)\n z = MatMul(x, w)", [random_linear()])
    rewrite = PackGemm()
    rewrite(model)
    assert rewrite.fired == 1 and not rewrite.refusals
