"""The targets by name. Backends are imported on first use, since each needs its own heavy packages."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from export.errors import EnvironmentLacksError
from pipeline.backends.base import Backend, Engine

logger = logging.getLogger(__name__)

# The portable model, from which the others are lowered. Its files stand at a bundle's root.
PORTABLE = "onnx"
# name -> (module, class)
ROWS = {
    "cpu": ("pipeline.backends.cpu.build", "CpuBackend"),
    "rtx": ("pipeline.backends.rtx.build", "RtxBackend"),
    "cuda": ("pipeline.backends.cuda.build", "CudaBackend"),
    "trt": ("pipeline.backends.trt.build", "TrtBackend"),
    PORTABLE: ("pipeline.backends.portable.build", "PortableBackend"),
}


class _LazyBackends(Mapping[str, Backend]):
    """Mapping of target name to backend that imports a backend when it is asked for."""

    def __init__(self) -> None:
        self._made: dict[str, Backend] = {}

    def __getitem__(self, name: str) -> Backend:
        if name not in self._made:
            module, class_name = ROWS[name]
            self._made[name] = getattr(import_module(module), class_name)()
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(ROWS)

    def __len__(self) -> int:
        return len(ROWS)


BACKENDS: Mapping[str, Backend] = _LazyBackends()


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
