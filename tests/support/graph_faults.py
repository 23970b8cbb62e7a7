"""Faults in what an engine computes between its quantized linears: what a wrong exporter, pass or fusion would do.

Each row edits the portable graph, so that every target inherits it, or one that was lowered for the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from tests.support.graph_edit import GraphEdit, Step, attribute, set_attribute, some
from tests.support.graph_places import (
    ATTENTION_OUT,
    HIDDEN_OUT,
    attentions,
    gates,
    hidden_gelus,
    joins,
    last_linear,
    mask_operand,
    modulations,
    other,
    timestep_phase,
)

Plant = Callable[[GraphEdit], None]
SEGMENTS, CALLS = frozenset({"segments"}), frozenset({"calls", "calls_median"})
EITHER = SEGMENTS | CALLS | {"tables"}
# Groups of subjects (tests/support/fault_subjects.py) that have what a fault is about.
MINIS = ("pixart_mini", "dit_mini")
TINIES = ("pixart", "pixart_sigma", "hunyuan", "dit")
ALL = (*MINIS, *TINIES)
CAPTIONED = ("pixart_mini", "pixart", "pixart_sigma")
CLASSES = ("dit_mini", "dit")
MODULATED = ("pixart_mini", "dit_mini", "pixart", "dit")


@dataclass(frozen=True)
class GraphFault:
    """plant: edits the graph. subjects: the models it is planted in. caught_by: gates of which one at least must fail.

    graph: "portable", lowered for the target afterwards; "stock" or "fused", the graph lowered for that path of the
    CPU. kind: the line of the summary that it belongs to.
    """

    name: str
    kind: str
    plant: Plant
    subjects: tuple[str, ...]
    caught_by: frozenset[str] = SEGMENTS
    graph: str = "stock"


def half() -> tuple[Step, Step]:
    """Round to FP16 and back."""
    return Step("Cast", attributes={"to": onnx.TensorProto.FLOAT16}), Step("Cast", attributes={"to": 1})


def times(factor: float) -> Step:
    return Step("Mul", (np.float32(factor),))


# --- activations ----------------------------------------------------------------------------------------------------


def _erf_everywhere(edit: GraphEdit) -> None:
    for gelu in edit.nodes("Gelu"):
        set_attribute(gelu, "approximate", "none")


def _erf_in_the_last_block(edit: GraphEdit) -> None:
    set_attribute(hidden_gelus(edit)[-1], "approximate", "none")


def _erf_in_the_caption(edit: GraphEdit) -> None:
    blocks = {node.output[0] for node in hidden_gelus(edit)}
    caption = some([node for node in edit.nodes("Gelu") if node.output[0] not in blocks], "no GELU of a caption")
    set_attribute(caption[0], "approximate", "none")


def _quick_gelu(edit: GraphEdit) -> None:
    """x * sigmoid(1.702 x), another usual approximation."""
    gelu = hidden_gelus(edit)[-1]
    x = gelu.input[0]
    gate = edit.apply(x, times(1.702), Step("Sigmoid"))
    gelu.CopyFrom(onnx.helper.make_node("Mul", [x, gate], list(gelu.output), gelu.name))


def _relu_for_silu(edit: GraphEdit) -> None:
    """In the timestep embedding."""
    product = next(
        node
        for sigmoid in edit.nodes("Sigmoid")
        for node in edit.readers(sigmoid.output[0])
        if not sigmoid.output[0].startswith("router")
    )
    sigmoid = edit.producer(next(name for name in product.input if _made_by(edit, name, "Sigmoid")))
    assert sigmoid is not None
    product.CopyFrom(onnx.helper.make_node("Relu", [sigmoid.input[0]], list(product.output), product.name))


def _made_by(edit: GraphEdit, tensor: str, op_type: str) -> bool:
    node = edit.producer(tensor)
    return node is not None and node.op_type == op_type


# --- attention ------------------------------------------------------------------------------------------------------


def _scale_attention(edit: GraphEdit, factor: float) -> None:
    for attention in attentions(edit):
        edit.route(attention.scale.output[0], times(factor))


def _scale_fused_attention(edit: GraphEdit, factor: float) -> None:
    """Of the kernel library, which holds it in an attribute."""
    for node in edit.nodes("Attention"):
        set_attribute(node, "scale", attribute(node, "scale") * factor)


def _drop_mask_of_fused_attention(edit: GraphEdit) -> None:
    masked = some([node for node in edit.nodes("Attention") if len(node.input) == 4], "no masked Attention")
    del masked[-1].input[3:]


def _scale_one_attention(edit: GraphEdit, place: int, factor: float) -> None:
    edit.route(attentions(edit)[place].scale.output[0], times(factor))


def _scale_scores(edit: GraphEdit) -> None:
    """The right scale twice: before the scores, and behind them the difference of rounding it to three digits."""
    attention = attentions(edit)[-1]
    constant = next(name for name in attention.scale.input if edit.is_constant(name))
    scale = float(edit.array(constant))
    edit.route(attention.scores.output[0], times(round(scale, 3) / scale))


def _wrong_axis(edit: GraphEdit) -> None:
    set_attribute(attentions(edit, masked=False)[-1].softmax, "axis", -2)


def _turned_heads(edit: GraphEdit) -> None:
    product = attentions(edit, masked=False)[-1].product
    heads = len(_heads_order(edit))
    edit.route(product.output[0], Step("Gather", (np.roll(np.arange(heads), 1),), {"axis": 1}))


def _heads_order(edit: GraphEdit) -> range:
    """As many numbers as a block's attention has heads."""
    product = attentions(edit, masked=False)[-1].product
    info = next(item for item in edit.graph.value_info if item.name == product.output[0])
    return range(info.type.tensor_type.shape.dim[1].dim_value)


