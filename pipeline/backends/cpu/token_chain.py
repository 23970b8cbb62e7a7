"""The op TokenChain of domain `fpq.native`: what its node looks like (plugins/cpu/token_chain.h: what it computes)."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

import onnx_ir as ir

from export.dialect.graph import GraphBuilder, constant, is_op
from export.dialect.ops import ABSMAX_FLOOR
from plugins.cpu.library import DOMAIN

VERSION, OP = 1, "TokenChain"


class In(IntEnum):
    """Inputs by place; all but X are optional."""

    X = 0
    TOKEN_SCALE = 1
    BIAS = 2
    GATE = 3
    RESIDUAL = 4
    NORM_SCALE = 5
    NORM_SHIFT = 6


class Out(IntEnum):
    """Outputs by place, each optional; one that nobody wants has no name and costs nothing."""

    CODES = 0
    SCALE = 1
    Y = 2
    LINEAR = 3
    QUANTIZED = 4
    LOW_CODES = 5


class Activation(IntEnum):
    """What attribute `activation` says: plugins/cpu/epilogue.h has the same numbers."""

    NONE = 0
    GELU = 1  # the tanh form
    SILU = 2


Number = int | float
# Attributes and the value of those that belong to an absent stage.
ATTRIBUTES: dict[str, Number] = {
    "heads_in": 0,
    "heads_out": 0,
    "activation": Activation.NONE,
    "epsilon": 0.0,
    "absmax_floor": float(ABSMAX_FLOOR),
    "max_value": 1.0,
    "kmax": 1.0,
    "rounding_factor": 0.0,
    "zero": 0,
    "limb_base": 0,
}


def is_chain(node: ir.Node | None) -> bool:
    return is_op(node, OP, DOMAIN)


def stages(node: ir.Node) -> dict[str, Number]:
    """Attributes of a chain that are not those of an absent stage."""
    values = {name: node.attributes[name].value for name in ATTRIBUTES}
    return {name: value for name, value in values.items() if value != ATTRIBUTES[name]}


def chain_node(build: GraphBuilder, inputs: Mapping[In, ir.Value], name: str, **stages: Number) -> ir.Node:
    """A chain with these stages (see ATTRIBUTES), whose outputs have no names."""
    places = [inputs.get(place) for place in In]
    node = build.node(OP, places, name, ATTRIBUTES | stages, DOMAIN, len(Out))
    for value in node.outputs:
        value.name = ""
    return node


def drop_unread_outputs(model: ir.Model) -> None:
    """Take the names from outputs of native ops that nothing reads: the kernel then does not write them."""
    for node in model.graph:
        for value in node.outputs if node.domain == DOMAIN else ():
            if not value.uses() and not value.is_graph_output():
                value.name = ""


def channels(value: ir.Value | None) -> int | None:
    """Size of the last axis if it is known."""
    size = value.shape[-1] if value is not None and value.shape is not None and value.shape.rank() else None
    return size if isinstance(size, int) else None


def misfit(row: ir.Value, x: ir.Value | None) -> str | None:
    """Why `row` is neither [channels] nor [batch, 1, channels] for x [batch, tokens, channels], None if it is one."""
    shape, of_x, n = row.shape, x.shape if x is not None else None, channels(x)
    if shape is not None and of_x is not None and n is not None and channels(row) == n:
        per_sample = shape.rank() == of_x.rank() == 3 and shape[1] == 1 and shape[0] == of_x[0]
        if shape.rank() == 1 or per_sample:
            return None
    return f"{row.name} has shape {shape}, neither [{n}] nor [batch, 1, {n}] of {of_x}"


def number(value: ir.Value | None) -> float | None:
    """The number that a constant scalar holds, else None."""
    array = constant(value)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None
