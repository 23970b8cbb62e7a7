"""The passes of `cpu.path=fused`: what they fuse, what they must leave, and that the graph computes what it did."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from pipeline.backends.cpu.engine import provided
from pipeline.backends.cpu.finish_with_chain import finish_with_chains
from pipeline.backends.cpu.lower import LowerCpu
from pipeline.backends.cpu.native_ports import finishes, ports_in, ports_out
from pipeline.backends.cpu.token_chain import Activation, drop_unread_outputs, is_chain
from pipeline.passes import run_shared
from tests.support import learned, native
from tests.support.portable import portable, random_linear, run

INPUTS = "float[B,S,64] x, float[B,1,64] shift, float[B,1,64] scale, float[B,1,64] gate, float[B,S,64] h"
# A block's beat: norm, modulate, linear a, gate and residual, then linear b with GELU, then linear c.
BLOCK = """
  ones = Constant <value_floats = [{ones}]> ()
  one = Constant <value_float = 1.0> ()
  norm = LayerNormalization <axis = -1, epsilon = 1e-6> (x, ones)
  plus = Add(scale, one)
  scaled = Mul(norm, plus)
  modulated = Add(scaled, shift)
  a = fpq.QuantizedLinear <layer="a"> (modulated)
  gated = Mul(gate, a)
  sum = Add(gated, h)
  b = fpq.QuantizedLinear <layer="b"> (sum)
  act = Gelu <approximate="tanh"> (b)
  c = fpq.QuantizedLinear <layer="c"> (act)
  y = Add(c, sum)
""".replace("{ones}", ", ".join(["1.0"] * 64))
SHAPES = dict.fromkeys(("norm", "modulated", "a/output", "gated", "sum", "b/output", "act", "c/output"), ("B", "S", 64))
SHAPES |= {"mean": ("B", 1, 64), "token": ("B", "S", 1)}
SHAPES |= dict.fromkeys(("qs", "ks", "vs", "turned"), ("B", "S", 4, 16)) | dict.fromkeys(
    ("qt", "vt", "o"), ("B", 4, "S", 16)
)
SHAPES |= {"kt": ("B", 4, 16, "S"), "joined": ("B", "S", 64)}
PLAIN = 'y = fpq.QuantizedLinear <layer="a"> (x)'
# Of the largest number. Both sides have the same integer sums; what follows them rounds fewer than 16 times by 2^-24 on
# each, and has an exponential within 2^-22: 2.4e-6 together.
CLOSE = 2e-6


def lowered(
    body=BLOCK,
    inputs=INPUTS,
    outputs="float[B,S,64] y",
    activation="E2M3",
    flags=("avx512_vnni",),
    chains=False,
    **options,
):
    """(lowered model, probes of it) of linears a to d of 64 channels."""
    layers = [random_linear(name, n=64, activation=activation, seed=i, **options) for i, name in enumerate("abcd")]
    layers = [layer for layer in layers if f'"{layer.name}"' in body]
    model = portable(body, layers, inputs, outputs)
    _as_exported(model)
    run_shared(model)
    rewrite = LowerCpu(provided(flags), chains)
    rewrite(model)
    return model, rewrite.probes


def _as_exported(model):
    """Constants as initializers and shapes known, as in an exporter's graph."""
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for value in (value for node in model.graph for value in node.outputs):
        if value.name in SHAPES:
            value.shape = ir.Shape(SHAPES[value.name])


def rewritten(*args, **options):
    """(fused model, passes by name)."""
    model, _ = lowered(*args, chains=True, **options)
    return model, {type(rewrite).__name__: rewrite for rewrite in finish_with_chains(model)}


OF_THE_GEMM = {"CODES", "LOW_CODES", "WEIGHT", "MULTIPLIERS", "TABLE", "SCALE", "WEIGHT_SUM"}


def stages(model):
    """(inputs of stages, outputs) of every chain and packed GEMM by name, in graph order."""
    nodes = [node for node in model.graph if is_chain(node) or node.op_type == "PackedGemm"]
    given = [[port for port in ports_in(node) if port not in OF_THE_GEMM] for node in nodes]
    return [("+".join(ports), "+".join(ports_out(node))) for ports, node in zip(given, nodes, strict=True)]