def _keys_of_the_previous_token(edit: GraphEdit) -> None:
    """Keys [B, H, D, T] turned by one token, values not."""
    attention = attentions(edit)[-1]
    edit.route(
        attention.scores.input[1],
        Step("Slice", (np.array([1]), np.array([2**31]), np.array([3]))),
        Step("Pad", (np.array([0, 1]), np.float32(0), np.array([3]))),
        readers=[attention.scores],
    )


def _round(find: Callable[[GraphEdit], str]) -> Plant:
    """Round the tensor that `find` names to FP16."""
    return lambda edit: edit.route(find(edit), *half())


def _softmax(edit: GraphEdit) -> str:
    return str(attentions(edit)[-1].softmax.output[0])


def _scores(edit: GraphEdit) -> str:
    return str(attentions(edit)[0].scores.output[0])


def _values(edit: GraphEdit) -> str:
    return str(attentions(edit)[-1].product.input[1])


def _modulation_scale(edit: GraphEdit) -> str:
    return str(modulations(edit)[0].plus_one.output[0])


def _stream(edit: GraphEdit) -> str:
    return str(joins(edit, HIDDEN_OUT)[0][0].output[0])


def _final_input(edit: GraphEdit) -> str:
    return str(last_linear(edit).input[0])


def _final_output(edit: GraphEdit) -> str:
    return str(last_linear(edit).output[0])


def _patches(edit: GraphEdit) -> str:
    return str(edit.nodes("Conv")[0].output[0])


def _phase(edit: GraphEdit) -> str:
    return str(timestep_phase(edit)[0].output[0])


# --- norms, modulation, residuals -----------------------------------------------------------------------------------


def _every_epsilon(edit: GraphEdit) -> None:
    """Ten times as large in every norm; native ops hold that of theirs in an attribute."""
    for norm in _norms(edit):
        set_attribute(norm, "epsilon", 10 * attribute(norm, "epsilon"))


