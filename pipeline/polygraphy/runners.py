"""Loaders and a runner for Polygraphy's Python API, beside its own.

    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.comparator import Comparator
    from pipeline.polygraphy.runners import DitcRunner, EngineFromBundle

    bundle = "engines/pixart_w4a6"
    portable = OnnxrtRunner(SessionFromOnnx(f"{bundle}/model.onnx"))
    results = Comparator.run([portable, DitcRunner(EngineFromBundle(bundle))], data_loader=calls)

This module imports polygraphy (extra `polygraphy`), so it is itself imported where it is used.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession
from polygraphy import util
from polygraphy.backend.base import BaseLoader, BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.datatype import DataType

from pipeline.backends.base import LoadedEngine
from pipeline.backends.cpu.engine import open_session, required
from pipeline.bundle.bundle import Bundle, load_bundle
from plugins.cpu import library


class EngineFromBundle(BaseLoader):
    """Loads an engine of a bundle, whose files are verified first."""

    def __init__(self, bundle: str | Path | Bundle, target: str = "auto", threads: int | None = None) -> None:
        """bundle: its folder, hf://OWNER/NAME, or what `load` gave. target: of the bundle; "auto": the fastest that
        this machine runs. threads: of a call on the CPU, None: as many as the machine allows."""
        self.bundle, self.target, self.threads = bundle, target, threads

    def call_impl(self) -> LoadedEngine:
        """Raises as `load_bundle` and `Bundle.engine`: ContractError, RecipeError, EnvironmentLacksError."""
        bundle = self.bundle if isinstance(self.bundle, Bundle) else load_bundle(self.bundle, self.threads)
        return bundle.engine(self.target)


class SessionFromCpuGraph(BaseLoader):
    """Loads one of a bundle's cpu/*.onnx for Polygraphy's OnnxrtRunner, as the engine does: with the kernel library
    where the graph needs it, and with the optimizations that change no number."""

    def __init__(self, path: str | Path, threads: int = 0) -> None:
        """path: of the graph, beside its metadata.json. threads: of a call; 0: as many as the machine allows."""
        self.path, self.threads = Path(path), threads

    def call_impl(self) -> InferenceSession:
        """Raises ContractError for a file that onnxruntime refuses."""
        with_library = library.requirement() in required(self.path.parent)
        return open_session(self.path, self.threads, with_library)


class DitcRunner(BaseRunner):
    """Runs an engine of a bundle: all of its graphs, what it keeps between calls, and its checks of inputs."""

    def __init__(self, engine: LoadedEngine | Callable[[], LoadedEngine], name: str | None = None) -> None:
        """engine: an engine, or what loads one, such as EngineFromBundle: then the runner closes it, too."""
        super().__init__(name=name, prefix="ditc-runner")
        self._engine = engine

    def activate_impl(self) -> None:
        self.engine, self._owned = util.invoke_if_callable(self._engine)

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Names, types and shapes; an axis of any size is None."""
        metadata = TensorMetadata()
        for row in self.engine.declared:
            shape = [size if isinstance(size, int) else None for size in row.shape]
            limits = {"min_shape": row.low, "max_shape": row.high} if row.low else {}
            metadata.add(row.name, dtype=DataType.from_dtype(np.dtype(row.dtype)), shape=shape, **limits)
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, Any]) -> OrderedDict[str, NDArray[Any]]:
        """Outputs by name. feed_dict: NumPy arrays or torch tensors. Raises RecipeError for inputs that do not fit."""
        inputs = {name: util.array.to_numpy(array) for name, array in feed_dict.items()}
        started = time.perf_counter()
        outputs = self.engine.run(inputs)
        self.inference_time = time.perf_counter() - started
        return OrderedDict(outputs)

    def deactivate_impl(self) -> None:
        if self._owned:
            self.engine.close()
        del self.engine, self._owned