def activations(model):
    """By layer; by its own name where a linear leaves the graph."""
    nodes = [node for node in model.graph if finishes(node)]
    return {ports_out(node)["LINEAR"].name.split("/")[0]: node.attributes["activation"].value for node in nodes}


def feeds(seed=0, batch=2, tokens=5):
    rng = np.random.default_rng(seed)
    each = dict.fromkeys(("shift", "scale", "gate"), (batch, 1, 64)) | dict.fromkeys("xh", (batch, tokens, 64))
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in each.items()}


def with_outputs(model, names):
    for node in model.graph:
        model.graph.outputs.extend(value for value in node.outputs if value.name in names)
    return model


def test_a_block_becomes_a_quantizer_and_three_gemms_that_quantize_their_rows():
    model, passes = rewritten()
    assert stages(model) == [
        ("X+NORM_SCALE+NORM_SHIFT", "CODES+SCALE+QUANTIZED"),
        ("TOKEN_SCALE+BIAS+GATE+RESIDUAL", "PRODUCT+LINEAR+Y+CODES+SCALE"),
        ("TOKEN_SCALE+BIAS", "PRODUCT+LINEAR+Y+CODES+SCALE"),
        ("TOKEN_SCALE+BIAS+RESIDUAL", "PRODUCT+LINEAR+Y"),
    ]
    types = Counter(node.op_type for node in model.graph)
    assert types == {"TokenChain": 1, "PackedGemm": 3, "Add": 1}
    assert activations(model) == {"a": Activation.NONE, "b": Activation.GELU, "c": Activation.NONE}
    assert model.graph.opset_imports["fpq.native"] == 1
    assert not any(rewrite.refusals for rewrite in passes.values())


@pytest.mark.kernels
def test_what_no_one_reads_is_not_computed_in_an_engine():
    model, _ = rewritten()
    expected = native.run(model, feeds())[0]
    drop_unread_outputs(model)
    assert [outputs for _, outputs in stages(model)] == ["CODES+SCALE", "Y+CODES+SCALE", "CODES+SCALE", "Y"]
    np.testing.assert_array_equal(native.run(model, feeds())[0], expected)


PAIRS = [("E2M3", "E2M1"), ("INT8", "INT4"), ("INT6", "INT6"), ("E2M1", "E2M1"), ("E3M4", "E2M1"), ("E3M2", "E2M1")]


GROUPS = {"granularity": "group", "group": 16}
# Of two limbs the kernel library joins the integers of a group before it scales them, stock ops after it: the last bit
# differs (tests/kernels/test_native_packed_gemm.py has the library's order).
ONE_LIMB = [pair for pair in PAIRS if pair[0] not in ("E3M4", "E3M2")]


@pytest.mark.kernels
@pytest.mark.parametrize(
    "activation, weight, groups", [(*pair, {}) for pair in PAIRS] + [(*pair, GROUPS) for pair in ONE_LIMB], ids=str
)
def test_every_probed_tensor_is_that_of_the_stock_graph(activation, weight, groups):
    """Bit for bit, but for the norm and GELU, which each sum in their own order: their codes follow from their x."""
    stock, probes = lowered(activation=activation, weight=weight, **groups)
    model, _ = rewritten(activation=activation, weight=weight, **groups)
    for row in probes:
        names = [row.x, *row.codes, row.act_scale, row.gemm, row.output]
        tensors = dict(zip(names, native.run(with_outputs(model, names), feeds(), names), strict=True))
        alone = dict(
            zip(names, run(with_outputs(_cut(stock, row), names), _cut_feeds(row, tensors), names), strict=True)
        )
        for name in names:
            np.testing.assert_array_equal(tensors[name], alone[name], err_msg=name)


