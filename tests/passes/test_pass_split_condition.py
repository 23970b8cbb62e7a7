"""What depends on the condition alone leaves the step; sizes shared by both parts do not hold it back."""

import numpy as np
import onnx_ir as ir
import pytest

from export.dialect.graph import GraphBuilder, add_functions
from pipeline.backends.cpu.quantized_attention import UseQuantizedAttention
from pipeline.backends.cpu.token_chain import VERSION
from pipeline.backends.sizes import evaluated
from pipeline.passes.split_condition import split_condition, split_timestep
from plugins.cpu import library
from plugins.cpu.attention_operands import head_bytes
from tests.support import native
from tests.support.portable import op_types, run

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
INPUTS = "float[batch,4] hidden_states, float[batch] timestep, float[batch,tokens,4] text"
TEXT = f"""{HEADER} g ({INPUTS}) => (float[batch,4] y)
<float[4,4] w = {{1.0, 0.0, 0.0, 0.5, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 1.0, 0.0, 4.0}}> {{
  batch = Shape <start = 0, end = 1> (timestep)
  rest = Constant <value_ints = [-1, 4]> ()
  shape = Concat <axis = 0> (batch, rest)
  rows = Reshape(text, shape)
  keys = MatMul(rows, w)
  first = Constant <value_int = 0> ()
  key = Gather <axis = 1> (keys, first)
  queries = MatMul(hidden_states, w)
  mixed = Mul(queries, key)
  back = Reshape(mixed, shape)
  flat = Gather <axis = 1> (back, first)
  y = Add(mixed, flat)
}}"""


def feeds(batch=3):
    rng = np.random.default_rng(batch)
    shapes = {"hidden_states": (batch, 4), "timestep": (batch,), "text": (batch, 5, 4)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_both_parts_together_compute_the_whole():
    model = ir.from_onnx_text(TEXT)
    split = split_condition(model)
    assert [value.name for value in split.condition.graph.inputs] == ["text"]
    assert [value.name for value in split.condition.graph.outputs] == ["key"]
    assert [value.name for value in split.step.graph.inputs] == ["hidden_states", "timestep", "key"]
    assert op_types(split.condition).count("MatMul") == op_types(split.step).count("MatMul") == 1
    values = feeds()
    (key,) = run(split.condition, {"text": values.pop("text")})
    np.testing.assert_array_equal(run(split.step, {**values, "key": key})[0], run(model, feeds())[0])


def test_the_whole_graph_is_not_changed():
    model = ir.from_onnx_text(TEXT)
    before = ir.to_proto(model).SerializeToString()
    split_condition(model)
    assert ir.to_proto(model).SerializeToString() == before


def test_parts_share_the_weights():
    model = ir.from_onnx_text(TEXT)
    split = split_condition(model)
    tensors = {id(part.graph.initializers["w"].const_value) for part in (model, split.condition, split.step)}
    assert len(tensors) == 1


def test_no_matrix_product_no_split():
    body = "a = Neg(text) m = ReduceMax <keepdims = 0> (a) y = Add(hidden_states, m)"
    assert split_condition(ir.from_onnx_text(f"{HEADER} g ({INPUTS}) => (float[batch,4] y) {{ {body} }}")) is None


def test_what_depends_on_the_step_stays():
    # The product reads the timestep, so it cannot run once per image.
    body = "t = Unsqueeze(timestep, one) s = Mul(text, t) y = MatMul(s, w)"
    text = TEXT.split("{\n")[0].replace("y)", "y)") + "{ one = Constant <value_ints = [1]> () " + body + " }"
    assert split_condition(ir.from_onnx_text(text)) is None


def test_a_size_only_the_step_knows_holds_the_product_back():
    text = TEXT.replace("float[batch] timestep", "float[other] timestep")
    split = split_condition(ir.from_onnx_text(text))
    assert split is None


def with_attention(query: str) -> ir.Model:
    """Quantized attention of `query` over a text, keys and values of which a product each makes."""
    inputs = "float[batch,2,3,4] hidden_states, float[batch] timestep, float[batch,2,5,4] text"
    body = "{ key = MatMul(text, w) value = MatMul(key, w) y = Identity(hidden_states) }"
    weight = TEXT.split("<float[4,4]")[1].split("{{")[0].split(">")[0]
    model = ir.from_onnx_text(f"{HEADER} g ({inputs}) => (float[batch,2,3,4] y) <float[4,4]{weight}> {body}")
    values = {value.name: value for value in (*model.graph.inputs, *(node.outputs[0] for node in model.graph))}
    last = model.graph[-1]
    build = GraphBuilder(model.graph, last, "attn")
    operands = (values[query], values["key"], values["value"], build.stored("mask", np.zeros((1, 1, 1, 1), np.float32)))
    choices = {"layer": "attn", "qk_format": "INT8", "pv_format": "INT8", "scale": 0.5}
    (out,) = build.fpq("QuantizedAttention", *operands, name="out", **choices)
    last.replace_input_with(0, out)
    add_functions(model, ["QuantizedAttention"])
    return model


def test_quantized_attention_of_the_step_over_keys_and_values_of_the_condition():
    model = with_attention("hidden_states")
    split = split_condition(model)
    assert sorted(value.name for value in split.condition.graph.outputs) == ["key", "value"]
    assert "QuantizedAttention" in op_types(split.step) and "QuantizedAttention" not in op_types(split.condition)
    assert not split.condition.functions and len(split.step.functions) == 1
    rng = np.random.default_rng(0)
    hidden, text = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 2, 3, 4), (3, 2, 5, 4)))
    names = [value.name for value in split.condition.graph.outputs]
    crossing = dict(zip(names, run(split.condition, {"text": text}), strict=True))
    whole = {"hidden_states": hidden, "timestep": np.zeros(3, np.float32), "text": text}
    step = {key: whole[key] for key in ("hidden_states",)} | crossing
    np.testing.assert_array_equal(run(split.step, step)[0], run(model, whole)[0])


