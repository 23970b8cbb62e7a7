"""Faults in and around 8-bit attention: its operands, its mask, its formats, and what its function body computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.dialect.ops import OPS, attributes
from tests.support.graph_edit import GraphEdit, NothingToPlantError, Step, attribute, set_attribute, some
from tests.support.graph_faults import EITHER, SEGMENTS, GraphFault, half, times

ATTENDED = ("pixart_mini attention", "hunyuan attention")
MASKED = ATTENDED[:1]
OUTPUT, COVERAGE = frozenset({"attention_output"}), frozenset({"attention_coverage"})
OP = "QuantizedAttention"
PORTS = tuple(OPS[OP].inputs)


def node_of(edit: GraphEdit, masked: bool = False) -> onnx.NodeProto:
    """The last attention, or the last with a mask."""
    nodes = [node for node in edit.nodes(OP) if not masked or has_mask(edit, node)]
    return some(nodes, "no masked attention")[-1]


def has_mask(edit: GraphEdit, node: onnx.NodeProto) -> bool:
    """Or does it read zeros for none?"""
    producer = edit.producer(node.input[3])
    return producer is not None and producer.op_type != "ConstantOfShape"


def _route(edit: GraphEdit, port: str, *steps: Step, masked: bool = False) -> None:
    """Send what one attention reads through `steps`, for it alone."""
    node = node_of(edit, masked)
    edit.route(node.input[PORTS.index(port)], *steps, readers=[node])


def _roll(axis: int, count: int) -> Step:
    return Step("Gather", (np.roll(np.arange(count), 1),), {"axis": axis})


def _heads(edit: GraphEdit) -> int:
    name = node_of(edit).input[0]
    info = next(item for item in edit.graph.value_info if item.name == name)
    return int(info.type.tensor_type.shape.dim[1].dim_value)


def _roll_heads(edit: GraphEdit, port: str) -> None:
    _route(edit, port, _roll(1, _heads(edit)))


def _roll_heads_of_the_result(edit: GraphEdit) -> None:
    edit.route(node_of(edit).output[0], _roll(1, _heads(edit)))


def _previous_token(edit: GraphEdit) -> None:
    """The last one's for the first."""
    axis = np.array([2])
    last = edit.apply(node_of(edit).input[2], Step("Slice", (np.array([-1]), np.array([2**31]), axis)))
    others = Step("Slice", (np.array([0]), np.array([-1]), axis))
    _route(edit, "v", others, Step("Concat", (last,), {"axis": 2}, place=1))


def _last_key_dropped(edit: GraphEdit) -> None:
    """Of the attention of a picture's own tokens, where no mask says how many there are."""
    node = next(node for node in edit.nodes(OP) if not has_mask(edit, node))
    for port in ("k", "v"):
        name = node.input[PORTS.index(port)]
        edit.route(name, Step("Slice", (np.array([0]), np.array([-1]), np.array([2]))), readers=[node])


def _no_mask(edit: GraphEdit) -> None:
    node_of(edit, masked=True).input[3] = edit.constant(np.zeros((1, 1, 1, 1), np.float32))


def _mask_of_the_first_sample(edit: GraphEdit) -> None:
    _route(edit, "mask", Step("Slice", (np.array([0]), np.array([1]))), masked=True)


def _scale(edit: GraphEdit, factor: float) -> None:
    node = node_of(edit)
    set_attribute(node, "scale", attribute(node, "scale") * factor)


def _formats(edit: GraphEdit, **formats: str) -> None:
    """An attention in other formats, with their tables."""
    node = node_of(edit)
    choices = {"layer": attribute(node, "layer").decode(), "scale": attribute(node, "scale")}
    choices |= {key: attribute(node, key).decode() for key in ("qk_format", "pv_format")}
    for key, value in attributes(OP, **{**choices, **formats}).items():
        set_attribute(node, key, value)


def _operands_of_an_earlier_block(edit: GraphEdit) -> None:
    """Of the same place in the block before: those of the picture's tokens and of the caption alternate."""
    *_, earlier, _, last = edit.nodes(OP)
    last.input[1] = earlier.input[1]


def _operands_exchanged(edit: GraphEdit) -> None:
    node = edit.nodes("AttentionOperands")[-1]
    node.input[:] = reversed(node.input)


def _no_layer(edit: GraphEdit) -> None:
    """An attention that nobody can find again."""
    set_attribute(node_of(edit), "layer", "another")


# --- the function body ----------------------------------------------------------------------------------------------


def _body(edit: GraphEdit) -> onnx.FunctionProto:
    functions = [function for function in edit.model.functions if function.name == OP]
    return some(functions, f"no function {OP}")[0]


def _producer(body: onnx.FunctionProto, tensor: str) -> onnx.NodeProto:
    return next(node for node in body.node if tensor in node.output)