def _cut(stock, row):
    """The stock graph from the quantizer's x on: x becomes an input."""
    model = stock.clone()
    value = next(value for node in model.graph for value in node.outputs if value.name == row.x)
    start = ir.Value(name="start", type=ir.TensorType(ir.DataType.FLOAT))
    same = ir.Node("", "Identity", [start])
    ir.convenience.replace_all_uses_with(value, same.outputs[0])
    value.name, same.outputs[0].name = "unused", row.x
    model.graph.insert_before(model.graph[0], same)
    model.graph.inputs.append(start)
    model.graph.outputs.clear()
    return model


def _cut_feeds(row, tensors):
    return feeds() | {"start": tensors[row.x]}


@pytest.mark.kernels
def test_norm_and_gelu_are_those_of_onnxruntime_up_to_roundings():
    stock, _ = lowered()
    model, _ = rewritten()
    names = ["a/quantize/modulated"]
    expected = run(with_outputs(stock, names), feeds(), names)[0]
    modulated = native.run(with_outputs(model, names), feeds(), names)[0]
    np.testing.assert_allclose(modulated, expected, rtol=0, atol=CLOSE * np.abs(expected).max())


BALANCED = BLOCK.replace(
    "  c = ",
    f"  balance = Constant <value_floats = [{', '.join(['0.5'] * 64)}]> ()\n  half = Mul(act, balance)\n  c = ",
).replace("(act)", "(half)")
OF_TOKENS = BLOCK.replace(
    "  gated = Mul(gate, a)",
    "  axes = Constant <value_ints = [2]> ()\n  token = ReduceMean <keepdims = 1> (h, axes)\n  gated = Mul(token, a)",
)
NEVER = {
    "a balance is no gate": (BALANCED, {"b": "BIAS"}, ["Mul"]),
    "another GELU": (BLOCK.replace("tanh", "none"), {"a": "RESIDUAL", "b": "BIAS", "c": "RESIDUAL"}, ["Gelu"]),
    "a second reader": (BLOCK + "\n  z = Neg(b)", {"b": "BIAS"}, ["Gelu", "Neg"]),
    "a gate of one number a token": (OF_TOKENS, {"a": "BIAS"}, ["Mul", "Add"]),
    "a broadcast residual": (BLOCK.replace("Add(gated, h)", "Add(gated, shift)"), {"a": "GATE"}, ["Add"]),
}


@pytest.mark.kernels
@pytest.mark.parametrize("case", NEVER)
def test_what_is_not_the_pattern_stays(case):
    body, last_input, kept = NEVER[case]
    outputs = "float[B,S,64] y" + (", float[B,S,64] z" if "z =" in body else "")
    model, _ = rewritten(body, outputs=outputs)
    by_layer = {ports_out(node)["LINEAR"].name.split("/")[0]: node for node in model.graph if finishes(node)}
    for layer, port in last_input.items():
        assert list(ports_in(by_layer[layer]))[-1] == port, layer
    assert set(kept) <= {node.op_type for node in model.graph}
    stock = run(lowered(body, outputs=outputs)[0], feeds())[0]
    assert np.linalg.norm(native.run(model, feeds())[0] - stock) <= 1e-2 * np.linalg.norm(stock)


# As causal language models have it: what a linear makes of x, through SiLU, is a gate for what another one makes of it.
GATED = """
  a = fpq.QuantizedLinear <layer="a"> (x)
  s = Sigmoid(a)
  act = Mul(a, s)
  b = fpq.QuantizedLinear <layer="b"> (x)
  gated = Mul(act, b)
  y = fpq.QuantizedLinear <layer="c"> (gated)
"""


