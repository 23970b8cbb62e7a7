"""Runs a TensorRT-RTX engine on an RTX GPU. Needs tensorrt_rtx and a PyTorch with CUDA (for memory and streams).

Buffers are made once for each set of input shapes, and TensorRT-RTX captures each as a CUDA graph. Kernels that the
runtime compiles for this GPU at the first call are kept in a cache file, so that the next process starts at once.
No machine with such a GPU was at hand: what needs one is compiled, not run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import TypedDict

from export.cache_folder import cache_folder
from export.errors import EnvironmentLacksError, RecipeError
from pipeline import machine
from pipeline.backends import feeds, metadata_file
from pipeline.backends.base import Arrays
from pipeline.backends.tensorrt.buffers import Buffers
from pipeline.backends.tensorrt.plan_file import read_header
from pipeline.backends.visible_gpu import visible_sm
from plugins.tensorrt import rtx_plugin

logger = logging.getLogger(__name__)
ENGINE, METADATA = "model.engine", metadata_file.NAME
CACHE_FOLDER = "rtx"


class RtxNeeds(TypedDict):
    """The release that loads the engine, and the GPUs that it holds code for."""

    tensorrt_rtx: str
    compute_capabilities: list[metadata_file.ComputeCapability]


class RtxMetadata(RtxNeeds, metadata_file.Shapes):
    """metadata.json of the target."""


def machine_problem(metadata: Mapping[str, Any], version: str, sm: int) -> str:
    """Why tensorrt_rtx `version` and a GPU of capability `sm` (0: none) cannot run an engine; empty if they can."""
    built, listed = metadata["tensorrt_rtx"], metadata["compute_capabilities"]
    if not sm:
        return "running the target rtx needs an NVIDIA RTX GPU and a PyTorch with CUDA; none is visible here"
    if sm not in listed:
        return f"the engine holds code for SM {listed}, this GPU is SM {sm}; build again with --target-sm {sm}"
    if machine.release(version) != machine.release(built):
        return f"the engine was built with tensorrt-rtx {built}, this is {version}; install that release or build again"
    return ""


def read_metadata(folder: Path) -> dict[str, Any]:
    """metadata.json of a built engine."""
    return dict(metadata_file.read(folder, RtxMetadata))


def cache_path(metadata: Mapping[str, Any], sm: int) -> Path:
    """File of the runtime cache: one for each engine, GPU generation and release, under the user's cache folder."""
    facts = [metadata["onnx_sha256"], metadata["onnx_data_sha256"], metadata["tensorrt_rtx"], sm]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    return cache_folder(CACHE_FOLDER, f"{key}-sm{sm}.cache")


def write_cache(path: Path, blob: bytes) -> None:
    """Write through a temporary name; a cache that cannot be written only costs time, so that is logged."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.write_bytes(blob)
        os.replace(part, path)
    except OSError as error:
        logger.warning(
            "the runtime cache %s cannot be written (%s); the next start compiles its kernels again", path, error
        )


class RtxEngine:
    """A deserialized engine on the current GPU. It may be called from any number of threads: buffers and context belong
    to one call at a time, which a lock sees to."""

    def __init__(self, folder: Path) -> None:
        """Raises EnvironmentLacksError before anything is deserialized where this machine cannot run the engine."""
        machine.require(("tensorrt_rtx", "torch"), "running the target rtx", "rtx")
        self.metadata = read_metadata(folder)
        sm = visible_sm()
        problem = machine_problem(self.metadata, machine.tool_version("tensorrt_rtx"), sm)
        if problem:
            raise EnvironmentLacksError(problem)
        read_header(folder / ENGINE)
        self._lock = threading.Lock()
        self._cache_path = cache_path(self.metadata, sm)
        self._buffers: dict[tuple[Any, ...], Buffers] = {}
        if self.metadata.get("plugins"):
            rtx_plugin.creators()
        self._open(folder / ENGINE)

    def _open(self, path: Path) -> None:
        import tensorrt_rtx as trt
        import torch

        self._runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise EnvironmentLacksError(f"tensorrt_rtx cannot load {path}; its messages above say why")
        config = self._engine.create_runtime_config()
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._cache = config.create_runtime_cache()
        self._load_cache()
        config.set_runtime_cache(self._cache)
        self._context = self._engine.create_execution_context(config)
        self._stream = torch.cuda.Stream()
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self._outputs = [n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT]
        dtypes = {name: trt.nptype(self._engine.get_tensor_dtype(name)) for name in names}
        self._declared = feeds.of_bounds(self.metadata["shapes"], dtypes)

    def _load_cache(self) -> None:
        if self._cache_path.is_file() and not self._cache.deserialize(self._cache_path.read_bytes()):
            logger.info("the runtime cache %s is of another driver or GPU and is made anew", self._cache_path)

    def run(self, inputs: Arrays) -> Arrays:
        """Outputs by name for inputs by name, NumPy on both sides. Raises RecipeError for inputs that do not fit."""
        import torch

        arrays = {name: np.array(array, order="C") for name, array in inputs.items()}
        feeds.check_feeds(self._declared, arrays)
        key = tuple((name, array.shape) for name, array in sorted(arrays.items()))
        with self._lock, torch.cuda.stream(self._stream):
            if self._context is None:
                raise RecipeError("the engine is closed; load it again")
            if key not in self._buffers:
                self._buffers[key] = Buffers.make(self._context, arrays, self._outputs, "cuda")
            return self._buffers[key].run(arrays, self._stream.cuda_stream)

    def close(self) -> None:
        """Keep the kernels compiled so far and free the GPU, after the call that is running."""
        with self._lock:
            if self._context is not None:
                blob = self._cache.serialize()
                if blob is not None:
                    write_cache(self._cache_path, bytes(memoryview(blob)))
            self._buffers.clear()
            self._context = self._engine = self._cache = None
