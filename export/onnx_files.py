"""ONNX files that may come from anyone: what they name, and how long their data is, is checked before it is used."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx.external_data_helper import ExternalDataInfo

from export.documents import open_file
from export.errors import ContractError, UserError
from export.names import inside

REMEDY = "the file is damaged, build again"
TYPE_BITS = {getattr(onnx.TensorProto, name): 4 for name in ("INT4", "UINT4", "FLOAT4E2M1")}
TYPE_BITS |= {getattr(onnx.TensorProto, name): 2 for name in ("INT2", "UINT2") if hasattr(onnx.TensorProto, name)}
# What reading a graph of another form than `export` writes ends in: a key, an attribute, a shape that is not there.
MALFORMED = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Within, the graph in `path` is read that need not be ours: what its form causes becomes a ContractError."""
    try:
        yield
    except (UserError, NotImplementedError, RecursionError):
        raise  # the last two are RuntimeErrors, but faults of ours: protobuf refuses a file that is nested so deep
    except (*MALFORMED, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ContractError(f"{path} is not a model of this version's form ({reason}); build it again") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back what the exporter's packages log about every value they touch and every package they could support."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def read_graph(path: Path) -> onnx.ModelProto:
    """The graph in `path` without its external data, which is checked: names inside the folder, sizes as the types ask.

    Raises ContractError where it is no ONNX file, or damaged.
    """
    with open_file(path, remedy=REMEDY) as file:
        data = file.read()
    try:
        model = onnx.load_model_from_string(data)
    except (DecodeError, ValueError) as error:
        raise ContractError(f"{path} is not an ONNX file ({' '.join(str(error).split())}); {REMEDY}") from error
    check_tensors(model, path)
    return model


def load_model(path: Path) -> ir.Model:
    """The model in `path`, checked as `read_graph` does; its tensors are read from `path`.data where they are used.

    In the hub's cache that file is a link to a blob, and onnx_ir reads no link that leaves the folder. The tensors are
    then taken from where it ends, which is for the one who opens a bundle to judge
    (`pipeline.bundle.bundle.verify_files`).
    """
    read_graph(path)
    with reading(path):
        model = ir.load(path)
        data = path.with_name(f"{path.name}.data")
        bytes_of = {data.name: _mapped(data.resolve())} if data.is_file() else {}
        for graph in model.graphs():
            for value in graph.initializers.values():
                tensor = value.const_value
                if isinstance(tensor, ir.ExternalTensor) and tensor.location in bytes_of:
                    value.const_value = MappedTensor(tensor, data.resolve(), bytes_of[tensor.location])
    return model


def _mapped(file: Path) -> np.ndarray:
    """The bytes of a file, read where they are used; an empty file cannot be mapped."""
    return np.memmap(file, np.uint8, "r") if file.stat().st_size else np.empty(0, np.uint8)


class MappedTensor(ir.ExternalTensor):
    """A tensor of a file that is mapped once for all of its tensors.

    onnx_ir maps the file anew for every tensor, and every mapping of Python's holds a file descriptor: a model of a
    thousand tensors would ask for more than a process may have (1,024 on Linux by default, 256 on macOS).

    file: where the bytes are. data: all bytes of that file.
    """

    def __init__(self, tensor: ir.ExternalTensor, file: Path, data: np.ndarray) -> None:
        super().__init__(
            file.name,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=tensor.name,
            base_dir=file.parent,
        )
        start = tensor.offset or 0
        self.stored = data[start : start + tensor.nbytes]

    def numpy(self) -> np.ndarray:
        """Its values; those of types below one byte are unpacked at every call."""
        shape = self.shape.numpy()
        if self.dtype.bitwidth < 8:
            return ir.PackedTensor(self.stored, self.dtype, shape=shape).numpy()
        return self.stored.view(self.dtype.numpy()).reshape(shape)

    def __array__(self, dtype: Any = None) -> np.ndarray:
        return self.numpy().__array__(dtype)

    def tobytes(self) -> bytes:
        return self.stored.tobytes()


def check_tensors(model: onnx.ModelProto, path: Path) -> None:
    """Every tensor must have the bytes of its type and shape, in the graph or in a file of the same folder."""
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(tensor, path)
        elif tensor.HasField("raw_data") and len(tensor.raw_data) != tensor_bytes(tensor, path):
            sizes = f"{len(tensor.raw_data)} bytes, its type and shape ask for {tensor_bytes(tensor, path)}"
            raise ContractError(f"{path}: {tensor.name} has {sizes}; {REMEDY}")


def _check_external(tensor: onnx.TensorProto, path: Path) -> None:
    try:
        info = ExternalDataInfo(tensor)
    except ValueError as error:
        raise ContractError(f"{path}: {tensor.name} does not say where its data is ({error}); {REMEDY}") from error
    data = inside(path.parent, info.location, path)
    size = data.stat().st_size if data.is_file() else -1
    expected, offset = tensor_bytes(tensor, path), info.offset or 0
    if size < 0 or offset < 0 or offset + expected > size or (info.length or expected) != expected:
        state = f"has {size} bytes" if size >= 0 else "is missing"
        raise ContractError(f"{data} {state}, but {tensor.name} ends at byte {offset + expected}; {REMEDY}")


def tensor_bytes(tensor: onnx.TensorProto, path: Path) -> int:
    """Bytes of a tensor's data; types below one byte are packed without gaps. Raises ContractError for no type."""
    try:
        bits = TYPE_BITS.get(tensor.data_type) or 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, TypeError) as error:
        raise ContractError(f"{path}: {tensor.name} has no element type that is known; {REMEDY}") from error
    if any(size < 0 for size in tensor.dims):
        raise ContractError(f"{path}: {tensor.name} has the shape {list(tensor.dims)}; {REMEDY}")
    return -(-math.prod(tensor.dims) * bits // 8)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All tensors of a model: of its graph, of graphs in attributes, of its functions."""
    yield from _of_graph(model.graph)
    for function in model.functions:
        yield from _of_nodes(function.node)


def _of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors) if attribute.HasField("t") else attribute.tensors
            for sparse in attribute.sparse_tensors:
                yield from (sparse.values, sparse.indices)
            for graph in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                yield from _of_graph(graph)