@pytest.mark.kernels
@pytest.mark.parametrize(
    "body, activation",
    [
        (GATED, Activation.SILU),
        (GATED.replace("Mul(a, s)", "Mul(s, a)").replace("Mul(act, b)", "Mul(b, act)"), Activation.SILU),
        (
            GATED.replace("  s = Sigmoid(a)\n", "").replace("Mul(a, s)", 'Gelu <approximate="tanh"> (a)'),
            Activation.GELU,
        ),
        (GATED.replace("  s = Sigmoid(a)\n  act = Mul(a, s)\n", "").replace("act", "a"), Activation.NONE),
    ],
    ids=["silu", "silu, turned round", "gelu", "none"],
)
def test_what_is_gated_by_another_linear_is_finished_and_quantized_in_its_gemm(body, activation):
    model, passes = rewritten(body, "float[B,S,64] x")
    assert Counter(stages(model)) == {
        ("X", "CODES+SCALE"): 1,
        ("TOKEN_SCALE+BIAS", "PRODUCT+LINEAR"): 2,  # b, which the gate is, and c
        ("TOKEN_SCALE+BIAS+GATE", "PRODUCT+LINEAR+Y+CODES+SCALE"): 1,
    }
    assert Counter(node.op_type for node in model.graph) == {"TokenChain": 1, "PackedGemm": 3}
    assert activations(model) == {"a": activation, "b": Activation.NONE, "y": Activation.NONE}
    assert not any(rewrite.refusals for rewrite in passes.values())
    x, names = {"x": feeds()["x"]}, ["gated"]
    expected = run(with_outputs(lowered(body, "float[B,S,64] x")[0], names), x, names)[0]
    gated = native.run(with_outputs(model, names), x, names)[0]
    np.testing.assert_allclose(gated, expected, rtol=0, atol=CLOSE * np.abs(expected).max())


@pytest.mark.kernels
def test_where_the_gate_is_made_first_it_is_multiplied_there():
    first, rest = GATED.split('  b = fpq.QuantizedLinear <layer="b"> (x)\n')
    body = '  b = fpq.QuantizedLinear <layer="b"> (x)' + first + rest
    model, _ = rewritten(body, "float[B,S,64] x")
    assert [given for given, _ in stages(model)].count("TOKEN_SCALE+BIAS+GATE") == 1
    assert Counter(node.op_type for node in model.graph) == {"TokenChain": 1, "PackedGemm": 3}
    assert activations(model) == {"a": Activation.SILU, "b": Activation.NONE, "y": Activation.NONE}
    x = {"x": feeds()["x"]}
    np.testing.assert_array_equal(native.run(model, x)[0], native.run(rewritten(GATED, "float[B,S,64] x")[0], x)[0])


@pytest.mark.kernels
def test_silu_behind_a_gemm_of_stock_ops_is_of_its_chain():
    groups = {"granularity": "group", "group": 4}  # no multiple of 8
    model, _ = rewritten(GATED, "float[B,S,64] x", **groups)
    assert ("X+TOKEN_SCALE+BIAS+GATE", "CODES+SCALE+Y+LINEAR") in stages(model)
    assert activations(model) == {"a": Activation.SILU, "b": Activation.NONE, "y": Activation.NONE}
    assert not {"Sigmoid", "Mul"} & {node.op_type for node in model.graph}
    x, names = {"x": feeds()["x"]}, ["gated"]
    expected = run(with_outputs(lowered(GATED, "float[B,S,64] x", **groups)[0], names), x, names)[0]
    gated = native.run(with_outputs(model, names), x, names)[0]
    np.testing.assert_allclose(gated, expected, rtol=0, atol=CLOSE * np.abs(expected).max())


NO_SILU = {
    "the sigmoid of something else": GATED.replace("Sigmoid(a)", "Sigmoid(x)"),
    "the sigmoid times something else": GATED.replace("Mul(a, s)", "Mul(x, s)"),
    "a sigmoid alone": GATED.replace("Mul(a, s)", "Neg(s)"),
    "a sigmoid that others read": GATED + "  z = Neg(s)\n",
    "a linear that others read": GATED + "  z = Neg(a)\n",
    "the square of the sigmoid": GATED.replace("Mul(a, s)", "Mul(s, s)"),
}


