"""Faults to plant: what a wrong exporter, pass or kernel would do to one layer or one step of the graph.

Portable faults edit the exported graph before lowering, so they reach every target; lowered faults edit one target's
graph, with the tensor names of its probe row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from export.formats.format import pack, unpack
from pipeline.backends.base import LoweredGraph
from pipeline.passes.probes import ProbeRow
from pipeline.verify.effort import Effort

Q, K, V = (f"transformer_blocks.1.attn1.to_{part}" for part in "qkv")
CROSS_V, FF_IN, FF_OUT = (f"transformer_blocks.1.{part}" for part in ("attn2.to_v", "ff.net.0.proj", "ff.net.2"))
FIRST_Q, FIRST_FF_OUT = "transformer_blocks.0.attn1.to_q", "transformer_blocks.0.ff.net.2"


# Enough for faults inside linears: no call beside the steps, but one for the gates that need some.
INSIDE_LINEARS = Effort(steps=(0, 1, 2), probed=(0, 2), pictures=4, special=(1,), inside=(), state=False)


class Graph:
    """An ONNX graph in memory, with the edits that faults are made of."""

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(path)
        self.graph = self.model.graph

    def save(self, path: Path) -> None:
        onnx.save(self.model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)

    def array(self, name: str) -> NDArray[Any]:
        return numpy_helper.to_array(self._tensor(name)).copy()

    def change(self, name: str, function: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
        tensor = self._tensor(name)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(function(self.array(name))), name))

    def _tensor(self, name: str) -> onnx.TensorProto:
        return next(tensor for tensor in self.graph.initializer if tensor.name == name)

    def add_constant(self, name: str, value: NDArray[Any]) -> str:
        self.graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def node(self, name: str) -> onnx.NodeProto:
        return next(node for node in self.graph.node if node.name == name)

    def nodes(self, op_type: str) -> list[onnx.NodeProto]:
        return [node for node in self.graph.node if node.op_type == op_type]

    def producer(self, tensor: str) -> onnx.NodeProto:
        return next(node for node in self.graph.node if tensor in node.output)

    def readers(self, tensor: str) -> list[onnx.NodeProto]:
        return [node for node in self.graph.node if tensor in node.input]

    def redirect(self, nodes: Iterable[onnx.NodeProto], old: str, new: str) -> None:
        """Have `nodes` read `new` in place of `old`."""
        for node in nodes:
            node.input[:] = [new if name == old else name for name in node.input]

    def insert_after(self, tensor: str, op_type: str, *constants: NDArray[Any]) -> None:
        """tensor := op(tensor, constants): every reader, and whoever asks for it by name, sees the result."""
        node, before = self.producer(tensor), f"{tensor}/before"
        node.output[:] = [before if name == tensor else name for name in node.output]
        names = [self.add_constant(f"{tensor}/fault_{i}", value) for i, value in enumerate(constants)]
        index = list(self.graph.node).index(node) + 1
        self.graph.node.insert(index, helper.make_node(op_type, [before, *names], [tensor]))


@dataclass(frozen=True)
class Fault:
    """A portable fault: `plant` edits the graph; `gate` is the one that must fail. `refused_by`: targets whose lowering
    does not take the faulty graph at all."""

    name: str
    gate: str
    plant: Callable[[Graph], None]
    refused_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoweredFault:
    """A fault of one target's lowering; `plant` gets the graph and the probe row of layer Q."""

    name: str
    gate: str
    plant: Callable[[Graph, ProbeRow], None]
    targets: tuple[str, ...] = ("cpu", "rtx", "cuda")


def of_targets(faults: Sequence[Fault], targets: Sequence[str], every: bool) -> list[tuple[str, Fault]]:
    """(target, fault), target by target. All lowerings inherit what is wrong in the portable graph: unless `every` is
    asked for, each fault is planted for one of them, those of one gate in turn; for all where some refuse it."""
    ranks, rows = Counter[str](), list[tuple[str, Fault]]()
    for fault in faults:
        of_all = every or fault.refused_by
        rows += [(target, fault) for target in (targets if of_all else [targets[ranks[fault.gate] % len(targets)]])]
        ranks[fault.gate] += 1
    return sorted(rows, key=lambda row: targets.index(row[0]))


def of_own_lowering(faults: Sequence[LoweredFault], targets: Sequence[str]) -> list[tuple[str, LoweredFault]]:
    """(target, fault), target by target, of faults in what a target does by itself."""
    return [(target, fault) for target in targets for fault in faults if target in fault.targets]


