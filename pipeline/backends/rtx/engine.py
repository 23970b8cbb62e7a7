"""Runs a TensorRT-RTX engine on an RTX GPU. Needs tensorrt_rtx and a PyTorch with CUDA (for memory and streams).

Buffers are made once for each set of input shapes, and TensorRT-RTX captures each as a CUDA graph. Kernels that the
runtime compiles for this GPU at the first call are kept in a cache file, so that the next process starts at once.
No machine with such a GPU was at hand: what needs one is compiled, not run.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import NotRequired

from typing_extensions import TypedDict

from export.cache_folder import cache_folder
from export.documents import whole_file
from export.errors import EnvironmentLacksError
from pipeline import machine
from pipeline.backends import metadata_file
from pipeline.backends.base import Arrays
from pipeline.backends.tensorrt.engine import ENGINE, RTX, Buffers, DeserializedEngine
from pipeline.backends.tensorrt.plan_file import read_header
from pipeline.machine import visible_sm
from plugins.tensorrt import rtx_plugin

logger = logging.getLogger(__name__)
CACHE_FOLDER = "rtx"


class RtxNeeds(TypedDict):
    """The release that loads the engine, and the GPUs that it holds code for."""

    tensorrt_rtx: str
    compute_capabilities: list[metadata_file.ComputeCapability]


class RtxMetadata(RtxNeeds, metadata_file.Shapes, metadata_file.LoweredHashes):
    """metadata.json of the target. plugins: how many of each kernel."""

    plugins: NotRequired[dict[str, int]]


def machine_problem(metadata: RtxNeeds, version: str, sm: int) -> str | None:
    """Why tensorrt_rtx `version` and a GPU of capability `sm` (0: none) cannot run an engine; None if they can."""
    built, listed = metadata["tensorrt_rtx"], metadata["compute_capabilities"]
    if not sm:
        return "running the target rtx needs an NVIDIA RTX GPU and a PyTorch with CUDA; none is visible here"
    if sm not in listed:
        return f"the engine holds code for SM {listed}, this GPU is SM {sm}; build again with --target-sm {sm}"
    if machine.release(version) != machine.release(built):
        return f"the engine was built with tensorrt-rtx {built}, this is {version}; install that release or build again"
    return None


def cache_path(metadata: RtxMetadata, sm: int) -> Path:
    """File of the runtime cache: one for each engine, GPU generation and release, under the user's cache folder."""
    facts = [metadata["onnx_sha256"], metadata["onnx_data_sha256"], metadata["tensorrt_rtx"], sm]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    return cache_folder(CACHE_FOLDER, f"{key}-sm{sm}.cache")


def write_cache(path: Path, blob: bytes) -> None:
    """A cache that cannot be written only costs time, so that is logged."""
    try:
        with whole_file(path, shared=True) as part:
            part.write_bytes(blob)
    except OSError as error:
        logger.warning(
            "the runtime cache %s cannot be written (%s); the next start compiles its kernels again", path, error
        )


class RtxEngine(DeserializedEngine):
    """One context for all calls; buffers for each set of input shapes."""

    module = RTX

    def __init__(self, folder: Path) -> None:
        """Raises EnvironmentLacksError before anything is deserialized where this machine cannot run the engine."""
        machine.require((RTX, "torch"), "running the target rtx", "rtx")
        metadata, sm = metadata_file.read(folder, RtxMetadata), visible_sm()
        if problem := machine_problem(metadata, machine.tool_version(RTX), sm):
            raise EnvironmentLacksError(problem)
        read_header(folder / ENGINE)
        self._cache_path = cache_path(metadata, sm)
        if metadata.get("plugins"):
            rtx_plugin.creators()
        super().__init__(folder / ENGINE, metadata)

    def _open(self, path: Path) -> None:
        super()._open(path)
        import tensorrt_rtx as trt

        config = self._engine.create_runtime_config()
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._cache = config.create_runtime_cache()
        if self._cache_path.is_file() and not self._cache.deserialize(self._cache_path.read_bytes()):
            logger.info("the runtime cache %s is of another driver or GPU and is made anew", self._cache_path)
        config.set_runtime_cache(self._cache)
        self._context = self._engine.create_execution_context(config)

    def _prepared(self, arrays: Arrays) -> Buffers:
        return Buffers.make(self._context, self._stream.cuda_stream, arrays, self._outputs)

    def _release(self) -> None:
        """Keep the kernels compiled so far, too."""
        if self._engine is not None and (blob := self._cache.serialize()) is not None:
            write_cache(self._cache_path, bytes(memoryview(blob)))
        self._context = self._cache = None
        super()._release()