@pytest.mark.kernels
@pytest.mark.parametrize("case", NO_SILU)
def test_what_is_not_silu_stays(case):
    body = NO_SILU[case]
    outputs = "float[B,S,64] y" + (", float[B,S,64] z" if "z =" in body else "")
    model, _ = rewritten(body, "float[B,S,64] x", outputs)
    assert set(activations(model).values()) == {Activation.NONE}
    assert "Sigmoid" in {node.op_type for node in model.graph}
    x = {"x": feeds()["x"]}
    stock = run(lowered(body, "float[B,S,64] x", outputs)[0], x)[0]
    assert np.linalg.norm(native.run(model, x)[0] - stock) <= 1e-2 * np.linalg.norm(stock)


@pytest.mark.parametrize("outputs", ["a", "s"])
def test_what_leaves_the_graph_within_silu_keeps_it(outputs):
    model, _ = lowered(GATED, "float[B,S,64] x", chains=True)
    name = {"a": "a/output"}.get(outputs, outputs)
    with_outputs(model, [name])
    finish_with_chains(model)
    assert activations(model)["a"] == Activation.NONE
    assert "Sigmoid" in {node.op_type for node in model.graph}


@pytest.mark.parametrize("weight", ["E2M1", "E2M3", "INT8"])
def test_two_limbs_are_one_gemm(weight):
    model, passes = rewritten(activation="E3M4", weight=weight, flags=())
    types = Counter(node.op_type for node in model.graph)
    assert types == {"TokenChain": 1, "PackedGemm": 3, "Add": 1}
    assert stages(model) == [
        ("X+NORM_SCALE+NORM_SHIFT", "CODES+SCALE+QUANTIZED+LOW_CODES"),
        ("TOKEN_SCALE+BIAS+GATE+RESIDUAL", "PRODUCT+LINEAR+Y+CODES+SCALE+LOW_CODES"),
        ("TOKEN_SCALE+BIAS", "PRODUCT+LINEAR+Y+CODES+SCALE+LOW_CODES"),
        ("TOKEN_SCALE+BIAS+RESIDUAL", "PRODUCT+LINEAR+Y"),
    ]
    assert not any(rewrite.refusals for rewrite in passes.values())


STOCK_SUMS = ("X+TOKEN_SCALE+BIAS", "LINEAR")


@pytest.mark.parametrize(
    "group, gemms, finish",
    [
        (32, {"PackedGemm": 1}, ("TOKEN_SCALE+BIAS", "PRODUCT+INTEGER_SUMS+LINEAR")),
        (4, {"MatMulIntegerToFloat": 16, "Sum": 1}, STOCK_SUMS),
    ],
)
@pytest.mark.parametrize("weight", ["E2M1", "E2M3"])
def test_real_groups_are_finished_behind_the_sum_of_their_products(weight, group, gemms, finish):
    model, _ = rewritten(PLAIN, "float[B,S,64] x", weight=weight, granularity="group", group=group)
    assert stages(model) == [("X", "CODES+SCALE"), finish]
    types = Counter(node.op_type for node in model.graph)
    assert gemms.items() <= types.items()


@pytest.mark.kernels
def test_groups_of_tokens_are_scaled_before_they_are_added_up():
    layer = learned.with_scaling(random_linear("a", n=64, granularity="group", group=32), "token_group", 32)
    models = []
    for with_chains in (True, False):
        model = portable(PLAIN, [layer], "float[B,S,64] x", "float[B,S,64] y")
        run_shared(model)
        rewrite = LowerCpu(provided(("avx512_vnni",)), chains=with_chains)
        rewrite(model)
        assert rewrite.probes[0].exact and rewrite.probes[0].gemm_groups == 2
        models.append(model)
    finish_with_chains(models[0])
    drop_unread_outputs(models[0])
    assert stages(models[0]) == [("X", "CODES+SCALE"), ("GROUP_SCALE+BIAS", "LINEAR")]
    x = {"x": feeds()["x"]}
    stock = run(models[1], x)[0]
    np.testing.assert_allclose(native.run(models[0], x)[0], stock, rtol=1e-5, atol=1e-5 * np.abs(stock).max())