# --- in a layer's data ----------------------------------------------------------------------------------------------


def _swap_nibbles(graph: Graph) -> None:
    graph.change(f"{Q}.codes", lambda codes: (codes >> 4) | (codes << 4))


def _neighbour_scale(graph: Graph) -> None:
    graph.change(f"{K}.scales", lambda scales: np.roll(scales, 1, axis=0))


def _group_off_by_one(graph: Graph) -> None:
    graph.change(f"{Q}.multipliers", lambda indices: (indices >> 4) | (indices << 4))  # two groups, one byte


def _multiplier_off_by_one(graph: Graph) -> None:
    def raise_one(indices: NDArray[Any]) -> NDArray[Any]:
        indices[0, 0] += 1
        return indices

    graph.change(f"{Q}.multipliers", raise_one)


def _missing_bias(graph: Graph) -> None:
    graph.change(f"{V}.bias", np.zeros_like)


def _transposed_weight(graph: Graph) -> None:
    size = len(graph.array(f"{Q}.codes"))
    graph.change(f"{Q}.codes", lambda codes: pack(np.ascontiguousarray(unpack(codes, 4, size).T), 4))


def _one_wrong_code(graph: Graph) -> None:
    def flip(codes: NDArray[Any]) -> NDArray[Any]:
        codes[3, 5] ^= 1
        return codes

    graph.change(f"{FF_OUT}.codes", flip)


def _nan_bias(graph: Graph) -> None:
    def spoil(bias: NDArray[Any]) -> NDArray[Any]:
        bias[0] = np.nan
        return bias

    graph.change(f"{V}.bias", spoil)


def _exchanged_weights(graph: Graph) -> None:
    for part in ("codes", "scales", "multipliers"):
        key, value = graph.array(f"{K}.{part}"), graph.array(f"{V}.{part}")
        graph.change(f"{K}.{part}", lambda _, new=value: new)
        graph.change(f"{V}.{part}", lambda _, new=key: new)


# --- in the wiring --------------------------------------------------------------------------------------------------


def _stale_quantizer(graph: Graph) -> None:
    graph.redirect([graph.node(f"{V}/matmul")], f"{V}/dequantize", f"{FIRST_Q}/dequantize")


def _wrong_modulate_order(graph: Graph) -> None:
    shifted = graph.producer(graph.node(f"{Q}/quantize").input[0])
    scaled = graph.producer(shifted.input[0])
    plus_one = graph.producer(scaled.input[1])
    shift, scale = shifted.input[1], plus_one.input[0]
    for part in ("q", "k", "v"):  # the tensor feeds all three
        assert graph.node(f"transformer_blocks.1.attn1.to_{part}/quantize").input[0] == shifted.output[0]
    shifted.input[1], plus_one.input[0] = scale, shift


def _left_float(graph: Graph) -> None:
    x = graph.node(f"{CROSS_V}/quantize").input[0]
    graph.redirect([graph.node(f"{CROSS_V}/matmul")], f"{CROSS_V}/dequantize", x)


def _after_block(graph: Graph, last: str) -> str:
    """The residual sum that ends a block: gate * ff + residual."""
    gated = graph.readers(f"{last}/output")[0]
    return graph.readers(gated.output[0])[0].output[0]


def _skipped_block(graph: Graph) -> None:
    end, before = _after_block(graph, FF_OUT), _after_block(graph, FIRST_FF_OUT)
    graph.redirect(graph.readers(end), end, before)


def _dropped_residual(graph: Graph) -> None:
    gated = graph.readers(f"{FF_OUT}/output")[0].output[0]
    end = _after_block(graph, FF_OUT)
    graph.redirect(graph.readers(end), end, gated)


def _wrong_timestep_embedding(graph: Graph) -> None:
    sine = graph.nodes("Sin")[0].output[0]
    joined = next(node for node in graph.readers(sine) if node.op_type == "Concat")
    joined.input[:] = list(reversed(joined.input))


def _mask_ignored(graph: Graph) -> None:
    for softmax in graph.nodes("Softmax"):
        masked = graph.producer(softmax.input[0])
        if masked.op_type == "Add":
            softmax.input[0] = masked.input[0]


def _attention_scale(graph: Graph) -> None:
    scores = graph.producer(graph.nodes("Softmax")[0].input[0])
    scaled = graph.producer(scores.input[0])
    constant = scaled.input[1]
    scaled.input[1] = graph.add_constant("wrong_attention_scale", graph.array(constant) * np.float32(2))


