"""What a plugin does at run time, with a driver that records its launches: no GPU, no TensorRT."""

from __future__ import annotations

import base64
import ctypes
import json
import zlib
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.errors import ContractError, EnvironmentLacksError, ResourceError
from plugins.gpu.spec import GemmSpec, QuantizeSpec
from plugins.gpu.table import kernel as kernel_row
from plugins.tensorrt import rtx_driver
from plugins.tensorrt.payload import FIELD, LARGEST_BYTES, PLUGINS, Payload, Variant, from_text
from plugins.tensorrt.rtx_driver import Arguments, CudaDriver
from plugins.tensorrt.rtx_launcher import Launcher

GEMM = GemmSpec("E2M3", "E2M1", 64, 96, 32, (1, 2, 3), epilogue="gate_residual", output="fp32")
NORM = QuantizeSpec("E2M3", 64, "norm_modulate", "fp32")


@dataclass
class RecordingDriver:
    """Handles are numbers in the order of loading; a launch is kept with the values behind its parameter pointers."""

    sm: int = 89
    loaded: list[tuple[bytes, str, int]] = field(default_factory=list)
    launches: list[tuple[Any, ...]] = field(default_factory=list)
    types: tuple[str, ...] = ()

    def capability(self) -> int:
        return self.sm

    def function(self, cubin: bytes, name: str, shared_bytes: int) -> int:
        key = (cubin, name, shared_bytes)
        if key not in self.loaded:
            self.loaded.append(key)
        return self.loaded.index(key) + 100

    def launch(self, function: int, grid: Any, threads: int, shared_bytes: int, stream: int, params: Any) -> None:
        sizes = [ctypes.c_uint64 if kind.startswith("*") else ctypes.c_int32 for kind in self.types]
        values = tuple(kind.from_address(at).value for kind, at in zip(sizes, params, strict=True))
        self.launches.append((function, grid, threads, shared_bytes, stream, values))


def payload(kernel: str, spec: Any, sms: tuple[int, ...] = (89, 120), rows: tuple[int, ...] = (64, 4096)) -> Payload:
    row = kernel_row(kernel)
    types = (*(a.type_for(spec) for a in row.arguments_of(spec)), "*i8", "*i8")
    variants = tuple(
        Variant(sm, most, asdict(row.tile(spec, most, sm)), kernel, types, 128, 1000 + most, f"{sm} {most}".encode())
        for sm in sms
        for most in rows
    )
    return Payload(kernel, spec, variants)


def launcher(kernel: str, spec: Any, **choices: Any) -> tuple[Launcher, RecordingDriver]:
    contents = payload(kernel, spec, **choices)
    recording = RecordingDriver(types=contents.variants[0].types)
    return Launcher(contents, recording), recording


def gemm_shapes(batch: int, tokens: int) -> list[tuple[int, ...]]:
    """a, a_scale, w, w_scales, multiplier_codes, bias, gate, residual."""
    constants = [(96, 32), (96, 1), (96, 1), (96,)]
    return [(batch, tokens, 64), (batch, tokens, 1), *constants, (batch, 1, 96), (batch, tokens, 96)]