@pytest.mark.kernels
def test_a_linear_with_a_static_scale_is_finished_by_its_gemm():
    body = 'a = fpq.QuantizedLinear <layer="a"> (x)\n  gated = Mul(gate, a)\n  y = Add(gated, h)'
    inputs = "float[B,S,64] x, float[B,1,64] gate, float[B,S,64] h"
    layer, results = learned.with_scaling(random_linear("a", n=64), "per_tensor"), []
    for with_chains in (True, False):
        model = portable(body, [layer], inputs, "float[B,S,64] y")
        _as_exported(model)
        run_shared(model)
        LowerCpu(provided(("avx512_vnni",)), chains=with_chains)(model)
        if with_chains:
            finish_with_chains(model)
            assert stages(model) == [("BIAS+GATE+RESIDUAL", "PRODUCT+LINEAR+Y")]
            assert model.graph.outputs[0].producer().op_type == "PackedGemm"
        results.append(native.run(model, {name: feeds()[name] for name in ("x", "gate", "h")})[0])
    np.testing.assert_array_equal(*results)


NORM = """
  w = Constant <value_floats = [{w}]> ()
  norm = LayerNormalization <axis = -1, epsilon = 1e-5> (x, w{bias})
  y = fpq.QuantizedLinear <layer="a"> (norm)
""".replace("{w}", ", ".join(f"{1 + i / 64}" for i in range(64)))


@pytest.mark.kernels
def test_a_plain_norm_with_weight_and_bias_is_fused():
    model, _ = rewritten(NORM.replace("{bias}", ", w"), "float[B,S,64] x")
    assert stages(model)[0] == ("X+NORM_SCALE+NORM_SHIFT", "CODES+SCALE+QUANTIZED")
    assert np.isfinite(native.run(model, {"x": feeds()["x"]})[0]).all()


@pytest.mark.parametrize(
    "body, outputs, reason",
    [
        (NORM.replace("{bias}", ""), "float[B,S,64] y", "no shift"),
        (NORM.replace("{bias}", ", w").replace("axis = -1", "axis = 1"), "float[B,S,64] y", "axis 1"),
        (NORM.replace("{bias}", ", w") + "\n z = Neg(norm)", "float[B,S,64] y, float[B,S,64] z", "another reader"),
        (NORM.replace("{bias}", ", x"), "float[B,S,64] y", "neither"),
    ],
)
def test_other_norms_are_refused_with_the_reason(body, outputs, reason):
    model, passes = rewritten(body, "float[B,S,64] x", outputs)
    assert reason in " ".join(refusal.reason for refusal in passes["JoinChains"].refusals)
    assert "LayerNormalization" in {node.op_type for node in model.graph}


def test_a_norm_that_depends_on_the_linear_before_it_is_not_joined_to_it():
    body = """
      a = fpq.QuantizedLinear <layer="a"> (x)
      axes = Constant <value_ints = [1]> ()
      mean = ReduceMean <keepdims = 1> (a, axes)
      norm = LayerNormalization <axis = -1> (a, mean, mean)
      y = fpq.QuantizedLinear <layer="b"> (norm)
    """  # of groups that are no multiple of 8, which stock ops multiply
    model, passes = rewritten(body, "float[B,S,64] x", granularity="group", group=4)
    assert "depends on" in " ".join(refusal.reason for refusal in passes["JoinChains"].refusals)
    assert [inputs for inputs, _ in stages(model)].count("X+NORM_SCALE+NORM_SHIFT") == 1


def test_a_norm_that_depends_on_the_rows_of_its_gemm_is_not_taken_in():
    body = """
      a = fpq.QuantizedLinear <layer="a"> (x)
      axes = Constant <value_ints = [1]> ()
      mean = ReduceMean <keepdims = 1> (a, axes)
      norm = LayerNormalization <axis = -1> (a, mean, mean)
      y = fpq.QuantizedLinear <layer="b"> (norm)
    """
    model, passes = rewritten(body, "float[B,S,64] x")
    assert "depends on" in " ".join(refusal.reason for refusal in passes["QuantizeInGemm"].refusals)
    assert [inputs for inputs, _ in stages(model)].count("X+NORM_SCALE+NORM_SHIFT") == 1