def _wrong_gelu(graph: Graph) -> None:
    gelu = next(node for node in graph.readers(f"{FF_IN}/output") if node.op_type == "Gelu")
    del gelu.attribute[:]


def _shifted_positions(graph: Graph) -> None:
    graph.change("pos_embed.pos_embed", lambda table: np.roll(table, 1, axis=1))


PORTABLE_FAULTS = (
    Fault("swapped nibbles", "gemm_exact", _swap_nibbles),
    Fault("scale of the neighbour channel", "linear_output", _neighbour_scale),
    Fault("group off by one", "gemm_exact", _group_off_by_one),
    Fault("multiplier off by one", "gemm_exact", _multiplier_off_by_one),
    Fault("missing bias", "linear_output", _missing_bias),
    Fault("transposed weight", "gemm_exact", _transposed_weight),
    Fault("one wrong code", "gemm_exact", _one_wrong_code),
    Fault("NaN in one layer", "finite", _nan_bias),
    Fault("exchanged key and value weights", "gemm_exact", _exchanged_weights),
    Fault("stale shared quantizer", "step_sqnr_db", _stale_quantizer),
    Fault("wrong modulate order", "step_sqnr_db", _wrong_modulate_order),
    Fault("linear left float", "coverage", _left_float, refused_by=("rtx", "cuda")),
    Fault("skipped block", "step_sqnr_db", _skipped_block),
    Fault("dropped residual", "step_sqnr_db", _dropped_residual),
    Fault("wrong timestep embedding", "step_sqnr_db", _wrong_timestep_embedding),
    Fault("caption mask ignored", "step_sqnr_db", _mask_ignored),
    Fault("attention scale", "step_sqnr_db", _attention_scale),
    Fault("another GELU", "median_sqnr_db", _wrong_gelu),
    Fault("positions shifted", "step_sqnr_db", _shifted_positions),
)


# --- in a lowering --------------------------------------------------------------------------------------------------


def _wrong_zero_point(graph: Graph, row: ProbeRow) -> None:
    gemm = graph.producer(row.gemm)
    zero = next(i for i, name in enumerate(gemm.input) if name and graph_dtype(graph, name) == np.uint8 and i > 1)
    gemm.input[zero] = graph.add_constant("wrong_zero_point", np.asarray(graph.array(gemm.input[zero]) - 1))


def graph_dtype(graph: Graph, name: str) -> Any:
    """Element type of an initializer, None for another tensor."""
    matches = [tensor for tensor in graph.graph.initializer if tensor.name == name]
    return helper.tensor_dtype_to_np_dtype(matches[0].data_type) if matches else None


def _act_scale_doubled(graph: Graph, row: ProbeRow) -> None:
    graph.insert_after(row.act_scale, "Mul", np.float32(2))


def _clip_too_small(graph: Graph, row: ProbeRow) -> None:
    limit = 48 / row.codes_unit  # of the image, which reaches 60
    low, high = (row.codes_offset / row.codes_unit - limit, row.codes_offset / row.codes_unit + limit)
    dtype = np.uint8 if row.codes_offset else np.float32
    graph.insert_after(row.codes[0], "Clip", dtype(low), dtype(high))


def _gemm_off_by_one(graph: Graph, row: ProbeRow) -> None:
    graph.insert_after(row.gemm, "Add", np.float32(row.gemm_unit))


def _nan_scale(graph: Graph, row: ProbeRow) -> None:
    graph.insert_after(row.act_scale, "Mul", np.float32(np.nan))


LOWERED_FAULTS = (
    LoweredFault("wrong zero point", "gemm_exact", _wrong_zero_point, ("cpu",)),
    LoweredFault("activation scale off by 2", "scale_error", _act_scale_doubled),
    LoweredFault("clip too small", "codes_inadmissible", _clip_too_small),
    LoweredFault("sum off by one", "gemm_exact", _gemm_off_by_one),
    LoweredFault("NaN scale", "finite", _nan_scale),
)


def edited(graph: LoweredGraph, fault: LoweredFault, folder: Path) -> LoweredGraph:
    """A copy of a lowered graph with the fault planted in layer Q."""
    copy = Graph(graph.path)
    fault.plant(copy, next(row for row in graph.probes if row.layer == Q))
    copy.save(folder / graph.path.name)
    return LoweredGraph(folder / graph.path.name, graph.probes, graph.choices)
