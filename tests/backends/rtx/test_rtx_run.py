"""Running an `rtx` engine: everything that can be checked where no RTX GPU is."""

from __future__ import annotations

import ctypes
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.errors import ContractError, EnvironmentLacksError, ResourceError
from pipeline.backends import metadata_file
from pipeline.backends.rtx import RtxBackend
from pipeline.backends.rtx import engine as rtx_engine
from pipeline.backends.rtx.engine import RtxMetadata, cache_path, machine_problem, write_cache
from pipeline.backends.tensorrt.engine import Buffers

torch = pytest.importorskip("torch", reason="torch is not installed")
SHAPES = {"x": [[1, 4], [2, 4], [8, 4]], "t": [[1], [2], [8]]}
METADATA: dict[str, Any] = {
    "tensorrt_rtx": "1.7.1.116",
    "compute_capabilities": [89, 120],
    "shapes": SHAPES,
    "onnx_sha256": "a" * 64,
    "onnx_data_sha256": "b" * 64,
}


def inputs(batch: int = 2) -> dict[str, np.ndarray]:
    return {"x": np.arange(batch * 4, dtype=np.float32).reshape(batch, 4), "t": np.ones(batch, np.float32)}


class DoublingContext:
    """Stands in for an execution context: y = 2 x, computed in host memory at the addresses it was given."""

    def __init__(self, works: bool = True) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.works, self.calls = works, 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return shape[0] <= 8

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["x"]

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        self.calls += 1
        count = int(np.prod(self.shapes["x"]))
        x, y = (self._array(name, count) for name in ("x", "y"))
        y[:] = 2 * x
        return self.works

    def _array(self, name: str, count: int) -> np.ndarray:
        pointer = ctypes.cast(self.addresses[name], ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, (count,))


# --- fitness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "sm", "words"),
    [
        ("1.7.1.116", 89, ""),
        ("1.7.9.1", 120, ""),
        ("1.8.0.0", 89, "built with tensorrt-rtx 1.7.1.116, this is 1.8.0.0"),
        ("1.7.1.116", 86, "holds code for SM [89, 120], this GPU is SM 86; build again with --target-sm 86"),
        ("1.7.1.116", 0, "needs an NVIDIA RTX GPU"),
    ],
)
def test_machine_problem(version: str, sm: int, words: str) -> None:
    problem = machine_problem(METADATA, version, sm)
    assert (words in problem) if words else problem is None


def test_without_a_gpu_loading_says_so_before_reading_the_engine(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA GPU")
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    (tmp_path / "rtx").mkdir()
    (tmp_path / "rtx" / "metadata.json").write_text(json.dumps(METADATA))
    with pytest.raises(EnvironmentLacksError, match="needs an NVIDIA RTX GPU"):
        RtxBackend().load(tmp_path)


def test_another_gpu_is_refused_before_reading_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    (tmp_path / "metadata.json").write_text(json.dumps(METADATA))
    monkeypatch.setattr(rtx_engine, "visible_sm", lambda: 90)
    with pytest.raises(EnvironmentLacksError, match="this GPU is SM 90"):
        rtx_engine.RtxEngine(tmp_path)


def test_a_damaged_engine_is_refused_before_it_is_deserialized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    metadata = METADATA | {"tensorrt_rtx": version("tensorrt-rtx")}
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    (tmp_path / "model.engine").write_bytes(b"vtrt" + bytes(200))
    monkeypatch.setattr(rtx_engine, "visible_sm", lambda: 89)
    with pytest.raises(ContractError, match="204 bytes, its header says 0"):
        rtx_engine.RtxEngine(tmp_path)


@pytest.mark.parametrize("text", [None, "", "{", "[1]"])
def test_damaged_metadata(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "metadata.json").write_text(text)
    with pytest.raises(ContractError, match=r"metadata\.json.*; build the engine again"):
        metadata_file.read(tmp_path, RtxMetadata)


# --- buffers -------------------------------------------------------------------------------------------------------


def test_buffers_bind_copy_and_return() -> None:
    context = DoublingContext()
    buffers = Buffers.make(context, 0, inputs(), ["y"], "cpu")
    addresses = dict(context.addresses)
    for scale in (1, 3):
        arrays = {name: array * np.float32(scale) for name, array in inputs().items()}
        assert np.array_equal(buffers.run(arrays)["y"], 2 * arrays["x"])
    assert context.calls == 2 and addresses.items() <= context.addresses.items()


def test_results_of_an_earlier_call_are_not_overwritten() -> None:
    buffers = Buffers.make(DoublingContext(), 0, inputs(), ["y"], "cpu")
    first = buffers.run(inputs())["y"]
    kept = first.copy()
    buffers.run({name: array + 1 for name, array in inputs().items()})
    assert np.array_equal(first, kept)


def test_a_failed_run_and_a_refused_shape_are_errors() -> None:
    with pytest.raises(ResourceError, match="could not be run"):
        Buffers.make(DoublingContext(works=False), 0, inputs(), ["y"], "cpu").run(inputs())
    with pytest.raises(ContractError, match=r"refuses shape \(9, 4\) of input x"):
        Buffers.make(DoublingContext(), 0, inputs(9), ["y"], "cpu")


# --- runtime cache -------------------------------------------------------------------------------------------------


def test_cache_files_differ_by_engine_gpu_and_release(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DITC_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    paths = {
        cache_path(METADATA, 89),
        cache_path(METADATA, 120),
        cache_path(METADATA | {"tensorrt_rtx": "1.7.2"}, 89),
        cache_path(METADATA | {"onnx_data_sha256": "c"}, 89),
    }
    assert len(paths) == 4 and all(path.parent == tmp_path / "ditc" / "rtx" for path in paths)


def test_cache_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.cache"
    write_cache(path, b"one")
    write_cache(path, b"two")
    assert path.read_bytes() == b"two" and list(path.parent.iterdir()) == [path]


def test_a_cache_that_cannot_be_written_is_only_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    write_cache(tmp_path / "file" / "a.cache", b"one")
    assert "cannot be written" in caplog.text