def test_rows_are_quantized_for_one_reader():
    body = """
      a = fpq.QuantizedLinear <layer="a"> (x)
      b = fpq.QuantizedLinear <layer="b"> (a)
      norm = LayerNormalization <axis = -1> (a, w, w)
      c = fpq.QuantizedLinear <layer="c"> (norm)
      y = Add(b, c)
    """
    weight = NORM.split("norm =")[0]
    model, passes = rewritten(weight + body, "float[B,S,64] x")
    assert len(passes["QuantizeInGemm"].refusals) == 1
    assert sum(outputs.endswith("CODES+SCALE") for _, outputs in stages(model) if "LINEAR" in outputs) == 1
    assert np.isfinite(native.run(model, {"x": feeds()["x"]})[0]).all()


def test_the_rewritten_graph_is_the_same_each_time():
    first, second = (ir.to_proto(rewritten()[0]).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


ATTENTION = """
  parts = Constant <value_ints = [0, 0, 4, 16]> ()
  whole = Constant <value_ints = [0, 0, 64]> ()
  q = fpq.QuantizedLinear <layer="a"> (x)
  k = fpq.QuantizedLinear <layer="b"> (x)
  v = fpq.QuantizedLinear <layer="c"> (x)
  qs = Reshape(q, parts)
  qt = Transpose <perm = [0, 2, 1, 3]> (qs)
  ks = Reshape(k, parts)
  kt = Transpose <perm = [0, 2, 3, 1]> (ks)
  vs = Reshape(v, parts)
  vt = Transpose <perm = [0, 2, 1, 3]> (vs)
  s = MatMul(qt, kt)
  p = Softmax <axis = -1> (s)
  o = MatMul(p, vt)
  turned = Transpose <perm = [0, 2, 1, 3]> (o)
  joined = Reshape(turned, whole)
  y = fpq.QuantizedLinear <layer="d"> (joined)
"""


TURN = "kt = Transpose <perm = [0, 1, 3, 2]> (k)\n"
MASKED = "s = MatMul(q, kt)\n a = Add(s, m)\n p = Softmax(a)\n y = MatMul(p, v)"
OTHER_RANK = "c = Constant <value = float[1,1,1,1,1] {0.5}> ()\n x = Mul(q, c)\n"
UNLIKE = "its operands differ in batch, heads or channels"


@pytest.mark.parametrize(
    "q, k, v, m, y, body, reason",
    [
        ("[B,3,S,8]", "[B,3,T,8]", "[B,3,T,8]", "[S,1]", "[B,3,S,8]", TURN + MASKED, None),
        ("[B,3,S,8]", "[B,3,T,8]", "[B,3,T,8]", "", "[B,3,S,8]", TURN + MASKED, None),
        ("[B,3,S,8]", "[T,8,3,B]", "[B,3,T,8]", "[T]", "[B,3,S,8]", "kt = Transpose(k)\n" + MASKED, None),
        ("[B,3,S,8]", "[B,1,T,8]", "[B,1,T,8]", "[T]", "[B,3,S,8]", TURN + MASKED, UNLIKE),
        ("[B,3,S,8]", "[1,3,T,8]", "[1,3,T,8]", "[T]", "[B,3,S,8]", TURN + MASKED, UNLIKE),
        ("[B,3,S,8]", "[B,3,T,8]", "[B,3,T,9]", "[T]", "[B,3,S,9]", TURN + MASKED, UNLIKE),
        ("[1,3,S,8]", "[1,3,T,8]", "[1,3,T,8]", "[B,1,1,T]", "[B,3,S,8]", TURN + MASKED, "its mask is larger"),
        ("[B,3,S,8]", "[B,3,T,8]", "[B,3,T,8]", "[1,1,1,1,T]", "[1,B,3,S,8]", TURN + MASKED, "its mask is larger"),
        ("[B,3,S,8]", "[B,3,T,8]", "[B,3,T,8]", "[T]", "[1,B,3,S,8]",
         OTHER_RANK + TURN + MASKED.replace("(q,", "(x,"), "its operands are not [batch"),
    ],
)  # fmt: skip
def test_only_attentions_that_the_library_computes_become_its_op(q, k, v, m, y, body, reason):
    """The others stay in onnxruntime's own ops, which broadcast more."""
    inputs = ", ".join(f"float{shape} {name}" for name, shape in zip("qkvm", (q, k, v, m), strict=True))
    text = f'<ir_version: 10, opset_import: ["" : 21]>\ng ({inputs}) => (float{y} y) {{\n{body}\n}}'
    model = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(ir.from_onnx_text(text))))
    rng, sizes = np.random.default_rng(0), {"B": 2, "S": 5, "T": 7}
    feeds = {}
    for value in model.graph.inputs:
        shape = [size if isinstance(size, int) else sizes[size.value] for size in value.shape]
        feeds[value.name] = np.asarray(rng.standard_normal(shape), np.float32)
    before = run(model, feeds)[0]
    attention, *_ = finish_with_chains(model)
    assert attention.fired == (reason is None)
    assert [refusal.reason.startswith(reason) for refusal in attention.refusals] == ([] if reason is None else [True])
    np.testing.assert_allclose(native.run(model, feeds)[0], before, rtol=1e-5, atol=1e-6)


