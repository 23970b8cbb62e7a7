"""A graph that is computed part by part: the same numbers as at once, each node in one part."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import parser

from pipeline.backends.base import LoweredGraph
from pipeline.verify.parts import Parts, needed_nodes
from pipeline.verify.probe import ProbedGraph

GRAPH = """
<ir_version: 10, opset_import: ["" : 21]>
agraph (float[b, 4] x, float[b, 1] t) => (float[b, 4] sample)
<float one = {1.0}, float unit = {0.125}, int8 zero = {0}, float[4, 4] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}>
{
    shift = Exp(t)
    a = Add(x, shift)
    codes = QuantizeLinear(a, unit, zero)
    values = DequantizeLinear(codes, unit, zero)
    b = MatMul(values, w)
    c = Mul(b, shift)
    weight = Add(w, one)
    d = MatMul(c, weight)
    unread = Neg(d)
    sample = Add(d, x)
}
"""
CALLS = [
    {"x": np.arange(8, dtype=np.float32).reshape(2, 4) / 3, "t": np.float32([[0.5], [1]])},
    {"x": np.float32([[7, -1, 0.3, 2]]), "t": np.float32([[-2]])},
]


class Opened:
    """Opens parts and remembers the operators of each."""

    def __init__(self) -> None:
        self.parts: list[list[str]] = []

    def __call__(self, model: onnx.ModelProto) -> Any:
        self.parts.append([node.output[0] for node in model.graph.node])
        return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def at_once(names: list[str], call: dict[str, Any]) -> dict[str, Any]:
    model = parser.parse_model(GRAPH)
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, call), strict=True))


@pytest.mark.parametrize(
    "batches",
    [
        [["a", "codes"], ["values", "b"], ["d", "sample"]],
        [["a"], ["codes", "b"], ["b", "c"], ["sample"]],  # b twice
        [["codes"], ["codes"], ["values"], ["sample"]],
        [["a", "codes", "values", "b", "c", "d", "sample"]],
    ],
    ids=["in turn", "a tensor twice", "codes again", "at once"],
)
def test_parts_give_what_the_whole_graph_gives(batches: list[list[str]]) -> None:
    opened = Opened()
    parts = Parts(parser.parse_model(GRAPH), opened, CALLS, [name for batch in batches for name in batch])
    for names in batches:
        for call, tensors in zip(CALLS, parts.compute(names), strict=True):
            expected = at_once(names, call)
            assert tensors.keys() == expected.keys()
            assert all(np.array_equal(tensors[name], expected[name]) for name in names)
    computed = [name for part in opened.parts for name in part if name != "codes"]  # made again where it is read again
    assert sorted(computed) == sorted(set(computed)), "each node in one part"
    assert "unread" not in computed


def test_a_tensor_that_is_the_same_in_every_call_is_taken_from_the_first() -> None:
    parts = Parts(parser.parse_model(GRAPH), Opened(), CALLS, ["weight", "d"])
    first, second = parts.compute(["weight", "d"], once=["weight"])
    assert first.keys() == {"weight", "d"} and second.keys() == {"d"}


def test_an_input_may_be_asked_for() -> None:
    parts = Parts(parser.parse_model(GRAPH), Opened(), CALLS, ["x", "sample"])
    assert np.array_equal(parts.compute(["x"])[1]["x"], CALLS[1]["x"])
    assert parts.compute(["sample"])[0]["sample"].shape == (2, 4)


def test_nothing_is_kept_that_no_later_part_reads() -> None:
    parts = Parts(parser.parse_model(GRAPH), Opened(), CALLS, ["b", "sample"])
    parts.compute(["b"])
    assert parts._arrays[0].keys() == {"x", "b", "shift"}
    parts.compute(["sample"])
    assert not parts._arrays[0]


def test_needed_nodes_are_all_that_compute_a_tensor() -> None:
    nodes = parser.parse_model(GRAPH).graph.node
    needed = needed_nodes(nodes, ["c"])
    assert needed == [node for node in nodes if set(node.output) & {"c", "b", "values", "codes", "a", "shift"}]
    assert set().union(*(node.input for node in needed)) - set().union(*(node.output for node in needed)) == {
        "x",
        "t",
        "w",
        "unit",
        "zero",
    }


def test_a_graph_says_its_tables_and_inner_tensors_whatever_names_its_data_has(tmp_path: Path) -> None:
    """A lowered graph's data may be a hard link to another graph's."""
    model, table = parser.parse_model(GRAPH), np.arange(1, 17, dtype=np.float32).reshape(4, 4)
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == "w")
    weight.CopyFrom(onnx.numpy_helper.from_array(table, "w"))
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="data", size_threshold=0)
    os.link(tmp_path / "data", tmp_path / "another name")
    probed = ProbedGraph(LoweredGraph(tmp_path / "model.onnx", (), ()))
    np.testing.assert_array_equal(probed.constant("w"), table)
    assert probed.holds(table) and not probed.holds(table + 1)
    tensors = probed.cut(["b", "c"], {})
    for call in CALLS:
        expected, computed = at_once(["b", "c"], call), tensors(call)
        assert all(np.array_equal(computed[name], expected[name]) for name in ("b", "c"))
