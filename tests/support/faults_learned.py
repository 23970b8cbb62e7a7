"""Faults in what calibration methods learn: branches, zero points, static and grouped scales, balance."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from pipeline.backends.base import LoweredGraph
from pipeline.backends.cpu.packed_gemm import In
from pipeline.passes.probes import ProbeRow
from tests.support.faults import CROSS_V, FF_OUT, FIRST_Q, Fault, Graph, K, LoweredFault, Q

OUT = "transformer_blocks.1.attn1.to_out.0"


def _branch_of_another_timestep(graph: Graph) -> None:
    for key in ("lora_down", "lora_up"):
        graph.change(f"{CROSS_V}.{key}", lambda branches: np.roll(branches, 1, axis=0))


def _one_half_of_another_branch(graph: Graph) -> None:
    graph.change(f"{CROSS_V}.lora_up", lambda branches: np.roll(branches, 1, axis=0))


def _router_mixes_sine_and_cosine(graph: Graph) -> None:
    graph.change("router.w1", lambda w: np.roll(w, w.shape[1] // 2, axis=1))


def _missing_branch(graph: Graph) -> None:
    graph.change(f"{CROSS_V}.lora_up", np.zeros_like)


def _branch_of_the_neighbour_layer(graph: Graph) -> None:
    other = graph.array("transformer_blocks.0.attn2.to_v.lora_down")
    graph.change(f"{CROSS_V}.lora_down", lambda own: other.astype(own.dtype))


def _branch_reads_the_balanced_input(graph: Graph) -> None:
    inner = graph.node(f"{Q}/low_rank_inner")
    inner.input[0] = graph.node(f"{Q}/quantize").input[0]


def _dropped_zero_point_correction(graph: Graph) -> None:
    decode = graph.node(f"{FF_OUT}/dequantize")
    decode.input[2] = graph.add_constant("no_zero", np.zeros(1, np.float32))


def _zero_point_of_another_sign(graph: Graph) -> None:
    graph.change(f"{FF_OUT}.activation_zero", np.negative)


def _static_scale_of_a_neighbour_layer(graph: Graph) -> None:
    other = graph.array(f"{FIRST_Q}.activation_scale")
    assert other != graph.array(f"{K}.activation_scale")
    graph.change(f"{K}.activation_scale", lambda _: other)


def _balance_of_the_neighbour_channel(graph: Graph) -> None:
    graph.change(f"{Q}.input_multiplier", lambda factors: np.roll(factors, 1))


def _missing_offset(graph: Graph) -> None:
    graph.change(f"{Q}.input_offset", np.zeros_like)


LEARNED_FAULTS = (
    Fault("branch of another timestep", "linear_output", _branch_of_another_timestep),
    Fault("half a branch of another timestep", "linear_output", _one_half_of_another_branch),
    Fault("router mixes sine and cosine", "linear_output", _router_mixes_sine_and_cosine),
    Fault("missing branch", "linear_output", _missing_branch),
    Fault("branch of the neighbour layer", "linear_output", _branch_of_the_neighbour_layer),
    Fault("branch reads the balanced input", "linear_output", _branch_reads_the_balanced_input),
    Fault("dropped zero-point correction", "linear_output", _dropped_zero_point_correction),
    Fault("zero point of another sign", "codes_inadmissible", _zero_point_of_another_sign),
    Fault("static scale of a neighbour layer", "codes_inadmissible", _static_scale_of_a_neighbour_layer),
    Fault("balance of the neighbour channel", "codes_inadmissible", _balance_of_the_neighbour_channel),
    Fault("missing offset", "codes_inadmissible", _missing_offset),
)


# --- in a lowering: `plant` gets the probe row of the layer named here ---------------------------------------------


def _turned_groups(graph: Graph, tensor: str) -> None:
    """Have readers of [M, groups, 1] see each group's neighbour."""
    node, before = graph.producer(tensor), f"{tensor}/before"
    node.output[:] = [before if name == tensor else name for name in node.output]
    order = graph.add_constant(f"{tensor}/order", np.array([1, 0]))
    graph.graph.node.insert(
        list(graph.graph.node).index(node) + 1, helper.make_node("Gather", [before, order], [tensor], axis=1)
    )


def _scale_of_the_neighbour_group(graph: Graph, row: ProbeRow) -> None:
    _turned_groups(graph, row.act_scale)


def _group_of_sums_scaled_by_its_neighbour(graph: Graph, row: ProbeRow) -> None:
    """Only the GEMM reads the wrong scales: token scales themselves are right."""
    packed = graph.nodes("PackedGemm")
    name, place, axis = ("product", In.GROUP_SCALE, 1) if packed else ("scaled_groups", 1, 0)
    scaling = graph.node(f"{row.layer}/{name}")
    turned = scaling.input[place]
    order = graph.add_constant("order", np.array([1, 0]))
    position = list(graph.graph.node).index(scaling)
    graph.graph.node.insert(position, helper.make_node("Gather", [turned, order], ["wrong_scales"], axis=axis))
    graph.redirect([scaling], turned, "wrong_scales")


def _zero_folded_twice(graph: Graph, row: ProbeRow) -> None:
    def double(bias: NDArray[Any]) -> NDArray[Any]:
        return 2 * bias

    graph.change(f"{row.layer}.bias_with_zero", double)


def _sum_of_a_group_off_by_one(graph: Graph, row: ProbeRow) -> None:
    graph.insert_after(row.gemm, "Add", np.float32([[[1]], [[0]]]))


def _branch_added_twice(graph: Graph, row: ProbeRow) -> None:
    add = graph.producer(row.output)
    graph.redirect([add], next(name for name in add.input if name != row.low_rank), row.low_rank)


def _branch_off_by_one_in_a_thousand(graph: Graph, row: ProbeRow) -> None:
    graph.insert_after(row.low_rank, "Mul", np.float32(1.001))


LOWERED_LEARNED_FAULTS = (
    (OUT, LoweredFault("scale of the neighbour group", "scale_error", _scale_of_the_neighbour_group, ("cpu",))),
    (
        OUT,
        LoweredFault("sum scaled by its neighbour", "linear_output", _group_of_sums_scaled_by_its_neighbour, ("cpu",)),
    ),
    (OUT, LoweredFault("sum of a group off by one", "gemm_exact", _sum_of_a_group_off_by_one, ("cpu",))),
    (FF_OUT, LoweredFault("zero folded twice", "linear_output", _zero_folded_twice)),
    (CROSS_V, LoweredFault("branch in the place of the GEMM", "linear_output", _branch_added_twice)),
    (CROSS_V, LoweredFault("branch off by a thousandth", "linear_output", _branch_off_by_one_in_a_thousand)),
)


def row_of(graph: LoweredGraph, layer: str) -> ProbeRow:
    return next(row for row in graph.probes if row.layer == layer)
