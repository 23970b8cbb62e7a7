"""The ports of the ops that finish a linear, by name: those that both have stand for the same thing in both
(plugins/cpu/epilogue.h)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntEnum

import onnx_ir as ir

from export.dialect.graph import is_op
from pipeline.backends.cpu import packed_gemm, token_chain
from plugins.cpu.library import DOMAIN

PORTS: dict[str, tuple[type[IntEnum], type[IntEnum]]] = {
    packed_gemm.OP: (packed_gemm.In, packed_gemm.Out),
    token_chain.OP: (token_chain.In, token_chain.Out),
}


def finishes(node: ir.Node) -> bool:
    """Does it make a linear?"""
    return any(is_op(node, op_type, DOMAIN) for op_type in PORTS) and "LINEAR" in ports_out(node)


def ports_in(node: ir.Node) -> dict[str, ir.Value]:
    """Those that are given."""
    places, _ = PORTS[node.op_type]
    return {place.name: value for place, value in zip(places, node.inputs, strict=False) if value is not None}


def ports_out(node: ir.Node) -> dict[str, ir.Value]:
    """Those that have names; the others cost nothing."""
    _, places = PORTS[node.op_type]
    return {place.name: value for place, value in zip(places, node.outputs, strict=True) if value.name}


def connect(node: ir.Node, inputs: Mapping[str, ir.Value], attributes: Mapping[str, int | float]) -> None:
    """Give a node these inputs and attributes. Whatever makes them may stand behind it: the graph is sorted then."""
    places, _ = PORTS[node.op_type]
    node.resize_inputs(len(places))  # those behind the last one that was given are not there
    for name, value in inputs.items():
        node.replace_input_with(places[name], value)
    node.attributes.update({row.name: row for row in ir.convenience.convert_attributes(dict(attributes))})


def make_instead(node: ir.Node, outputs: Iterable[tuple[str, ir.Value]]) -> None:
    """Let a node's outputs stand for values that others make, whose names they take."""
    _, places = PORTS[node.op_type]
    for name, old in outputs:
        new = node.outputs[places[name]]
        new.name, new.shape, new.type = old.name, old.shape, old.type
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        old.name = ""
