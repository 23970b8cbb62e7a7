"""Look inside a lowered graph: run it in stock onnxruntime with the tensors of its probe rows as extra outputs, and
with those that its nodes of quantized attention read and give.

Nothing is written and no weight is copied: the changed graph is handed over as bytes, its external data stays in the
file beside the original. Layers are taken in batches, so that memory stays bounded at any model size.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.external_data_helper import ExternalDataInfo

from export.dialect.ops import DOMAIN, OPS
from export.formats.format import Format, get_format
from export.onnx_files import read_graph
from pipeline import machine
from pipeline.backends import feeds
from pipeline.backends.base import Arrays, LoweredGraph
from pipeline.backends.sessions import register_needed, runtime_errors, session_options
from pipeline.passes.probes import AttentionRow, ProbeRow
from pipeline.progress import raise_if_stopped
from pipeline.verify.attention_oracle import AttentionProbe
from pipeline.verify.oracle import LinearProbe
from pipeline.verify.parts import Parts, needed_nodes, part_of
from plugins.cpu import library

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

logger = logging.getLogger(__name__)
# Layers of the first batch, and bytes of probed tensors that later batches may hold at once.
FIRST_BATCH, BATCH_BYTES = 4, 2**28
# The op of the dialect, by its function body, and that of the kernel library, which has k and v as what another op of
# the library makes of them.
ATTENTION, OPERANDS = "QuantizedAttention", "AttentionOperands"
ATTENTION_INPUTS = len(OPS[ATTENTION].inputs)
FOLDER_OPTION = "session.model_external_initializers_file_folder_path"


def tensor_names(row: ProbeRow | AttentionRow) -> tuple[str, ...]:
    """The tensors of one row, without gemm_scale (an initializer) and a mask, which may be one."""
    if isinstance(row, AttentionRow):
        return row.q, row.k, row.v, row.output
    names = (row.x, *row.codes, row.act_scale, row.gemm, row.output, row.low_rank, *row.operands)
    return tuple(name for name in names if name)


def attention_rows(model: onnx.ModelProto) -> dict[str, AttentionRow]:
    """The quantized attentions of a graph by name. One that another has the name of is not among them, nor is one with
    other inputs than the op has."""
    rows: dict[str, AttentionRow] = {}
    operands = {
        node.output[0]: tuple(node.input)
        for node in model.graph.node
        if (node.op_type, node.domain) == (OPERANDS, library.DOMAIN) and node.output
    }
    for node in model.graph.node:
        if node.op_type != ATTENTION:
            continue
        read = _with_keys_and_values(node, operands)
        if len(read) == ATTENTION_INPUTS:
            q, k, v, mask = read
            layers = (item.s.decode() for item in node.attribute if item.name == "layer")
            rows |= {name: AttentionRow(name, node.domain, q, k, v, mask, node.output[0]) for name in layers}
    return rows


def _with_keys_and_values(node: onnx.NodeProto, operands: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """q, k, v and mask of an attention; less where its inputs are others. operands: what each was made of."""
    if node.domain == DOMAIN:
        return tuple(node.input)
    if node.domain != library.DOMAIN or len(node.input) != 3:
        return ()
    q, of_keys, mask = node.input
    return (q, *operands.get(of_keys, ()), mask)


@dataclass
class Beside:
    """More tensors that are kept while a graph is probed: `names` by layer, those of one call, by its place. arrays:
    what was kept; tokens: how many of a sample's, at most, or None for all. heads, masks: names of those that are
    [B, H, tokens, channels], and of those that broadcast to [B, H, tokens, tokens]."""

    call: int
    names: Mapping[str, Sequence[str]]
    tokens: int | None = None
    heads: frozenset[str] = frozenset()
    masks: frozenset[str] = frozenset()
    arrays: Arrays = field(default_factory=dict)

    def keep(self, layers: Sequence[str], tensors: Sequence[Arrays]) -> None:
        """tensors: what was computed for `layers` in each call."""
        names = {name for layer in layers for name in self.names.get(layer, ())}
        for name in names:
            array = tensors[self.call][name]  # [B, tokens, channels], or a picture, or one row for each sample
            if self.tokens and name in self.heads:
                array = array[:, :, : self.tokens].copy()
            elif self.tokens and name in self.masks:
                array = array[..., : self.tokens, : self.tokens].copy()
            elif self.tokens and array.ndim == 3:
                array = array[:, : self.tokens].copy()
            self.arrays[name] = array


class ProbedGraph:
    """A lowered graph that can be asked for the inner tensors of its quantized linears and attentions."""

    def __init__(self, lowered: LoweredGraph, threads: int | None = None) -> None:
        """Reads the graph without its weights. Raises ContractError if its external data is missing or cut short.

        threads: of each operation, see `machine.threads`.
        """
        self.path, self._threads = lowered.path, machine.threads(threads)
        self.rows = {row.layer: row for row in lowered.probes}
        self.model = read_graph(self.path)
        self.attentions = attention_rows(self.model)
        nodes = self.model.graph.node
        self.produced = {name for node in nodes for name in node.output} | {i.name for i in self.model.graph.input}

    @cached_property
    def complete(self) -> frozenset[str]:
        """Layers whose tensors are all in the graph; a probe row that points nowhere proves nothing."""
        constants = self._constants
        rows = (row for row in self.rows.values() if row.gemm_scale is None or row.gemm_scale in constants)
        return frozenset(row.layer for row in rows if self.produced.issuperset(tensor_names(row)))

    @cached_property
    def complete_attentions(self) -> frozenset[str]:
        """Attentions whose tensors are all in the graph."""
        rows = (row for row in self.attentions.values() if row.mask in self._constants | self.produced)
        return frozenset(row.layer for row in rows if self.produced.issuperset(tensor_names(row)))

    @cached_property
    def _constants(self) -> frozenset[str]:
        return frozenset(tensor.name for tensor in self.model.graph.initializer)

    @cached_property
    def weights(self) -> frozenset[str]:
        """Dequantized weights, which are the same in every call: decoders of stored tensors make them."""
        return frozenset(row.operands[1] for row in self.rows.values() if row.operands)

    def constant(self, name: str) -> NDArray:
        """An initializer by name."""
        return self._numbers(next(tensor for tensor in self.model.graph.initializer if tensor.name == name))

    def holds(self, table: NDArray[np.floating]) -> bool:
        """Is there an initializer of this shape, in whatever float type, with just these numbers?"""
        same = (tensor for tensor in self.model.graph.initializer if tuple(tensor.dims) == table.shape)
        return any(np.array_equal(self._numbers(tensor), table) for tensor in same)

    def _numbers(self, tensor: onnx.TensorProto) -> NDArray:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return onnx.numpy_helper.to_array(tensor)
        # Not by onnx, which refuses the hard links that lowered graphs may have for their data.
        info, dtype = ExternalDataInfo(tensor), onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        flat = np.fromfile(self.path.parent / info.location, dtype, math.prod(tensor.dims), offset=info.offset or 0)
        return flat.reshape(tensor.dims)

    def denoiser(self) -> Callable[[Arrays], Arrays]:
        """The graph as it is, run by onnxruntime: stands in for an engine that this machine cannot run. The function
        may be called from any number of threads. Its calls raise RecipeError for inputs that do not fit."""
        session = self._open(self.model)
        names, declared = [output.name for output in session.get_outputs()], feeds.of_session(session)

        def run(inputs: Arrays) -> Arrays:
            call = {name: np.array(array, order="C") for name, array in inputs.items()}
            feeds.check_feeds(declared, call)
            return self._call(session, names, call)

        return run

    def cut(self, names: Sequence[str], fed: Mapping[str, NDArray]) -> Callable[[Mapping[str, NDArray]], Arrays]:
        """What the graph computes for the tensors `names` when all that read those of `fed` get arrays of the same
        types and ranks. A tensor may be in both: it is computed, and others read what was given."""
        outputs = [f"{name}/cut" if name in fed else name for name in names]
        renamed = [
            _with_outputs(node, [f"{name}/cut" if name in fed else name for name in node.output])
            if any(name in fed for name in node.output)
            else node
            for node in self.model.graph.node
        ]
        part = part_of(self.model, needed_nodes(renamed, outputs), fed, outputs)
        for name, array in fed.items():  # of an op of ours, whose other outputs may be needed
            kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            part.graph.value_info.append(onnx.helper.make_tensor_value_info(f"{name}/cut", kind, [None] * array.ndim))
        session = self._open(part)

        def run(arrays: Mapping[str, NDArray]) -> Arrays:
            known = {value.name for value in session.get_inputs()}
            computed = self._call(session, outputs, {name: array for name, array in arrays.items() if name in known})
            return {name: computed[key] for name, key in zip(names, outputs, strict=True)}

        return run

    def _open(self, model: onnx.ModelProto) -> InferenceSession:
        with runtime_errors(self.path):
            return open_session(model, self.path.parent, self._threads)

    def _call(self, session: InferenceSession, names: Sequence[str], inputs: Arrays) -> Arrays:
        """Tensors by name. Raises ContractError where onnxruntime stops, as it does at a code beyond its table."""
        raise_if_stopped()
        with runtime_errors(self.path):
            return dict(zip(names, session.run(names, inputs), strict=True))

    def probes(
        self,
        layers: Sequence[str],
        calls: Sequence[Arrays],
        outputs: list[Arrays] | None = None,
        beside: Beside | None = None,
    ) -> Iterator[tuple[str, list[LinearProbe]]]:
        """For each linear what it computed in each call, see `all_probes`."""
        for layer, probes in self.all_probes(layers, calls, outputs, beside):
            yield layer, [probe for probe in probes if isinstance(probe, LinearProbe)]

    def all_probes(
        self,
        layers: Sequence[str],
        calls: Sequence[Arrays],
        outputs: list[Arrays] | None = None,
        beside: Beside | None = None,
    ) -> Iterator[tuple[str, list[LinearProbe] | list[AttentionProbe]]]:
        """For each layer, a linear or an attention, what it computed in each call, a batch of layers at a time, which
        should stand in the order of computation. `outputs` gets the model's own outputs in each call, which are
        computed with the last batch; `beside`: what else is kept."""
        more = beside or Beside(0, {})
        names = {layer: {*self._asked_for(layer), *more.names.get(layer, ())} for layer in layers}
        last = [output.name for output in self.model.graph.output]
        parts = Parts(
            self.model, self._open, calls, [*last, *(name for of_layer in names.values() for name in of_layer)]
        )
        left, size = list(layers), FIRST_BATCH
        while left:
            batch, left = left[:size], left[size:]
            asked = [name for layer in batch for name in names[layer]]
            if outputs is not None and not left:
                asked += last
            raise_if_stopped()
            with runtime_errors(self.path):
                tensors = parts.compute(asked, self.weights)
            if outputs is not None and not left:
                outputs += [{name: of_call[name] for name in last} for of_call in tensors]
            more.keep(batch, tensors)
            held = sum({id(array): array.nbytes for of_call in tensors for array in of_call.values()}.values())
            size = max(1, int(BATCH_BYTES / max(held / len(batch), 1)))
            logger.debug("probed %d layers, %.0f MiB", len(batch), held / 2**20)
            # The weights of a graph that computes them from an input, which is wrong, show in the other calls' outputs.
            weights = {name: array for name, array in tensors[0].items() if name in self.weights}
            for layer in batch:
                if layer in self.attentions:
                    yield layer, [self.attention_probe(self.attentions[layer], of_call) for of_call in tensors]
                    continue
                pairs = zip(tensors, calls, strict=True)
                yield layer, [self._probe(self.rows[layer], of_call | weights, call) for of_call, call in pairs]

    def _asked_for(self, layer: str) -> tuple[str, ...]:
        row = self.attentions.get(layer)
        if row is None:
            return tensor_names(self.rows[layer])
        return tensor_names(row) + (() if row.mask in self._constants else (row.mask,))

    def attention_probe(self, row: AttentionRow, tensors: Mapping[str, NDArray]) -> AttentionProbe:
        """An attention of the tensors that it reads and gives."""
        mask = self.constant(row.mask) if row.mask in self._constants else tensors[row.mask]
        return AttentionProbe(tensors[row.q], tensors[row.k], tensors[row.v], mask, tensors[row.output])

    def _probe(self, row: ProbeRow, tensors: Arrays, call: Arrays) -> LinearProbe:
        x = _rows(tensors[row.x])
        integers = activation_integers(row, [_rows(tensors[name]) for name in row.codes])
        gemm = tensors[row.gemm]
        if row.gemm_columns is not None:
            first, count = row.gemm_columns
            gemm = gemm[..., first : first + count]
        return LinearProbe(
            x=x,
            integers=integers.reshape(x.shape),
            act_scale=tensors[row.act_scale].reshape(len(x), -1) if row.act_scale else None,
            gemm=_rows(gemm) if row.gemm_groups == 1 else gemm.transpose(1, 0, 2),
            output=_rows(tensors[row.output]),
            gemm_unit=row.gemm_unit,
            gemm_scale=None if row.gemm_scale is None else self.constant(row.gemm_scale),
            exact=row.exact,
            half_roundings=row.half_roundings,
            low_rank=_rows(tensors[row.low_rank]) if row.low_rank else None,
            timesteps=_timesteps(call, len(x)) if row.low_rank else None,
            operand=_rows(tensors[row.operands[0]]) if row.operands else None,
            weight_operand=tensors[row.operands[1]] if row.operands else None,
        )


def _with_outputs(node: onnx.NodeProto, outputs: Sequence[str]) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.output[:] = outputs
    return copy


def _timesteps(call: Arrays, rows: int) -> NDArray | None:
    """The timestep of each row: rows of one sample follow each other."""
    times = call.get("timestep")
    return None if times is None else np.repeat(times.reshape(-1), rows // times.size)


def activation_integers(row: ProbeRow, codes: Sequence[NDArray]) -> NDArray[np.float64]:
    """Integers of an activation from the hardware operands that hold it, see ProbeRow."""
    if row.codes_format:
        return decoded_integers(get_format(row.codes_format), codes[0])
    limbs = (
        weight * (np.asarray(code, np.float64) * row.codes_unit - row.codes_offset)
        for weight, code in zip(row.limb_weights, codes, strict=True)
    )
    return np.sum(list(limbs), axis=0)


def decoded_integers(fmt: Format, codes: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Integers of codes of a format; NaN, which no gate lets pass, for codes that are no finite number of it."""
    numbers = np.full(2**8, np.nan)
    finite = np.isfinite(fmt.values)
    numbers[: len(fmt.values)][finite] = fmt.integers[finite]
    return numbers[codes]


def _rows(tensor: NDArray) -> NDArray:
    return tensor.reshape(-1, tensor.shape[-1])


def open_session(model: onnx.ModelProto, folder: Path, threads: int) -> InferenceSession:
    """onnxruntime session of a graph without its weights, which lie in `folder`.

    Basic optimizations only: the extended ones break FP8 QDQ pairs. No constant folding: it would hold every 8-bit
    weight a second and third time, decoded to float32 and packed. A graph with native ops gets the kernel library of
    this package; nothing in `folder` is run.
    """
    import onnxruntime

    options = session_options(threads)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    # Freed tensors go back to the system: arena and memory pattern would keep room for all decoded weights at once.
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.add_session_config_entry(FOLDER_OPTION, str(folder.resolve()))
    register_needed(options, {node.domain for node in model.graph.node})
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, ["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
    )