def test_a_gemm_is_launched_with_inputs_sizes_and_outputs_in_the_kernels_order() -> None:
    gemm, recording = launcher("packed_gemm", GEMM)
    gemm.load()
    gemm.prepare(gemm_shapes(2, 50))
    gemm.launch(range(11, 19), [99], stream=7)
    ((function, grid, threads, shared, stream, values),) = recording.launches
    tile = gemm.payload.tile(gemm.variant)
    assert values == (*range(11, 19), 100, 50, 99, 0, 0)  # M, tokens; Triton's scratch pointers are null
    assert grid == (-(-100 // tile.m) * -(-96 // tile.n), 1, 1)
    assert (threads, shared, stream) == (128, 1000 + 4096, 7)
    assert recording.loaded[function - 100][0] == b"89 4096"


def test_a_norm_shares_shift_and_scale_over_the_tokens_of_a_sample() -> None:
    norm, recording = launcher("norm_modulate_quantize", NORM)
    norm.prepare([(2, 256, 64), (2, 1, 64), (2, 1, 64)])
    norm.launch([1, 2, 3], [4, 5], stream=0)
    assert recording.launches[0][-1] == (1, 2, 3, 512, 256, 4, 5, 0, 0)


def test_one_gate_for_all_samples_is_shared_by_all_rows() -> None:
    gemm, recording = launcher("packed_gemm", GEMM)
    shapes = gemm_shapes(3, 10)
    shapes[6] = (1, 1, 96)
    gemm.prepare(shapes)
    gemm.launch(range(8), [9], stream=0)
    assert recording.launches[0][-1][8:10] == (30, 30)


def test_a_launch_loads_nothing_and_reuses_its_memory() -> None:
    gemm, recording = launcher("packed_gemm", GEMM)
    gemm.load()
    assert [code for code, _, _ in recording.loaded] == [b"89 64", b"89 4096"]
    gemm.prepare(gemm_shapes(1, 8))
    arguments, addresses = gemm.arguments, list(gemm.arguments.params)
    for stream in range(3):
        gemm.launch(range(stream, stream + 8), [stream], stream)
    assert len(recording.loaded) == 2 and gemm.arguments is arguments and list(arguments.params) == addresses
    assert [launch[4] for launch in recording.launches] == [0, 1, 2]
    assert recording.launches[0][3] == 1000 + 64


@given(batch=st.integers(1, 8), tokens=st.integers(1, 700))
def test_every_row_has_a_program_and_a_tile_that_is_meant_for_it(batch: int, tokens: int) -> None:
    gemm, recording = launcher("packed_gemm", GEMM)
    gemm.prepare(gemm_shapes(batch, tokens))
    gemm.launch(range(8), [9], stream=0)
    tile, rows = gemm.payload.tile(gemm.variant), batch * tokens
    assert gemm.variant.rows == (64 if rows <= 64 else 4096)
    assert recording.launches[0][1][0] * tile.m * tile.n >= rows * 96
    assert recording.launches[0][-1][8:10] == (rows, tokens)


def test_no_rows_no_launch() -> None:
    quantizer, recording = launcher("quantize", QuantizeSpec("E2M3", 64))
    quantizer.prepare([(0, 64)])
    quantizer.launch([1], [2, 3], stream=0)
    assert recording.launches == []


def test_rows_that_no_tile_was_chosen_for_get_the_largest() -> None:
    gemm, _ = launcher("packed_gemm", GEMM)
    gemm.prepare(gemm_shapes(8, 1024))
    assert gemm.variant.rows == 4096


# --- refused -------------------------------------------------------------------------------------------------------


def test_another_gpu_is_refused_before_anything_is_loaded() -> None:
    gemm, recording = launcher("packed_gemm", GEMM)
    recording.sm = 86
    with pytest.raises(EnvironmentLacksError, match=r"code for SM \[89, 120\], this GPU is SM 86; .*--target-sm 86"):
        gemm.load()
    assert recording.loaded == []


def test_shapes_that_do_not_fit_are_refused() -> None:
    norm, _ = launcher("norm_modulate_quantize", NORM)
    with pytest.raises(ContractError, match="100 rows do not fit"):
        norm.prepare([(4, 25, 64), (3, 1, 64), (3, 1, 64)])
    with pytest.raises(ContractError, match="100 rows do not fit"):
        norm.prepare([(4, 25, 64), (4, 1, 64), (2, 1, 64)])


def test_a_machine_without_a_driver_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx_driver, "LIBRARY", "libditc_no_driver.so")
    with pytest.raises(EnvironmentLacksError, match="plugins run on an NVIDIA GPU"):
        CudaDriver()


class FakeCuda:
    """The driver's C functions: they note their calls and answer with the handle 5, or with an error."""

    def __init__(self, failing: str = "") -> None:
        self.calls: list[str] = []
        self.failing = failing

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == "cuGetErrorName":
                arguments[1]._obj.value = b"CUDA_ERROR_TEST"
            elif arguments and hasattr(arguments[0], "_obj"):
                arguments[0]._obj.value = 5
            return 700 if name == self.failing else 0

        return call


def cuda(failing: str = "") -> tuple[CudaDriver, FakeCuda]:
    driver, fake = CudaDriver.__new__(CudaDriver), FakeCuda(failing)
    driver._cuda, driver._loaded = fake, {}  # type: ignore[assignment]
    return driver, fake


def test_the_driver_loads_a_kernel_once_and_allows_its_shared_memory() -> None:
    driver, fake = cuda()
    assert driver.function(b"code", "kernel", 100_000) == 5 == driver.function(b"code", "kernel", 100_000)
    assert fake.calls == [
        "cuCtxGetCurrent", "cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute", "cuCtxGetCurrent",
    ]  # fmt: skip
    assert driver.capability() == 55


def test_a_launch_is_one_call() -> None:
    driver, fake = cuda()
    driver.launch(5, (3, 2, 1), 128, 0, 9, Arguments(["*u8", "i32"]).params)
    assert fake.calls == ["cuLaunchKernel"]


def test_the_drivers_errors_are_named() -> None:
    driver, _ = cuda("cuModuleLoadData")
    with pytest.raises(ResourceError, match="cuModuleLoadData failed with CUDA_ERROR_TEST"):
        driver.function(b"code", "kernel", 0)


# --- the text that a plugin carries --------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "spec"), [("packed_gemm", GEMM), ("norm_modulate_quantize", NORM)])
def test_a_payload_survives_as_text(kernel: str, spec: Any) -> None:
    original = payload(kernel, spec)
    assert from_text(original.to_text()) == original and original.to_text().isascii()
    assert original.sms == (89, 120)


@given(code=st.binary(max_size=200), rows=st.integers(1, 2**31))
def test_any_machine_code_survives(code: bytes, rows: int) -> None:
    variant = Variant(89, rows, {"rows": 1, "block": 64, "tail": 0, "num_warps": 1}, "e", ("*u8",), 32, 0, code)
    original = Payload("quantize", QuantizeSpec("E2M3", 64), (variant,))
    assert from_text(original.to_text()) == original


def test_equal_layers_share_code_that_one_of_them_carries() -> None:
    carrying = payload("quantize", QuantizeSpec("E2M3", 96))
    naming = from_text(carrying.shared().to_text())
    assert naming.variants == () and len(naming.to_text()) < len(carrying.to_text())
    with pytest.raises(ContractError, match="no plugin of the engine carries the code"):
        naming.complete()
    from_text(carrying.to_text())
    assert naming.complete() == carrying == carrying.complete()


def test_every_plugin_is_a_kernel_of_the_table() -> None:
    assert [kernel_row(name).name for name in PLUGINS] == list(PLUGINS) and FIELD == "payload"


def packed(document: bytes) -> str:
    return base64.b64encode(zlib.compress(document)).decode()


def changed(**fields: Any) -> str:
    document = json.loads(zlib.decompress(base64.b64decode(payload("packed_gemm", GEMM).to_text())))
    return packed(json.dumps({**document, **fields}).encode())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("not base 64", "cannot be read"),
        (changed(schema=2), "schema 2, this version reads 1"),
        (changed(kernel="gone"), "'gone' is not in the table"),
        (changed(spec={"activation": "E2M3"}), "cannot be read"),
        (changed(variants=[{"sm": 89}]), "cannot be read"),
        (changed(spec=[1]), "cannot be read"),
        (packed(b"[" * 100_000), "cannot be read"),
        (packed(b" " * (LARGEST_BYTES + 1)), "more than 268435456 bytes"),
        (base64.b64encode(zlib.compress(b"{}")[:-4]).decode(), "or cut short"),
    ],
)
def test_a_damaged_payload_is_refused(text: str, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        from_text(text)