def _norms(edit: GraphEdit) -> list[onnx.NodeProto]:
    """Those of ONNX, and of native ops that have one."""
    norms = edit.nodes("LayerNormalization", "TokenChain", "PackedGemm")
    return [node for node in norms if attribute(node, "epsilon", 0.0) > 0]


def _one_epsilon(edit: GraphEdit, place: int, value: float) -> None:
    set_attribute(_norms(edit)[place], "epsilon", value)


def _swapped_modulation(edit: GraphEdit) -> None:
    modulation = modulations(edit)[-1]
    edit.redirect([modulation.plus_one], modulation.scale, "swapped")
    edit.redirect([modulation.last], modulation.shift, modulation.scale)
    edit.redirect([modulation.plus_one], "swapped", modulation.shift)


def _scale_without_one(edit: GraphEdit) -> None:
    modulation = modulations(edit)[0]
    edit.route(modulation.plus_one.output[0], Step("Sub", (np.float32(0.001),)))


def _dropped_gate(edit: GraphEdit, end: str) -> None:
    gate, x = gates(edit, end)[-1]
    edit.redirect(edit.readers(gate.output[0]), gate.output[0], x)


def _gate_of_the_other_half(edit: GraphEdit) -> None:
    """The attention's gate on the hidden layer of the same block."""
    first, second = gates(edit, ATTENTION_OUT), gates(edit, HIDDEN_OUT)
    of_attention = other(first[-1][0], first[-1][1])
    gate, x = second[-1]
    gate.input[:] = [x, of_attention]


def _grown_residual(edit: GraphEdit) -> None:
    add, stream = joins(edit, ATTENTION_OUT)[-1]
    edit.route(stream, times(1.001), readers=[add])


def _residual_of_the_block_before(edit: GraphEdit) -> None:
    pairs = joins(edit, HIDDEN_OUT)
    (_, earlier), (add, stream) = pairs[-2:]
    edit.redirect([add], stream, earlier)


# --- kept weights and tables ----------------------------------------------------------------------------------------


def _nudge(edit: GraphEdit, name: str, amount: float, place: float = 0.5) -> None:
    """Add `amount` to one entry, `place` of the way through."""

    def add(array: NDArray[Any]) -> NDArray[Any]:
        array.reshape(-1)[int(place * (array.size - 1))] += amount
        return array

    edit.change(name, add)


def _nudge_weight(edit: GraphEdit, parts: tuple[str, ...]) -> None:
    """0.02 on one entry of the first kept weight that one of `parts` names."""
    names = [item.name for item in edit.graph.initializer for part in parts if part in item.name]
    weights = [name for name in some(names, f"no kept {' or '.join(parts)}") if ".weight" in name and "/" not in name]
    stored = weights or [name for name in names if name.endswith((".weight/cast", ".weight/panels"))]
    _nudge(edit, some(stored, f"no kept {' or '.join(parts)}")[0], 0.02)


def _nudge_positions(edit: GraphEdit) -> None:
    _nudge(edit, edit.constants("pos_embed.pos_embed")[0], 0.05)


def _nudge_frequencies(edit: GraphEdit) -> None:
    _nudge(edit, timestep_phase(edit)[1], 0.05, place=0.1)


def _nudge_modulation_table(edit: GraphEdit) -> None:
    _nudge(edit, edit.constants("scale_shift_table")[-1], 0.05)


def _nudge_class(edit: GraphEdit) -> None:
    """In the row of class 3, which a verification need not draw."""
    table = edit.constants("embedding_table")[-1]
    rows = len(edit.array(table))
    _nudge(edit, table, 0.05, place=3.5 / rows)


def _shifted_positions(edit: GraphEdit) -> None:
    edit.change(edit.constants("pos_embed.pos_embed")[0], lambda table: np.roll(table, 1, axis=1))