@pytest.mark.kernels
def test_heads_are_read_and_written_where_attention_keeps_them():
    model, passes = rewritten(ATTENTION, "float[B,S,64] x")
    assert passes["MoveHeads"].fired == 4
    assert Counter(stages(model)) == {
        ("X", "CODES+SCALE"): 1,
        ("TOKEN_SCALE+BIAS", "PRODUCT+LINEAR+Y"): 3,
        ("X", "CODES+SCALE+QUANTIZED"): 1,
        ("TOKEN_SCALE+BIAS", "PRODUCT+LINEAR"): 1,
    }
    types = Counter(node.op_type for node in model.graph)
    assert types["Attention"] == 1 and not {"Transpose", "Reshape", "Softmax", "MatMul"} & set(types)
    names = {value.name for node in model.graph for value in node.outputs}
    assert {"a/output", "b/output", "c/output", "joined"} <= names  # what the parity gates look at
    stock, _ = lowered(ATTENTION, "float[B,S,64] x")
    x = {"x": feeds()["x"]}
    np.testing.assert_allclose(native.run(model, x)[0], run(stock, x)[0], rtol=0, atol=1e-2 * np.abs(x["x"]).max())


@pytest.mark.parametrize(
    "old, new, fired",
    [
        ("perm = [0, 2, 1, 3]> (qs)", "perm = [0, 2, 1, 3]> (ks)", 2),  # keys are read twice, queries never
        ("y = fpq", "more = Neg(vs)\n  y = fpq", 3),
        ("joined = Reshape(turned, whole)", "again = Neg(turned)\n  joined = Reshape(turned, whole)", 3),
        ("perm = [0, 2, 3, 1]> (ks)\n", "perm = [0, 2, 1, 3]> (ks)\n  other = Neg(k)\n", 3),
    ],
)
def test_views_with_other_readers_stay(old, new, fired):
    body = ATTENTION.replace(old, new)
    if "perm = [0, 2, 1, 3]> (ks)\n  other" in new:
        body = body.replace("s = MatMul(qt, kt)", "kx = Transpose <perm = [0, 1, 3, 2]> (kt)\n  s = MatMul(qt, kx)")
    extra = next((name for name in ("more", "again", "other") if f"{name} =" in body), None)
    outputs = "float[B,S,64] y" + (f", float {extra}" if extra else "")
    _, passes = rewritten(body, "float[B,S,64] x", outputs)
    assert passes["MoveHeads"].fired == fired


def test_without_known_shapes_views_stay(monkeypatch):
    monkeypatch.delitem(SHAPES, "qs")
    monkeypatch.setitem(SHAPES, "turned", ("B", "T", 4, 16))
    _, passes = rewritten(ATTENTION, "float[B,S,64] x")
    assert passes["MoveHeads"].fired == 2
