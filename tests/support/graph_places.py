"""Places in a denoiser's graph, found by what they do: the same functions for the portable and for a lowered graph."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from tests.support.graph_edit import GraphEdit, NothingToPlantError, some

# Ends of the names of the linears whose results join the residual stream.
ATTENTION_OUT, HIDDEN_OUT = "to_out.0/output", "ff.net.2/output"


@dataclass(frozen=True)
class Attention:
    """softmax(scaled @ keys (+ mask)) @ values: the node that scales q, the three products, the mask's Add or None."""

    scale: onnx.NodeProto
    scores: onnx.NodeProto
    mask: onnx.NodeProto | None
    softmax: onnx.NodeProto
    product: onnx.NodeProto


def attentions(edit: GraphEdit, masked: bool | None = None) -> list[Attention]:
    """All attentions in graph order; only those with a mask, or without, where `masked` is given."""
    places = [_attention(edit, softmax) for softmax in edit.nodes("Softmax")]
    fitting = [item for item in places if masked is None or (item.mask is not None) == masked]
    return some(fitting, "no attention of the kind")


def _attention(edit: GraphEdit, softmax: onnx.NodeProto) -> Attention:
    before = edit.producer(softmax.input[0])
    mask = before if before is not None and before.op_type == "Add" else None
    scores = edit.producer(mask.input[0]) if mask is not None else before
    scale = edit.producer(scores.input[0]) if scores is not None else None
    product = edit.readers(softmax.output[0])[0]
    if scores is None or scores.op_type != "MatMul" or scale is None or scale.op_type != "Mul":
        raise NothingToPlantError(f"{softmax.name} is not the softmax of an attention")
    return Attention(scale, scores, mask, softmax, product)


def mask_operand(attention: Attention) -> str:
    """The tensor that a mask's Add puts on the scores."""
    assert attention.mask is not None
    return str(attention.mask.input[1])


def joins(edit: GraphEdit, end: str) -> list[tuple[onnx.NodeProto, str]]:
    """(the Add that puts a block's linear named `end` on the residual stream, the stream before it)."""
    return [_join(edit, tensor) for tensor in edit.tensors(end)]


def _join(edit: GraphEdit, tensor: str) -> tuple[onnx.NodeProto, str]:
    for _ in range(4):  # a gate, a rescaling
        node = edit.readers(tensor)[0]
        if node.op_type == "Add":
            return node, str(other(node, tensor))
        tensor = node.output[0]
    raise NothingToPlantError(f"{tensor} does not join a residual stream")


def gates(edit: GraphEdit, end: str) -> list[tuple[onnx.NodeProto, str]]:
    """(the Mul by an adaLN gate behind the block's linear named `end`, the linear's output)."""
    pairs = [(node, tensor) for tensor in edit.tensors(end) for node in edit.readers(tensor) if node.op_type == "Mul"]
    return some(
        [(node, tensor) for node, tensor in pairs if not edit.is_constant(other(node, tensor))], f"no gate {end}"
    )


@dataclass(frozen=True)
class Modulation:
    """norm(x) * (1 + scale) + shift; the node that adds 1, and the node and place that read the shift."""

    plus_one: onnx.NodeProto
    scale: str
    last: onnx.NodeProto
    shift: str


def modulations(edit: GraphEdit) -> list[Modulation]:
    """Every norm that is modulated by a scale and a shift, in graph order."""
    places = [place for node in edit.nodes("LayerNormalization") if (place := _modulation(edit, node)) is not None]
    return some(places, "no modulated norm")


def _modulation(edit: GraphEdit, norm: onnx.NodeProto) -> Modulation | None:
    if len(norm.input) == 3:  # lowered: norm(x, 1 + scale, shift)
        plus_one, last, shift = edit.producer(norm.input[1]), norm, norm.input[2]
    else:
        scaled = edit.readers(norm.output[0])[0]
        plus_one = edit.producer(other(scaled, norm.output[0])) if scaled.op_type == "Mul" else None
        last = edit.readers(scaled.output[0])[0]
        shift = other(last, scaled.output[0]) if last.op_type == "Add" else ""
    if plus_one is not None and plus_one.op_type == "Unsqueeze":  # HunyuanDiT's last norm
        plus_one = edit.producer(plus_one.input[0])
    if plus_one is None or plus_one.op_type != "Add" or not shift:
        return None
    scale = next((name for name in plus_one.input if not edit.is_constant(name)), "")
    return Modulation(plus_one, scale, last, str(shift)) if scale else None


def timestep_phase(edit: GraphEdit) -> tuple[onnx.NodeProto, str]:
    """(timestep * frequencies, the table of frequencies)."""
    for sine in edit.nodes("Sin"):
        product = edit.producer(sine.input[0])
        table = [name for name in product.input if edit.is_constant(name)] if product is not None else []
        column = edit.producer(other(product, table[0])) if product is not None and table else None
        if column is not None and "timestep" in column.input and product is not None:
            return product, table[0]
    raise NothingToPlantError("no timestep embedding")


def hidden_gelus(edit: GraphEdit) -> list[onnx.NodeProto]:
    """The activations of the blocks."""
    return some([node for node in edit.nodes("Gelu") if node.input[0].endswith("net.0.proj/output")], "no hidden GELU")


def last_linear(edit: GraphEdit) -> onnx.NodeProto:
    """The product of the final layer, which is kept in float; its weight may be stored in FP16, behind a Cast."""
    products = edit.nodes("MatMul")
    return some([node for node in products if node.input[1].startswith("proj_out")], "no final layer")[-1]


def other(node: onnx.NodeProto, tensor: str) -> str:
    """The other operand of a node with two."""
    return str(node.input[1] if node.input[0] == tensor else node.input[0])
