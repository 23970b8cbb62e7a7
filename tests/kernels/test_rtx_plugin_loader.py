"""The library name that the TensorRT-RTX wheel lacks, supplied by an ELF file of our own."""

from __future__ import annotations

import ctypes
import math
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from export.errors import EnvironmentLacksError
from plugins.tensorrt import rtx_loader

linux = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in rtx_loader.MACHINES, reason="needs Linux on x86-64 or Arm"
)


def machine() -> int:
    return rtx_loader.MACHINES[platform.machine()]


@linux
def test_an_alias_answers_to_its_name_and_hands_out_what_it_needs(tmp_path: Path) -> None:
    name = "libditc_alias_of_m.so"
    with pytest.raises(OSError, match="cannot open shared object"):
        ctypes.CDLL(name)
    path = tmp_path / "any.so"
    path.write_bytes(rtx_loader.alias_library(name, "libm.so.6", machine()))
    ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    by_name = ctypes.CDLL(name)
    by_name.cos.restype, by_name.cos.argtypes = ctypes.c_double, [ctypes.c_double]
    assert by_name.cos(1.0) == math.cos(1.0)


@linux
def test_an_alias_of_nothing_is_refused_by_the_system(tmp_path: Path) -> None:
    path = tmp_path / "any.so"
    path.write_bytes(rtx_loader.alias_library("libditc_a.so", "libditc_is_nowhere.so", machine()))
    with pytest.raises(OSError, match=r"libditc_is_nowhere\.so"):
        ctypes.CDLL(str(path))


def test_the_bytes_depend_on_the_arguments_alone_and_are_few() -> None:
    first, second = (rtx_loader.alias_library(rtx_loader.MISSING, rtx_loader.REAL, 62) for _ in range(2))
    assert first == second and len(first) < 512
    assert first[:4] == b"\x7fELF" and first[18:20] == b"\x3e\0"
    assert first.endswith(b"\0libtensorrt_rtx.so.1\0libtensorrt_rtx.so\0")


LOAD = """
import ctypes
from plugins.tensorrt import rtx_loader
trt = rtx_loader.load()
assert rtx_loader.load() is trt
assert ctypes.CDLL("libtensorrt_rtx.so").getInferLibVersion() > 0
"""


@linux
@pytest.mark.rtx
@pytest.mark.parametrize("first", ["", "import tensorrt_rtx\n"], ids=["loaded first", "imported before"])
def test_the_wheel_is_found_under_the_name_that_it_lacks(first: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", first + LOAD], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_missing_package_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx_loader, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentLacksError, match="pip install tensorrt-rtx"):
        rtx_loader._named_library.__wrapped__()


def test_a_missing_library_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx_loader, "find_spec", lambda name: machine if name == "tensorrt_rtx" else None)
    monkeypatch.setattr(rtx_loader, "MISSING", "libditc_no_such_library.so")
    with pytest.raises(EnvironmentLacksError, match=r"no libtensorrt_rtx\.so\.1 .*rtx\.path=tensorrt"):
        rtx_loader._named_library.__wrapped__()


def test_a_processor_without_an_alias_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rtx_loader.platform, "machine", lambda: "riscv64")
    with pytest.raises(EnvironmentLacksError, match=r"riscv64; use --set rtx\.path=tensorrt"):
        rtx_loader._open_alias(tmp_path / rtx_loader.REAL)


@linux
def test_a_library_that_does_not_open_is_named(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentLacksError, match=r"libtensorrt_rtx\.so cannot be supplied"):
        rtx_loader._open_alias(tmp_path / rtx_loader.REAL)
