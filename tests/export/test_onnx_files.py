"""A graph's tensors are read from its data file, which is mapped once, however many they are."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from export.onnx_files import load_model

try:
    import resource
except ModuleNotFoundError:  # Windows counts no file descriptors
    resource = None

ROOT = Path(__file__).parents[2]
N_TENSORS = 40
FEW_FILES = 100
DTYPES = (ir.DataType.FLOAT, ir.DataType.BFLOAT16, ir.DataType.INT8, ir.DataType.UINT4, ir.DataType.FLOAT4E2M1)


def tensor(name: str, dtype: ir.DataType, rows: int) -> ir.TensorProtocol:
    """rows * 7 small integers: an odd number of them ends within a byte where types are smaller than one."""
    values = np.random.default_rng(rows).integers(0, 3, (rows, 7))
    return ir.tensor(values.astype(dtype.numpy()), dtype=dtype, name=name)


def stored(path: Path, tensors: list[ir.TensorProtocol]) -> Path:
    """A model of these initializers alone; all their bytes are in the file beside it."""
    values = [ir.Value(name=t.name, const_value=t, type=ir.TensorType(t.dtype), shape=t.shape) for t in tensors]
    graph = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 24}, name="tensors")
    ir.save(ir.Model(graph, ir_version=13), path, external_data=f"{path.name}.data", size_threshold_bytes=0)
    return path


def open_files() -> int:
    """How many this process has open; a graph and its values refer to each other, and go when they are collected."""
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_are_what_onnx_ir_reads(tmp_path: Path, dtype: ir.DataType) -> None:
    path = stored(tmp_path / "model.onnx", [tensor(f"t{rows}", dtype, rows) for rows in (1, 2, 3)])
    expected = ir.load(path).graph.initializers
    for name, value in load_model(path).graph.initializers.items():
        ours, theirs = value.const_value, expected[name].const_value
        assert ours.dtype == theirs.dtype
        assert ours.tobytes() == theirs.tobytes()
        assert ours.numpy().dtype == theirs.numpy().dtype
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_a_model_is_saved_with_what_was_mapped(tmp_path: Path) -> None:
    path = stored(tmp_path / "model.onnx", [tensor(dtype.name, dtype, 3) for dtype in DTYPES])
    ir.save(load_model(path), tmp_path / "copy.onnx", external_data="copy.onnx.data", size_threshold_bytes=0)
    copies = load_model(tmp_path / "copy.onnx").graph.initializers
    for name, value in ir.load(path).graph.initializers.items():
        assert copies[name].const_value.tobytes() == value.const_value.tobytes()


def test_a_tensor_of_no_bytes(tmp_path: Path) -> None:
    path = stored(tmp_path / "model.onnx", [tensor("empty", ir.DataType.FLOAT, 0)])
    assert load_model(path).graph.initializers["empty"].const_value.numpy().shape == (0, 7)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="this system does not list a process's open files")
def test_a_data_file_is_opened_once(tmp_path: Path) -> None:
    path = stored(tmp_path / "model.onnx", [tensor(f"t{k}", ir.DataType.FLOAT, k) for k in range(1, N_TENSORS)])
    before = open_files()
    model = load_model(path)
    for value in model.graph.initializers.values():
        value.const_value.numpy()
    assert open_files() == before + 1
    del model, value
    assert open_files() == before


@pytest.mark.slow
@pytest.mark.skipif(resource is None, reason="this system does not limit a process's open files")
def test_a_build_needs_few_open_files(tmp_path: Path) -> None:
    # The model has more tensors than that; by default a process may open 1,024 files on Linux, 256 on macOS.
    command = [sys.executable, "-m", "pipeline.build", "--engine", "pixart_w4a6", "--target", "cpu,onnx"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (FEW_FILES, FEW_FILES))

    done = subprocess.run(
        [*command, "-o", str(tmp_path / "engine")],
        cwd=ROOT,
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(load_model(tmp_path / "engine/model.onnx").graph.initializers) > FEW_FILES