@pytest.mark.kernels
def test_keys_and_values_of_the_condition_cross_as_bytes():
    native.need_compiler()
    model = with_attention("hidden_states")
    key = next(value for node in model.graph for value in node.outputs if value.name == "key")
    key.shape = ir.Shape(["batch", 2, "tokens", 4])
    UseQuantizedAttention()(model)
    model.opset_imports[library.DOMAIN] = VERSION
    split = split_condition(model)
    (crossing,) = split.condition.graph.outputs
    assert crossing.dtype == ir.DataType.UINT8
    assert [getattr(size, "value", size) for size in crossing.shape] == ["batch", 2, head_bytes("tokens", 4)]
    assert op_types(split.condition).count("AttentionOperands") == 1
    assert op_types(split.step) == ["QuantizedAttention", "Identity"]
    rng = np.random.default_rng(0)
    hidden, text = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 2, 3, 4), (3, 2, 5, 4)))
    (operands,) = native.run(split.condition, {"text": text})
    assert operands.dtype == np.uint8 and operands.shape == (3, 2, evaluated(crossing.shape[2].value, {"tokens": 5}))
    (out,) = native.run(split.step, {"hidden_states": hidden, crossing.name: operands})
    call = {"hidden_states": hidden, "timestep": np.zeros(3, np.float32), "text": text}
    np.testing.assert_array_equal(out, native.run(model, call)[0])


def test_quantized_attention_of_the_condition_alone_leaves_the_step():
    split = split_condition(with_attention("text"))
    assert "QuantizedAttention" in op_types(split.condition) and "QuantizedAttention" not in op_types(split.step)
    assert len(split.condition.functions) == 1 and not split.step.functions


# HalfGemm stands for any product whose rows do not depend on each other; nothing here runs it.
TIMES = f"""{HEADER[:-2]}, "fpq.native" : 1]>
g (float[batch,4] hidden_states, float[batch] timestep) => (float[batch,4] y)
<float16[1,4,16] w, float[4] table> {{
  axis = Constant <value_ints = [1]> ()
  column = Unsqueeze(timestep, axis)
  phase = Mul(column, table)
  wave = Sin(phase)
  embedded = fpq.native.HalfGemm <channels = 4> (wave, w)
  shift = Add(embedded, table)
  moved = Add(hidden_states, shift)
  scale = fpq.native.HalfGemm <channels = 4> (moved, w)
  y = Mul(scale, embedded)
}}"""


def test_products_of_the_timestep_alone_leave_the_step():
    split = split_timestep(times_model())
    assert [value.name for value in split.timestep.graph.inputs] == ["timestep"]
    assert [value.name for value in split.timestep.graph.outputs] == ["embedded"]
    assert op_types(split.timestep) == ["Unsqueeze", "Mul", "Sin", "HalfGemm"]
    assert [value.name for value in split.rest.graph.inputs] == ["hidden_states", "embedded"]
    assert op_types(split.rest) == ["Add", "Add", "HalfGemm", "Mul"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("embedded = fpq.native.HalfGemm <channels = 4> (wave, w)", "embedded = MatMul(wave, w)"),
        ("embedded = fpq.native.HalfGemm <channels = 4> (wave, w)", "embedded = Mul(wave, table)"),
        ("wave = Sin(phase)", "wave = Mul(phase, hidden_states)"),
        ("float[batch] timestep", "float[times] timestep"),
    ],
    ids=["rows that depend on their number", "no product", "the picture", "another number of rows"],
)
def test_other_products_stay_in_the_step(old, new):
    assert split_timestep(times_model()) is not None
    assert split_timestep(times_model(old, new)) is None


def times_model(old="", new=""):
    """TIMES, whose value `embedded` has a row for each sample; with one of its texts replaced."""
    tensors = [ir.tensor(np.ones((1, 4, 16), np.float16), name="w"), ir.tensor(np.ones(4, np.float32), name="table")]
    model = ir.from_onnx_text(TIMES.replace(old, new), initializers=tensors)
    for node in model.graph:
        if node.outputs[0].name == "embedded":
            node.outputs[0].shape, node.outputs[0].type = ir.Shape(("batch", 4)), ir.TensorType(ir.DataType.FLOAT)
    return model
