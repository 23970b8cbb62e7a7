"""Look inside a lowered graph: run it in stock onnxruntime with the tensors of its probe rows as extra outputs.

Nothing is written and no weight is copied: the changed graph is handed over as bytes, its external data stays in the
file beside the original. Layers are taken in batches, so that memory stays bounded at any model size.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.external_data_helper import ExternalDataInfo

from export.errors import ContractError
from pipeline.backends.base import Arrays, LoweredGraph, ProbeRow
from pipeline.gates import LinearProbe
from plugins.cpu import library

logger = logging.getLogger(__name__)
# Layers of the first batch, and bytes of probed tensors that later batches may hold at once.
FIRST_BATCH, BATCH_BYTES = 4, 2**30
FOLDER_OPTION = "session.model_external_initializers_file_folder_path"


def tensor_names(row: ProbeRow) -> tuple[str, ...]:
    """The tensors of one probe row, without gemm_scale (an initializer)."""
    return tuple(name for name in (row.x, *row.codes, row.act_scale, row.gemm, row.output, row.low_rank) if name)


class ProbedGraph:
    """A lowered graph that can be asked for the inner tensors of its quantized linears."""

    def __init__(self, lowered: LoweredGraph) -> None:
        """Reads the graph without its weights. Raises ContractError if its external data is missing or cut short."""
        self.path = lowered.path
        self.rows = {row.layer: row for row in lowered.probes}
        self.model = onnx.load(self.path, load_external_data=False)
        check_external_data(self.model, self.path)
        nodes = self.model.graph.node
        self.produced = {name for node in nodes for name in node.output} | {i.name for i in self.model.graph.input}

    @cached_property
    def complete(self) -> frozenset[str]:
        """Layers whose tensors are all in the graph; a probe row that points nowhere proves nothing."""
        constants = {item.name for item in self.model.graph.initializer} | {""}
        rows = (row for row in self.rows.values() if row.gemm_scale in constants)
        return frozenset(row.layer for row in rows if self.produced.issuperset(tensor_names(row)))

    def constant(self, name: str) -> NDArray | None:
        """An initializer by name, or None for ""."""
        if not name:
            return None
        return self._numbers(next(item for item in self.model.graph.initializer if item.name == name))

    def holds(self, table: NDArray[np.floating]) -> bool:
        """Is there an initializer of this shape, in whatever float type, with just these numbers?"""
        same = (item for item in self.model.graph.initializer if tuple(item.dims) == table.shape)
        return any(np.array_equal(self._numbers(item), table) for item in same)

    def _numbers(self, found: onnx.TensorProto) -> NDArray:
        if found.data_location != onnx.TensorProto.EXTERNAL:
            return onnx.numpy_helper.to_array(found)
        info, dtype = ExternalDataInfo(found), onnx.helper.tensor_dtype_to_np_dtype(found.data_type)
        flat = np.fromfile(self.path.parent / info.location, dtype, math.prod(found.dims), offset=info.offset or 0)
        return flat.reshape(found.dims)

    def denoiser(self) -> Callable[[Arrays], Arrays]:
        """The graph as it is, run by onnxruntime: stands in for an engine that this machine cannot run."""
        session = open_session(self.model, self.path.parent)
        names = [output.name for output in session.get_outputs()]
        return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))

    def run(self, names: Sequence[str], calls: Sequence[Arrays]) -> list[Arrays]:
        """The tensors `names` for each of the model inputs `calls`."""
        changed = onnx.ModelProto()
        changed.CopyFrom(self.model)
        inputs = {item.name for item in changed.graph.input}
        wanted = sorted(set(names) - inputs)
        del changed.graph.output[:]  # what only other outputs need is then not computed
        changed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
        session = open_session(changed, self.path.parent)
        del changed
        results = []
        for call in calls:
            fed = {name: call[name] for name in inputs}
            found = dict(zip(wanted, session.run(wanted, fed), strict=True))
            results.append(found | {name: fed[name] for name in names if name in inputs})
        return results

    def probes(self, layers: Sequence[str], calls: Sequence[Arrays]) -> Iterator[tuple[str, list[LinearProbe]]]:
        """For each layer what it computed in each call, a batch of layers at a time."""
        left, size = list(layers), FIRST_BATCH
        while left:
            batch, left = left[:size], left[size:]
            names = {name for layer in batch for name in tensor_names(self.rows[layer])}
            found = self.run(sorted(names), calls)
            held = sum(array.nbytes for tensors in found for array in tensors.values())
            size = max(1, int(BATCH_BYTES / max(held / len(batch), 1)))
            logger.debug("probed %d layers, %.0f MiB", len(batch), held / 2**20)
            for layer in batch:
                pairs = zip(found, calls, strict=True)
                yield layer, [self._probe(self.rows[layer], tensors, call) for tensors, call in pairs]

    def _probe(self, row: ProbeRow, tensors: Arrays, call: Arrays) -> LinearProbe:
        x = _rows(tensors[row.x])
        image = activation_image(row, [_rows(tensors[name]) for name in row.codes])
        gemm, (first, count) = tensors[row.gemm], row.gemm_columns
        gemm = gemm[..., first : first + count] if count else gemm
        return LinearProbe(
            x=x,
            image=image.reshape(x.shape),
            act_scale=tensors[row.act_scale].reshape(len(x), -1) if row.act_scale else None,
            gemm=_rows(gemm) if row.gemm_groups == 1 else gemm.transpose(1, 0, 2),
            output=_rows(tensors[row.output]) if row.output else None,
            gemm_unit=row.gemm_unit,
            gemm_scale=self.constant(row.gemm_scale),
            exact=row.exact,
            half_roundings=row.half_roundings,
            low_rank=_rows(tensors[row.low_rank]) if row.low_rank else None,
            timesteps=_timesteps(call, len(x)) if row.low_rank else None,
        )


def _timesteps(call: Arrays, rows: int) -> NDArray | None:
    """The timestep of each row: rows of one sample follow each other."""
    times = call.get("timestep")
    return None if times is None else np.repeat(times.reshape(-1), rows // times.size)


def activation_image(row: ProbeRow, codes: Sequence[NDArray]) -> NDArray[np.float64]:
    """Integer image of an activation from the hardware operands that hold it, see ProbeRow."""
    limbs = (
        weight * (np.asarray(code, np.float64) * row.codes_unit - row.codes_offset)
        for weight, code in zip(row.limb_weights, codes, strict=True)
    )
    return np.sum(list(limbs), axis=0)


def _rows(tensor: NDArray) -> NDArray:
    return tensor.reshape(-1, tensor.shape[-1])


def open_session(model: onnx.ModelProto, folder: Path) -> Any:
    """onnxruntime session of a graph without its weights, which lie in `folder`.

    Basic optimizations only: the extended ones break FP8 QDQ pairs. No constant folding: it would hold every 8-bit
    weight a second and third time, decoded to float32 and packed. Spinning threads are stopped between runs, since the
    engine under test and the reference take turns.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    # Freed tensors go back to the system: arena and memory pattern would keep room for all decoded weights at once.
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.add_session_config_entry(FOLDER_OPTION, str(folder.resolve()))
    options.add_session_config_entry("session.force_spinning_stop", "1")
    library.register(options, folder)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, ["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
    )


def check_external_data(model: onnx.ModelProto, path: Path) -> None:
    """Every initializer kept outside the graph must lie wholly inside its file and have the size of its type."""
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        info = ExternalDataInfo(tensor)
        data = path.parent / info.location
        size = data.stat().st_size if data.is_file() else -1
        expected = tensor_bytes(tensor)
        if size < 0 or (info.offset or 0) + expected > size or (info.length or expected) != expected:
            end = (info.offset or 0) + expected
            found = f"has {size} bytes" if size >= 0 else "is missing"
            raise ContractError(
                f"{data} {found}, but {tensor.name} ends at byte {end}; the file is damaged, build again"
            )


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of a tensor's data; types below one byte are packed without gaps."""
    bits = TYPE_BITS.get(tensor.data_type) or 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return -(-math.prod(tensor.dims) * bits // 8)


TYPE_BITS = {getattr(onnx.TensorProto, name): 4 for name in ("INT4", "UINT4", "FLOAT4E2M1")}