def _turned_positions(edit: GraphEdit) -> None:
    """Rows and columns of the grid exchanged."""

    def turn(table: NDArray[Any]) -> NDArray[Any]:
        side = int(table.shape[1] ** 0.5)
        return table.reshape(side, side, -1).transpose(1, 0, 2).reshape(table.shape)

    edit.change(edit.constants("pos_embed.pos_embed")[0], turn)


# --- both ends of the graph -----------------------------------------------------------------------------------------


def _turned_patches(edit: GraphEdit) -> None:
    """Unpatchify with the two axes of a patch exchanged."""
    einsum = edit.nodes("Einsum")[-1]
    set_attribute(einsum, "equation", attribute(einsum, "equation").decode().replace("hpwq", "hqwp"))


def _turned_kernel(edit: GraphEdit) -> None:
    """The patch embedding reads columns for rows."""
    conv = edit.nodes("Conv")[0]
    name = conv.input[1]
    transposed = np.array([0, 1, 3, 2])
    edit.route(name, Step("Transpose", attributes={"perm": transposed.tolist()}), readers=[conv])


def _exchanged_channels(edit: GraphEdit) -> None:
    """The first two of the output."""
    _order_channels(edit, 1, 0)


def _order_channels(edit: GraphEdit, *first: int) -> None:
    channels = edit.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    order = np.array([*first, *range(len(first), channels)])
    edit.route("sample", Step("Gather", (order,), {"axis": 1}))


def _wrong_sigma(edit: GraphEdit) -> None:
    """A thousandth on the last channel: of a learned sigma where there is one, which no sampler here reads."""
    channels = edit.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    factors = np.ones((channels, 1, 1), np.float32)
    factors[-1] = 1.001
    edit.route("sample", Step("Mul", (factors,)))


def _clipped_latents(edit: GraphEdit) -> None:
    edit.route("hidden_states", Step("Clip", (np.float32(-5), np.float32(5))))


def _rounded_timestep(edit: GraphEdit) -> None:
    edit.route("timestep", Step("Round"), readers=_timestep_readers(edit))


def _timestep_readers(edit: GraphEdit) -> list[onnx.NodeProto]:
    """Those of the embedding, not of a router."""
    readers = [node for node in edit.readers("timestep") if node.op_type != "Shape"]
    return some([node for node in readers if not node.name.startswith("router")], "no reader of timestep")


def _first_timestep(edit: GraphEdit) -> None:
    """The timestep of the first sample for all: timestep[:1] + 0 * timestep."""
    first = edit.apply("timestep", Step("Slice", (np.array([0]), np.array([1]))))
    readers = [node for node in _timestep_readers(edit) if first not in node.output]
    spread = edit.apply("timestep", times(0), Step("Add", (first,)))
    edit.redirect([node for node in readers if not node.name.startswith("fault")], "timestep", spread)


# --- captions and their masks ---------------------------------------------------------------------------------------


def _mask_dropped(edit: GraphEdit) -> None:
    for attention in attentions(edit, masked=True):
        assert attention.mask is not None
        attention.softmax.input[0] = attention.mask.input[0]


def _mask_in_one_block_dropped(edit: GraphEdit) -> None:
    attention = attentions(edit, masked=True)[-1]
    assert attention.mask is not None
    attention.softmax.input[0] = attention.mask.input[0]


def _mask_negated(edit: GraphEdit) -> None:
    """Added with the other sign: kept tokens stay as they are, padding takes all attention."""
    for attention in attentions(edit, masked=True):
        edit.route(mask_operand(attention), Step("Neg"), readers=[_mask_add(attention)])


def _mask_inverted(edit: GraphEdit) -> None:
    """1 for padding in place of 0."""
    edit.route("encoder_attention_mask", Step("Sub", (np.float32(1),), place=1))


def _mask_of_the_first_sample(edit: GraphEdit) -> None:
    for attention in attentions(edit, masked=True):
        edit.route(
            mask_operand(attention), Step("Slice", (np.array([0]), np.array([1]))), readers=[_mask_add(attention)]
        )


