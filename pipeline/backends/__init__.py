"""The targets by name. A backend is imported on first use; what is heavy of it, when it is used."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from export.errors import EnvironmentLacksError
from pipeline import machine
from pipeline.backends.base import Backend, Engine, Options

logger = logging.getLogger(__name__)

# The portable model, from which the others are lowered. Its files stand at a bundle's root.
PORTABLE = "onnx"
# THE table of targets: name -> (module, class), a row for each. Everything else about a target is said by its class.
ROWS: dict[str, tuple[str, str]] = {
    "cpu": ("pipeline.backends.cpu", "CpuBackend"),
    "rtx": ("pipeline.backends.rtx", "RtxBackend"),
    "cuda": ("pipeline.backends.cuda", "CudaBackend"),
    "ort_cuda": ("pipeline.backends.ort_cuda", "OrtCudaBackend"),
    "trt": ("pipeline.backends.trt", "TrtBackend"),
    PORTABLE: ("pipeline.backends.portable", "PortableBackend"),
}


class _LazyBackends(Mapping[str, Backend[Options]]):
    """Mapping of target name to backend that imports a backend when it is asked for."""

    def __init__(self) -> None:
        self._instances: dict[str, Backend[Options]] = {}

    def __getitem__(self, name: str) -> Backend[Options]:
        module, class_name = ROWS[name]
        if name not in self._instances:
            self._instances[name] = getattr(import_module(module), class_name)()
        return self._instances[name]

    def __iter__(self) -> Iterator[str]:
        return iter(ROWS)

    def __len__(self) -> int:
        return len(ROWS)


BACKENDS: Mapping[str, Backend[Options]] = _LazyBackends()


def tool_versions() -> dict[str, str]:
    """Versions of all installed tools that may change a result, the targets' packages among them, and of Python."""
    return machine.tool_versions(backend.package for backend in BACKENDS.values())


@contextmanager
def opened(folder: Path, targets: tuple[str, ...], threads: int = 0) -> Iterator[dict[str, Engine]]:
    """The engines of a folder of verified files that this machine can run, closed at the end."""
    engines: dict[str, Engine] = {}
    try:
        for target in targets:
            try:
                engines[target] = BACKENDS[target].load(folder, threads)
            except EnvironmentLacksError as error:
                logger.info("the %s engine does not run here, its lowered graph stands in for it: %s", target, error)
        yield engines
    finally:
        for engine in engines.values():
            engine.close()
