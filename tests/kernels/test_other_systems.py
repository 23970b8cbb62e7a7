"""The kernel library for systems that this is not: compiled by cross compilers, run where an emulator is at hand."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from plugins.cpu import library
from tests.kernels import test_kernel_driver
from tests.kernels.test_native_epilogue import EPILOGUES
from tests.kernels.test_native_packed_gemm import LAYERS

pytestmark = pytest.mark.kernels
SUPPORT = Path(__file__).resolve().parents[1] / "support"
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unused-command-line-argument")
MINGW, WINE = "x86_64-w64-mingw32-gcc", "wine64"


def need(*tools: str) -> None:
    missing = [tool for tool in tools if shutil.which(tool, path=f"{os.environ['PATH']}:/usr/lib/wine") is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)}: not built")


def compiled(command: Sequence[str], path: Path, sources: Sequence[str] = library.SOURCES) -> Path:
    done = subprocess.run(
        [*command, *library.FLAGS, *WARNINGS, *sources, "-o", str(path)],
        cwd=library.FOLDER, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return path


def test_64_bit_arm_on_linux(tmp_path: Path) -> None:
    need("aarch64-linux-gnu-gcc")
    path = compiled(["aarch64-linux-gnu-gcc", *library.POSIX_FLAGS], tmp_path / "kernels.so")
    assert path.read_bytes()[:20].hex().startswith("7f454c460201") and path.read_bytes()[18] == 0xB7, "ELF of AArch64"


@pytest.mark.parametrize("processor", ["aarch64", "x86_64"])
def test_macos(processor: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("no ziglang, whose compiler brings what macOS needs (pip install ziglang): not built")
    command = [sys.executable, "-m", "ziglang", "cc", f"--target={processor}-macos", *library.POSIX_FLAGS]
    path = compiled(command, tmp_path / "kernels.so")
    assert path.read_bytes()[:8].hex() == f"cffaedfe{'0c000001' if processor == 'aarch64' else '07000001'}", "Mach-O"


@pytest.fixture(scope="module")
def dll(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library for Windows."""
    need("clang", MINGW)
    command = ["clang", *library.WINDOWS_FLAGS, *library.X86_FLAGS, *libgcc()]
    return compiled(command, tmp_path_factory.mktemp("windows") / "kernels.dll")


def libgcc() -> tuple[str, ...]:
    """Debian's folder of MinGW's libgcc has a name that clang does not look for."""
    name = [MINGW, "-print-libgcc-file-name"]
    return (f"-L{Path(subprocess.run(name, capture_output=True, text=True, check=True).stdout.strip()).parent}",)


def test_windows(dll: Path) -> None:
    data = dll.read_bytes()
    assert data[:2] == b"MZ" and b"RegisterCustomOps\0" in data


@pytest.mark.slow
def test_the_kernels_run_on_windows(dll: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As wine gives it: the driver calls what the library exports. The tests are those of the other machines."""
    need(WINE)
    command = ["clang", *library.WINDOWS_FLAGS, *libgcc(), f"-I{library.FOLDER}", str(SUPPORT / "kernel_driver.c")]
    subprocess.run([*command, str(dll), "-o", str(dll.with_name("driver.exe"))], check=True, timeout=120)
    monkeypatch.setenv("WINEPREFIX", str(tmp_path / "wine"))
    monkeypatch.setenv("WINEDEBUG", "-all")
    wine = str(shutil.which(WINE, path=f"{os.environ['PATH']}:/usr/lib/wine"))
    command = [wine, str(dll.with_name("driver.exe"))]
    machine = test_kernel_driver.Machine(command, ("plain", "avx2", "avx512_vnni"), all_run=False)
    tests = test_kernel_driver
    tests.test_products_are_exact(machine, ("E2M1", "E3M4", "exact_group", 8, 0), (13, 33, 1096))
    for stages in EPILOGUES:
        tests.test_an_epilogue_gives_the_bits_of_a_chain(machine, LAYERS[1], stages)
    tests.test_codes_are_those_of_the_dialect_and_of_the_stock_ops(machine, "E2M3", 1)
    tests.test_codes_are_those_of_the_dialect_and_of_the_stock_ops(machine, "E3M4", 2)
    tests.test_a_norm_has_the_same_bits_everywhere(machine, 391)
    tests.test_attention_is_within_its_bound(machine, (2, 1, 271, 129, 33), (0, 3))
    tests.test_attention_of_codes_is_within_its_bound(machine, (1, 1, 30, 1100, 33), ("E2M3", "INT6"))
    tests.test_products_with_float16_weights_are_within_their_bound(machine, (97, 40, 17))
