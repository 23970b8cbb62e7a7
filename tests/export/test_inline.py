"""A portable model without functions: the same numbers to the bit, in standard ops alone; and what files say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from export.about import About, formats, sign
from export.dialect.ops import OPS
from export.errors import ContractError
from export.formats.attention import AttentionFormats
from export.inline import inline, write_inlined
from tests.support.portable import activations, portable, random_linear, run

GRANULARITIES = [("per_channel", 0), ("exact_group", 16), ("group", 32)]


@pytest.mark.parametrize(("granularity", "group"), GRANULARITIES)
@pytest.mark.parametrize("weight", ["E2M1", "INT6"])
def test_numbers_are_equal_to_the_bit(weight: str, granularity: str, group: int, tmp_path: Path) -> None:
    if weight == "INT6" and granularity == "exact_group":
        granularity, group = "per_channel", 0
    layer = random_linear(weight=weight, granularity=granularity, group=group)
    model = portable('y = fpq.QuantizedLinear <layer="a"> (x)', [layer])
    sign(model, "a linear")
    model.metadata_props.update(About("recipe", "mit").metadata([layer], None))
    ir.save(model, tmp_path / "model.onnx")
    count = write_inlined(tmp_path / "model.onnx", tmp_path / "inlined" / "model.onnx")
    inlined = onnx.load(tmp_path / "inlined" / "model.onnx")
    onnx.checker.check_model(inlined, full_check=True)
    assert not inlined.functions and {node.domain for node in inlined.graph.node} == {""}
    assert len(inlined.graph.node) == count and "Constant" not in {node.op_type for node in inlined.graph.node}
    assert [(row.domain, row.version) for row in inlined.opset_import] == [("", 21)]
    feeds = {"x": activations(np.random.default_rng(0))}
    [expected], [found] = run(model, feeds), run(ir.from_proto(inlined), feeds)
    np.testing.assert_array_equal(found, expected)
    props = {row.key: row.value for row in inlined.metadata_props}
    assert props == {
        "recipe": "recipe",
        "formats": f"weights {weight} {granularity}; activations E2M3 per_token; attention float",
        "license": "mit",
    }
    assert (inlined.producer_name, bool(inlined.producer_version)) == ("ditc", True)
    assert "in standard ops alone" in inlined.doc_string


@pytest.mark.parametrize("op", list(OPS))
def test_literals_are_tensors(op: str) -> None:
    """Tools that fold constants take others for float64. Tables come by attributes of the node."""
    constants = [node.attribute[0] for node in OPS[op].function().node if node.op_type == "Constant"]
    assert constants and all(row.name == "value" or row.ref_attr_name for row in constants)


def test_bits_are_moved_in_32_of_them() -> None:
    model = portable('y = fpq.QuantizedLinear <layer="a"> (x)', [random_linear(granularity="exact_group", group=16)])
    inline(model)
    inferred = onnx.shape_inference.infer_shapes(ir.to_proto(model), strict_mode=True)
    types = {row.name: row.type.tensor_type.elem_type for row in inferred.graph.value_info}
    types |= {row.name: row.data_type for row in inferred.graph.initializer}
    shifted = [types[node.input[0]] for node in inferred.graph.node if node.op_type == "BitShift"]
    assert len(shifted) >= 4 and set(shifted) == {onnx.TensorProto.UINT32}
    # onnxruntime has Sub of such small types from 1.21 on alone.
    taken = {types.get(name) for node in inferred.graph.node if node.op_type == "Sub" for name in node.input}
    assert taken <= {None, onnx.TensorProto.FLOAT, onnx.TensorProto.INT64} and onnx.TensorProto.INT64 in taken


def test_another_file_is_refused(tmp_path: Path) -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21]>\ng (float[2] x) => (float[2] y) { y = Abs(x) }'
    )
    ir.save(model, tmp_path / "model.onnx")
    with pytest.raises(ContractError, match="no ops of the domain fpq: it is in standard ops, or no portable"):
        write_inlined(tmp_path / "model.onnx", tmp_path / "out" / "model.onnx")
    assert not (tmp_path / "out").exists()


def test_formats_in_words() -> None:
    layers = [random_linear("a"), random_linear("b", weight="INT8", activation="INT8")]
    shown = formats(layers, AttentionFormats("INT8", "E2M3"))
    assert shown == (
        "weights E2M1 per_channel, INT8 per_channel; activations E2M3 per_token, INT8 per_token; attention INT8/E2M3"
    )
    assert formats([], None) == "weights float; activations float; attention float"
    assert About().metadata([], None) == {"formats": formats([], None), "license": "unknown"}