def _mask_too_weak(edit: GraphEdit) -> None:
    """-2 in place of -10000."""
    for attention in attentions(edit, masked=True):
        edit.route(mask_operand(attention), times(2e-4), readers=[_mask_add(attention)])


def _mask_shifted(edit: GraphEdit) -> None:
    """Each token has the mask of the one before."""
    for attention in attentions(edit, masked=True):
        edit.route(
            mask_operand(attention),
            Step("Pad", (np.array([1, -1]), np.float32(0), np.array([3]))),
            readers=[_mask_add(attention)],
        )


def _mask_add(attention: Any) -> onnx.NodeProto:
    assert attention.mask is not None
    return attention.mask  # type: ignore[no-any-return]


def _padding_ignored(edit: GraphEdit) -> None:
    """HunyuanDiT puts a learned row in the place of masked tokens."""
    where = edit.nodes("Where")[-1]
    where.CopyFrom(onnx.helper.make_node("Identity", [where.input[1]], list(where.output), where.name))


def _padding_inverted(edit: GraphEdit) -> None:
    where = edit.nodes("Where")[-1]
    where.input[1], where.input[2] = where.input[2], where.input[1]


def _masks_exchanged(edit: GraphEdit) -> None:
    """HunyuanDiT's two text encoders: the mask of the second on the first."""
    joined = next(node for node in edit.nodes("Concat") if "text_embedding_mask" in node.input)
    joined.input[:] = list(reversed(joined.input))


# --- HunyuanDiT alone -----------------------------------------------------------------------------------------------


def _rotary(edit: GraphEdit, name: str) -> onnx.NodeProto:
    return some(edit.readers(name), f"no {name}")[0]


def _rotary_sign(edit: GraphEdit) -> None:
    edit.route("image_rotary_sin", Step("Neg"))


def _rotary_of_the_neighbour(edit: GraphEdit) -> None:
    """Keys get the angles of the token before."""
    some(edit.readers("image_rotary_cos"), "no image_rotary_cos")
    edit.route("image_rotary_cos", Step("Pad", (np.array([1, -1]), np.float32(0), np.array([0]))))


def _skip_exchanged(edit: GraphEdit) -> None:
    """The two halves of a long skip in the other order."""
    joined = [node for node in edit.nodes("Concat") if all(name.startswith("add_") for name in node.input)]
    some(joined, "no long skip")[-1].input[:] = list(reversed(joined[-1].input))


def _affine_norm(edit: GraphEdit) -> None:
    _nudge(edit, edit.constants("norm_q.weight")[-1], 0.02)


def _style_dropped(edit: GraphEdit) -> None:
    """The pooled text, the image's sizes and the style have no effect."""
    joined = next(node for node in edit.nodes("Concat") if len(node.input) == 3 and "view" in node.input[1])
    edit.route(joined.output[0], times(0))


# --- classes --------------------------------------------------------------------------------------------------------


def _neighbour_class(edit: GraphEdit) -> None:
    """Labels one too large, the last as it is."""
    edit.route("class_labels", Step("Add", (np.int64(1),)), Step("Min", (np.int64(10),)))


def _last_class_clipped(edit: GraphEdit) -> None:
    """The row of no class is never read: labels end with the last true class."""
    edit.route("class_labels", Step("Min", (np.int64(9),)))


def _one_class_lost(edit: GraphEdit) -> None:
    """Label 7 reads the row of label 6."""
    table = edit.constants("embedding_table")[0]

    def copy(rows: NDArray[Any]) -> NDArray[Any]:
        rows[7] = rows[6]
        return rows

    edit.change(table, copy)


