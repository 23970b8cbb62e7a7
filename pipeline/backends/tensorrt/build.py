"""Drives the builders of TensorRT and TensorRT-RTX: ONNX file in, engine file out, their errors as errors of ours."""

from __future__ import annotations

import logging
import time
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx

from export.documents import whole_file
from export.errors import ContractError, ResourceError
from pipeline.backends.tensorrt.engine import RTX, TRT
from pipeline.files import sync

logger = logging.getLogger(__name__)
ShapeRange = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # least, usual, largest
Bounds = dict[str, ShapeRange]  # of each input
# What the metadata says of a build: shapes the engine takes, release of the builder. Times belong in the log, so that
# two builds of one graph have equal metadata.
Facts = dict[str, object]

# Smallest, usual and largest size of a dynamic dimension other than the batch: prompt tokens (T5 captions: 120, 300).
TOKEN_BOUNDS = (1, 120, 300)
LARGEST_BATCH = 8
PRODUCTS = {RTX: "TensorRT-RTX", TRT: "TensorRT"}


def shape_bounds(model: onnx.ModelProto, batch_size: int) -> Bounds:
    """Optimization profile: static dimensions as they are; guidance doubles the batch, so that is the usual size."""
    usual = 2 * batch_size
    batch = (1, usual, max(LARGEST_BATCH, usual))
    return {value.name: _input_bounds(value, batch) for value in model.graph.input}


def _input_bounds(value: onnx.ValueInfoProto, batch: tuple[int, int, int]) -> ShapeRange:
    dims = value.type.tensor_type.shape.dim
    columns = [
        (d.dim_value,) * 3 if d.HasField("dim_value") else (batch if axis == 0 else TOKEN_BOUNDS)
        for axis, d in enumerate(dims)
    ]
    least, usual, largest = (tuple(column[i] for column in columns) for i in range(3))
    return least, usual, largest


def build_engine(
    module: str,
    path: Path,
    engine_path: Path,
    sms: tuple[int, ...],
    batch_size: int,
    flags: tuple[str, ...] = ("STRONGLY_TYPED",),
) -> Facts:
    """Build the lowered graph at `path` and write it to `engine_path` through a temporary file.

    module: tensorrt or tensorrt_rtx. sms: the GPUs; TensorRT builds for the one at hand. flags: of the network;
    one that a release lacks is what it does anyway. Raises ContractError with the parser's node and message or the
    builder's reason, ResourceError where memory or disk runs out.
    """
    trt = import_module(module)
    log = make_logger(trt)
    builder = trt.Builder(log)
    known = (getattr(trt.NetworkDefinitionCreationFlag, flag, None) for flag in flags)
    network = builder.create_network(sum(1 << int(flag) for flag in known if flag is not None))
    started = time.monotonic()
    parser = parsed(trt, network, log, path)
    read = time.monotonic()
    shapes = shape_bounds(onnx.load(path, load_external_data=False), batch_size)
    engine = builder.build_serialized_network(network, _config(trt, builder, sms, shapes))
    if engine is None:
        raise build_error(trt, log.errors, sms)
    built = time.monotonic()
    del parser
    write_engine(engine_path, memoryview(engine))
    logger.info("%s: parsed in %.1f s, built in %.1f s", trt.__name__, read - started, built - read)
    return {"shapes": shapes, trt.__name__: trt.__version__}


def make_logger(trt: Any) -> Any:
    """A logger of that module, whose `errors` are kept."""

    class Log(trt.ILogger):
        """Collects errors and passes the rest on to our log."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)
            elif severity == trt.ILogger.Severity.WARNING:
                logger.info("%s: %s", trt.__name__, message)

    return Log()


def parsed(trt: ModuleType, network: Any, log: Any, path: Path) -> Any:
    """The parser, which owns weights that the network refers to. Raises ContractError with its node and message."""
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        rows = [f"node {error.node_name()} ({error.node_operator()}): {error.desc()}" for error in errors]
        raise ContractError(f"{PRODUCTS[trt.__name__]} cannot read {path.name}: {'; '.join(rows or log.errors)}")
    return parser


def _config(trt: ModuleType, builder: Any, sms: tuple[int, ...], shapes: Bounds) -> Any:
    config = builder.create_builder_config()
    if trt.__name__ == RTX:
        config.num_compute_capabilities = len(sms)
        for index, sm in enumerate(sms):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), index)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # The few GEMMs that stay in float32 shall give what the verified graph gives, not 10-bit products.
    if (tf32 := getattr(trt.BuilderFlag, "TF32", None)) is not None:
        config.clear_flag(tf32)
    profile = builder.create_optimization_profile()
    for name, (smallest, usual, largest) in shapes.items():
        profile.set_shape(name, smallest, usual, largest)
    config.add_optimization_profile(profile)
    return config


def build_error(trt: ModuleType, errors: list[str], sms: tuple[int, ...]) -> Exception:
    """What the builder's messages mean."""
    text, product = "; ".join(errors) or "no reason given", PRODUCTS[trt.__name__]
    if "memory" in text.lower() and "alloc" in text.lower():
        return ResourceError(f"{product} ran out of memory: {text}; close other programs, or build fewer --target-sm")
    return ContractError(f"{product} cannot build for SM {', '.join(map(str, sms))}: {text}")


def write_engine(path: Path, data: memoryview) -> None:
    """Write an engine, which is then on the disk. Raises ResourceError where that is full."""
    try:
        with whole_file(path) as part:
            part.write_bytes(data)
            sync(part)
    except OSError as error:
        raise ResourceError(
            f"{path}: {error}; free {data.nbytes / 2**20:.0f} MiB there or choose -o elsewhere"
        ) from error
