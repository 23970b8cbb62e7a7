"""The builder of graphs and the small questions on them: ports by name, and types and names of what is built."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from export.dialect.graph import (
    FLOAT,
    MICROSOFT,
    GraphBuilder,
    fpq_node,
    inputs_of,
    outputs_of,
    result_of,
    stored_array,
)
from export.dialect.ops import DOMAIN, OPS
from export.errors import ContractError

TEXT = """<ir_version: 10, opset_import: ["" : 21]> g (float[2, 4] x) => (float[2, 4] y) {
  h = Abs (x)
  y = LayerNormalization <axis = -1> (h, s)
}"""


def graph() -> ir.Graph:
    text = TEXT.replace("(float[2, 4] x)", "(float[2, 4] x, float[4] s)")
    parsed = ir.from_onnx_text(text).graph
    for node in parsed:
        node.name = str(node.outputs[0].name)
    return parsed


def test_ports_of_a_standard_op_have_the_names_of_its_schema() -> None:
    norm = graph()[1]
    assert inputs_of(norm).X.name == "h" and inputs_of(norm).Scale.name == "s"
    assert inputs_of(norm).get("B") is None
    with pytest.raises(ContractError, match="y: LayerNormalization needs B; export the model again"):
        _ = inputs_of(norm).B
    with pytest.raises(AttributeError, match="LayerNormalization has X, Scale, B, not bias"):
        inputs_of(norm).get("bias")


def test_ports_of_the_dialect_have_the_names_of_its_row_and_can_be_set() -> None:
    values = {port: ir.Value(name=port) for port in OPS["PackedGemm"].inputs}
    choices = {"layer": "a", "activation_format": "E2M3", "weight_format": "E2M1", "in_features": 8, "group_size": 0}
    like, other = ir.Node("", "Abs", [values["bias"]], metadata_props={"of": "a"}), ir.Value(name="other")
    gemm = fpq_node("PackedGemm", dict(reversed(values.items())), "a/gemm", like, **choices)
    assert list(gemm.inputs) == list(values.values()) and gemm.metadata_props == {"of": "a"}
    assert inputs_of(gemm).by_name() == values and inputs_of(gemm).bias is values["bias"]
    assert outputs_of(gemm).y is result_of(gemm)
    inputs_of(gemm).set("bias", other)
    assert gemm.inputs[5] is other
    with pytest.raises(ContractError, match="b: its inputs are bias, its op reads a_codes, a_scale, w_codes"):
        fpq_node("PackedGemm", {"bias": other}, "b", like, **choices)


def test_ports_of_the_runtimes_own_op() -> None:
    values = [ir.Value(name=name) for name in "ABsSzZ"]
    assert inputs_of(ir.Node(MICROSOFT, "MatMulIntegerToFloat", values)).B is values[1]


def test_a_builder_names_and_types_what_it_inserts() -> None:
    here = graph()
    build = GraphBuilder(here, here[1], "a", {"fpq.layer": "a"})
    doubled = build.op("Mul", inputs_of(here[0]).X, build.constant(2.0), name="doubled")
    half = build.op("Cast", doubled, name="half", to=ir.DataType.FLOAT16.value)
    codes, scale = build.fpq("QuantizeActivation", doubled, name="quantize", format="E2M3")
    assert [node.name for node in here] == ["h", "a/doubled", "a/half", "a/quantize", "y"]
    assert (doubled.name, doubled.dtype, half.dtype) == ("a/doubled", ir.DataType.FLOAT, ir.DataType.FLOAT16)
    assert (codes.name, codes.dtype, scale.name) == ("a/quantize", ir.DataType.UINT8, "a/quantize/scale")
    node = codes.producer()
    assert node is not None and node.domain == DOMAIN and node.metadata_props == {"fpq.layer": "a"}


def test_constants_are_shared_and_stored_tensors_are_not() -> None:
    here = graph()
    build, other = GraphBuilder(here, here[1], "a"), GraphBuilder(here, here[1], "b")
    assert build.constant(2.0) is other.constant(2.0) is not build.constant([2.0])
    assert build.stored("bias", np.ones(3)).name == "a.bias" and other.stored("bias", np.ones(3)).name == "b.bias"
    lazy = build.lazy("big", ir.DataType.INT8, (2, 3), lambda: np.ones((2, 3), np.int8))
    assert lazy is other.lazy("big", ir.DataType.INT8, (2, 3), lambda: np.zeros((2, 3), np.int8))
    np.testing.assert_array_equal(stored_array(lazy), np.ones((2, 3)))
    with pytest.raises(ContractError, match="h is computed, not stored"):
        stored_array(result_of(here[0]))


def test_an_untyped_builder_leaves_types_to_the_reader_of_the_file() -> None:
    here = graph()
    assert GraphBuilder(here, here[1], "a", typed=False).op("Abs", result_of(here[0]), name="size").type is None
    assert FLOAT.dtype == ir.DataType.FLOAT