GRAPH_FAULTS = (
    # activations
    GraphFault("GELU by erf in all blocks", "activation", _erf_everywhere, ALL, graph="portable"),
    GraphFault("GELU by erf in one block", "activation", _erf_in_the_last_block, ALL),
    GraphFault(
        "GELU by erf in one block, fused path", "activation", _erf_in_the_last_block, MINIS, graph="portable fused"
    ),
    GraphFault("GELU by erf in the caption", "activation", _erf_in_the_caption, CAPTIONED),
    GraphFault("GELU by a sigmoid", "activation", _quick_gelu, ALL),
    GraphFault("ReLU for SiLU", "activation", _relu_for_silu, ALL),
    # attention
    GraphFault("attention scale x 1.01", "attention", partial(_scale_attention, factor=1.01), ALL),
    GraphFault("attention scale x 1.001", "attention", partial(_scale_attention, factor=1.001), ALL, graph="portable"),
    GraphFault(
        "attention scale x 1.001, fused path",
        "attention",
        partial(_scale_fused_attention, factor=1.001),
        MINIS,
        graph="fused",
    ),
    GraphFault(
        "caption mask dropped in one block, fused path",
        "masks",
        _drop_mask_of_fused_attention,
        ("pixart_mini",),
        EITHER,
        "fused",
    ),
    GraphFault(
        "attention scale x 1.001 in one block", "attention", partial(_scale_one_attention, place=-1, factor=1.001), ALL
    ),
    GraphFault("attention scale of three digits", "attention", _scale_scores, MINIS),
    GraphFault("softmax over queries", "attention", _wrong_axis, ALL),
    GraphFault("heads turned", "attention", _turned_heads, ALL),
    GraphFault("keys of the previous token", "attention", _keys_of_the_previous_token, ALL),
    GraphFault("softmax in FP16", "roundings", _round(_softmax), ALL),
    GraphFault("scores in FP16", "roundings", _round(_scores), MINIS),
    GraphFault("values in FP16", "roundings", _round(_values), MINIS),
    GraphFault("adaLN in FP16", "roundings", _round(_modulation_scale), MODULATED),
    GraphFault("residual in FP16", "roundings", _round(_stream), ALL),
    GraphFault("final layer's input in FP16", "roundings", _round(_final_input), ALL),
    GraphFault("final layer's output in FP16", "roundings", _round(_final_output), MINIS),
    GraphFault("patches in FP16", "roundings", _round(_patches), MINIS),
    GraphFault("timestep's phase in FP16", "roundings", _round(_phase), MINIS, EITHER),
    # norms, modulation, residuals
    GraphFault("epsilon x 10", "norms", _every_epsilon, ALL),
    GraphFault("epsilon x 10, fused path", "norms", _every_epsilon, MINIS, graph="fused"),
    GraphFault("epsilon 1e-3 in one norm", "norms", partial(_one_epsilon, place=1, value=1e-3), ALL),
    GraphFault("epsilon 1e-3 in the last norm", "norms", partial(_one_epsilon, place=-1, value=1e-3), ALL),
    GraphFault("scale and shift exchanged", "norms", _swapped_modulation, MODULATED),
    GraphFault("scale + 0.999", "norms", _scale_without_one, MODULATED),
    GraphFault("gate of attention dropped", "gates", partial(_dropped_gate, end=ATTENTION_OUT), MODULATED),
    GraphFault("gate of the hidden layer dropped", "gates", partial(_dropped_gate, end=HIDDEN_OUT), MODULATED),
    GraphFault("gate of the other half", "gates", _gate_of_the_other_half, MODULATED),
    GraphFault("residual x 1.001", "residuals", _grown_residual, ALL),
    GraphFault("residual of the block before", "residuals", _residual_of_the_block_before, ALL),
    # kept weights and tables
    GraphFault(
        "final layer: one weight + 0.02",
        "kept weights",
        partial(_nudge_weight, parts=("proj_out.", "proj_out_2.")),
        ALL,
    ),
    GraphFault("patches: one weight + 0.02", "kept weights", partial(_nudge_weight, parts=("pos_embed.proj.",)), ALL),
    GraphFault(
        "timestep: one weight + 0.02",
        "kept weights",
        partial(_nudge_weight, parts=("timestep_embedder.linear_2.",)),
        ALL,
    ),
    GraphFault(
        "adaLN: one weight + 0.02",
        "kept weights",
        partial(_nudge_weight, parts=("adaln_single.linear.", "norm1.linear.")),
        MODULATED,
    ),
    GraphFault(
        "caption: one weight + 0.02",
        "kept weights",
        partial(_nudge_weight, parts=("caption_projection.linear_2.",)),
        CAPTIONED,
    ),
    GraphFault("one position + 0.05", "tables", _nudge_positions, MODULATED),
    GraphFault("one frequency + 0.05", "tables", _nudge_frequencies, ALL),
    GraphFault("one entry of the modulation + 0.05", "tables", _nudge_modulation_table, CAPTIONED),
    GraphFault("one entry of a class + 0.05", "tables", _nudge_class, CLASSES, EITHER),
    GraphFault("positions shifted", "tables", _shifted_positions, MODULATED),
    GraphFault("positions turned", "tables", _turned_positions, MODULATED),
    # both ends
    GraphFault("unpatchify transposed", "ends", _turned_patches, ALL),
    GraphFault("patches transposed", "ends", _turned_kernel, ALL),
    GraphFault("output channels exchanged", "ends", _exchanged_channels, ("pixart_mini", *TINIES)),
    GraphFault("last output channel x 1.001", "ends", _wrong_sigma, ALL),
    GraphFault("latents clipped at 5", "ends", _clipped_latents, ALL, CALLS),
    GraphFault("timestep rounded", "ends", _rounded_timestep, MINIS, EITHER),
    GraphFault("timestep of the first sample", "ends", _first_timestep, ALL, EITHER),
    # masks
    GraphFault("caption mask dropped", "masks", _mask_dropped, CAPTIONED, CALLS, "portable"),
    GraphFault("caption mask dropped in one block", "masks", _mask_in_one_block_dropped, CAPTIONED, EITHER),
    GraphFault("caption mask negated", "masks", _mask_negated, CAPTIONED, CALLS),
    GraphFault("caption mask inverted", "masks", _mask_inverted, CAPTIONED, CALLS),
    GraphFault("caption mask of the first sample", "masks", _mask_of_the_first_sample, CAPTIONED, CALLS),
    GraphFault("caption mask too weak", "masks", _mask_too_weak, CAPTIONED, CALLS),
    GraphFault("caption mask shifted", "masks", _mask_shifted, CAPTIONED, CALLS),
    GraphFault("text padding ignored", "masks", _padding_ignored, ("hunyuan",), CALLS),
    GraphFault("text padding inverted", "masks", _padding_inverted, ("hunyuan",), EITHER),
    GraphFault("masks of two encoders exchanged", "masks", _masks_exchanged, ("hunyuan",), CALLS),
    # HunyuanDiT
    GraphFault("rotation by the other sign", "hunyuan", _rotary_sign, ("hunyuan",)),
    GraphFault("rotation of the neighbour", "hunyuan", _rotary_of_the_neighbour, ("hunyuan",)),
    GraphFault("long skip exchanged", "hunyuan", _skip_exchanged, ("hunyuan",)),
    GraphFault("norm of queries: one weight + 0.02", "hunyuan", _affine_norm, ("hunyuan",)),
    GraphFault("pooled text and sizes dropped", "hunyuan", _style_dropped, ("hunyuan",)),
    # classes
    GraphFault("class of the neighbour", "classes", _neighbour_class, CLASSES, EITHER),
    GraphFault("no class read as the last", "classes", _last_class_clipped, CLASSES, EITHER),
    GraphFault("one class lost", "classes", _one_class_lost, CLASSES, EITHER),
)
