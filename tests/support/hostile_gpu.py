"""Bundles with engines for GPUs, to be damaged on a machine without one: their files, and a GPU that is pretended.

The engine of `cuda` is a true build and runs on the CPU. Of `rtx` and `trt` there is metadata.json, as their builds
write it, and a file that has a true header only; the vendor's runtime is not asked.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.errors import EnvironmentLacksError
from pipeline import machine
from pipeline.backends import feeds
from pipeline.backends.cuda import engine as cuda_engine
from pipeline.backends.rtx import engine as rtx_engine
from pipeline.backends.tensorrt.plan_file import CAPABILITIES_AT, HEADER_SIZE, MAGIC, SIZE_AT, SM_BITS
from pipeline.backends.trt import engine as trt_engine
from pipeline.bundle import bundle as bundles

SM = 89
NO_GPU = "is well described, and there is no GPU here"
RELEASES = {"tensorrt_rtx": "1.7.1.116", "tensorrt": "10.9.0.34", "triton": "3.6.0"}
RUNTIMES = {"rtx": "tensorrt_rtx", "trt": "tensorrt"}


def add_engines(folder: Path) -> None:
    """Put targets `rtx` and `trt` into the bundle in `folder`, which has `cuda`."""
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    rows = json.loads((folder / "cuda/metadata.json").read_text())["inputs"]
    sizes = {"batch": (1, 2, 8), "tokens": (1, 120, 300)}
    shapes = {
        name: [[sizes[size][i] if isinstance(size, str) else size for size in row["shape"]] for i in range(3)]
        for name, row in rows.items()
    }
    for target, runtime in RUNTIMES.items():
        (folder / target).mkdir()
        hashes = {"onnx_sha256": "0" * 64, "onnx_data_sha256": "1" * 64}
        metadata = {runtime: RELEASES[runtime], "compute_capabilities": [SM], "shapes": shapes, **hashes}
        (folder / target / "metadata.json").write_text(json.dumps(metadata))
        (folder / target / "model.engine").write_bytes(_engine())
        shutil.copyfile(folder / "cuda/lowering.json", folder / target / "lowering.json")
        names = [f"{target}/{name}" for name in ("lowering.json", "metadata.json", "model.engine")]
        choices = document["targets"]["cuda"]["choices"]
        document["targets"][target] = {"files": names, "metadata": metadata, "choices": choices}
    path.write_text(json.dumps(document))


def _engine() -> bytes:
    header = bytearray(HEADER_SIZE + 100)
    header[: len(MAGIC)] = MAGIC
    struct.pack_into("<Q", header, SIZE_AT, len(header))
    struct.pack_into("<Q", header, CAPABILITIES_AT, SM_BITS[SM])
    return bytes(header)


def pretend_gpu(patch: pytest.MonkeyPatch) -> None:
    """A GPU and all runtimes seem to be here: engines are loaded up to where the vendor's code would be called."""
    tool_version = machine.tool_version
    patch.setattr(machine, "tool_version", lambda name: RELEASES.get(name) or tool_version(name))
    patch.setattr(machine, "require", lambda *_: None)
    patch.setattr(bundles.machine, "cuda_sm", lambda: SM)
    for module in (rtx_engine, trt_engine, cuda_engine):
        patch.setattr(module, "visible_sm", lambda: SM)
    patch.setattr(cuda_engine.CudaEngine.__init__, "__defaults__", ("cpu",))
    for engine in (rtx_engine.RtxEngine, trt_engine.TrtEngine):
        patch.setattr(engine, "_open", _open)


def _open(self: Any, path: Path) -> None:
    """What becomes of metadata.json when the vendor's runtime has read the engine, whose inputs are the model's."""
    dtypes = {"hidden_states": np.float32, "encoder_hidden_states": np.float32, "timestep": np.float32}
    dtypes |= {"encoder_attention_mask": np.float32, "sample": np.float32}
    feeds.of_bounds(self.metadata["shapes"], dtypes)
    raise EnvironmentLacksError(f"{path}: {NO_GPU}")