def _weights(body: onnx.FunctionProto) -> onnx.NodeProto:
    """Round of the exponentials, which the sum of a row reads."""
    last = body.node[-1]
    return _producer(body, _producer(body, last.input[1]).input[0])


def _weights_truncated(edit: GraphEdit) -> None:
    _weights(_body(edit)).op_type = "Floor"


def _number_in_body(edit: GraphEdit, number: float, other: float) -> None:
    for node in _body(edit).node:
        for item in node.attribute:
            if item.type == onnx.AttributeProto.FLOAT and item.f == number:
                item.f = other
                return
            if item.type == onnx.AttributeProto.TENSOR and numpy_helper.to_array(item.t).tolist() == number:
                item.t.CopyFrom(numpy_helper.from_array(np.array(other, np.float32)))
                return
    raise NothingToPlantError(f"no number {number} in the body")


def _sum_of_exponentials(edit: GraphEdit) -> None:
    body = _body(edit)
    total = _producer(body, body.node[-1].input[1])
    total.input[0] = _weights(body).input[0]


def _keys_with_their_mean(edit: GraphEdit) -> None:
    body = _body(edit)
    mean = next(node for node in body.node if node.op_type == "ReduceMean")
    wide = _producer(body, mean.input[0])
    wide.input[0] = _zero(body, wide.input[0])


def _zero(body: onnx.FunctionProto, tensor: str) -> str:
    """tensor - tensor, at the head of the body."""
    body.node.insert(0, helper.make_node("Sub", [tensor, tensor], ["fault_zero"]))
    return "fault_zero"


def _sharper(edit: GraphEdit) -> None:
    """Exponentials of another base: 2^-11 more in the exponent."""
    body = _body(edit)
    exponential = next(node for node in body.node if node.op_type == "Exp")
    place = list(body.node).index(exponential)
    factor = helper.make_node("Constant", [], ["fault_factor"], value_float=1 + 2.0**-11)
    product = helper.make_node("Mul", [exponential.input[0], "fault_factor"], ["fault_sharper"])
    exponential.input[0] = "fault_sharper"
    body.node.insert(place, product)
    body.node.insert(place, factor)


def fault(
    name: str,
    plant: Callable[[GraphEdit], None],
    caught_by: frozenset[str] = OUTPUT,
    subjects: tuple[str, ...] = ATTENDED,
    graph: str = "stock",
) -> GraphFault:
    return GraphFault(name, "8-bit attention", plant, subjects, caught_by, graph)


ATTENTION_FAULTS = (
    # what it reads
    fault("q: heads turned", partial(_roll_heads, port="q"), SEGMENTS),
    fault("k: heads turned", partial(_roll_heads, port="k"), SEGMENTS),
    fault("v: heads turned", partial(_roll_heads, port="v"), SEGMENTS),
    fault("v of the previous token", _previous_token, SEGMENTS),
    fault("one key dropped", _last_key_dropped, SEGMENTS),
    fault("q times 1.001", lambda edit: _route(edit, "q", times(1.001)), SEGMENTS),
    fault("k in FP16", lambda edit: _route(edit, "k", *half()), SEGMENTS),
    fault("mask dropped in one attention", _no_mask, SEGMENTS, MASKED),
    fault("mask of the first sample in one attention", _mask_of_the_first_sample, EITHER, MASKED),
    fault(
        "mask too weak in one attention", lambda edit: _route(edit, "mask", times(2e-4), masked=True), SEGMENTS, MASKED
    ),
    fault("bytes of another block's keys and values", _operands_of_an_earlier_block, SEGMENTS, graph="fused"),
    fault("bytes of values for those of keys", _operands_exchanged, SEGMENTS, graph="fused"),
    # what it is told
    fault("scale of the scores x 1.001", partial(_scale, factor=1.001)),
    fault("scale of the scores x 1.0001", partial(_scale, factor=1.0001), graph="portable"),
    fault("scale of the scores x 1.001, fused path", partial(_scale, factor=1.001), graph="fused"),
    fault("queries and keys in another format", partial(_formats, qk_format="INT6")),
    fault("values in another format", partial(_formats, pv_format="E2M3")),
    fault("an attention under another name", _no_layer, COVERAGE),
    # what its body computes
    fault("exponentials truncated", _weights_truncated),
    fault("127 in place of 255", partial(_number_in_body, number=255.0, other=127.0)),
    fault("divided by the exponentials' sum", _sum_of_exponentials),
    fault("K's mean stays", _keys_with_their_mean),
    fault("exponentials of another base", _sharper, graph="portable"),
    # what follows
    fault("heads of the result turned", _roll_heads_of_the_result, OUTPUT | SEGMENTS),
    fault("result in FP16", lambda edit: edit.route(node_of(edit).output[0], *half()), OUTPUT | SEGMENTS),
)
