"""LayerNorm + modulate + quantize fuse into one op, and only where that is the whole computation."""

import numpy as np
import pytest

from pipeline.passes.fuse_norm_modulate_quantize import FuseNormModulateQuantize
from tests.support.portable import op_types, portable, random_linear, run

pytestmark = pytest.mark.torch

INPUTS = "float[B,S,64] x, float[B,1,64] shift, float[B,1,64] scale"
PATTERN = """
  ones = Constant <value_floats = [{ones}]> ()
  one = Constant <value_float = 1.0> ()
  norm = LayerNormalization <axis = -1, epsilon = 1e-6> (x, ones)
  plus = Add(scale, one)
  scaled = Mul(norm, plus)
  shifted = Add(scaled, shift)
  y = fpq.QuantizedLinear <layer="a"> (shifted)
""".replace("{ones}", ", ".join(["1.0"] * 64))


def model_of(body=PATTERN, inputs=INPUTS, outputs="float[B,S,16] y"):
    return portable(body, [random_linear()], inputs, outputs)


def feeds(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"x": (2, 5, 64), "shift": (2, 1, 64), "scale": (2, 1, 64)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_the_pattern_becomes_one_op_with_the_same_codes():
    model = model_of()
    before = run(model, feeds())[0]
    rewrite = FuseNormModulateQuantize()
    assert rewrite(model).modified
    assert rewrite.fired == 1 and not rewrite.refusals
    assert "LayerNormalization" not in op_types(model) and op_types(model).count("NormModulateQuantize") == 1
    fused = next(node for node in model.graph if node.op_type == "NormModulateQuantize")
    assert fused.attributes["epsilon"].value == pytest.approx(1e-6)
    assert [value.name for value in fused.inputs] == ["x", "shift", "scale"]
    assert fused.metadata_props["fpq.layer"] == "a"
    # The function body does the very same float32 operations.
    np.testing.assert_array_equal(run(model, feeds())[0], before)


@pytest.mark.parametrize(
    "old, new",
    [
        ("Add(scale, one)", "Add(one, scale)"),
        ("Mul(norm, plus)", "Mul(plus, norm)"),
        ("Add(scaled, shift)", "Add(shift, scaled)"),
    ],
)
def test_the_order_of_operands_does_not_matter(old, new):
    assert FuseNormModulateQuantize()(model_of(PATTERN.replace(old, new))).modified


def test_one_plus_scale_may_have_other_readers():
    body = PATTERN + "\n  z = Neg(plus)"
    model = model_of(body, outputs="float[B,S,16] y, float[B,1,64] z")
    assert FuseNormModulateQuantize()(model).modified


REFUSED = {
    "affine scale": (PATTERN.replace("1.0]> ()", "2.0]> ()", 1), INPUTS, "affine scale"),
    "not one": (PATTERN.replace("value_float = 1.0", "value_float = 2.0"), INPUTS, "not 1 + scale"),
    "other axis": (PATTERN.replace("axis = -1", "axis = 1"), INPUTS, "axis 1"),
    "scale per token": (
        PATTERN,
        INPUTS.replace("float[B,1,64] scale", "float[B,S,64] scale"),
        r"scale scale has shape",
    ),
    "shift of rank 1": (PATTERN, INPUTS.replace("float[B,1,64] shift", "float[64] shift"), r"shift shift has shape"),
    "norm read elsewhere": (PATTERN + "\n z = Neg(norm)", INPUTS, "norm has another reader"),
    "modulated read elsewhere": (PATTERN + "\n z = Neg(shifted)", INPUTS, "shifted has another reader"),
    "only shifted": (PATTERN.replace("Mul(norm, plus)", "Identity(norm)"), INPUTS, None),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_must_not_fire(case):
    body, inputs, reason = REFUSED[case]
    outputs = "float[B,S,16] y" + (", float[B,S,64] z" if "z =" in body else "")
    model = model_of(body, inputs, outputs)
    rewrite = FuseNormModulateQuantize()
    assert not rewrite(model).modified
    assert "NormModulateQuantize" not in op_types(model)
    if reason:
        (refusal,) = rewrite.refusals
        assert reason in refusal.reason and refusal.culprit == "a/quantize"


def test_affine_bias_is_refused():
    body = PATTERN.replace("(x, ones)", "(x, ones, ones)")
    rewrite = FuseNormModulateQuantize()
    assert not rewrite(model_of(body)).modified
    assert "affine bias" in rewrite.refusals[0].reason


def test_norm_with_a_shift_only_is_explained():
    body = PATTERN.replace("Add(scaled, shift)", "Add(norm, shift)")
    rewrite = FuseNormModulateQuantize()
    assert not rewrite(model_of(body)).modified
    assert "not multiplied by 1 + scale" in rewrite.refusals[0].reason


def test_a_quantizer_of_something_else_is_no_candidate():
    model = portable('y = fpq.QuantizedLinear <layer="a"> (x)', [random_linear()])
    rewrite = FuseNormModulateQuantize()
    assert not rewrite(model).modified and not rewrite.refusals
