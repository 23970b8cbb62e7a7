"""The kernel library for systems that this is not: compiled by cross compilers, run where an emulator is at hand."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from export.formats.operands import largest_code
from pipeline.backends.cpu.packed_gemm import multiplier_panels, weight_panels, weight_sums
from plugins.cpu import library
from tests.kernels.test_native_packed_gemm import expected, linear, operands

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
def test_the_kernels_run_on_windows(dll: Path, tmp_path: Path) -> None:
    """As wine gives it: the driver calls what the library exports; integers are equal to the bit."""
    need(WINE)
    command = ["clang", *library.WINDOWS_FLAGS, *libgcc(), f"-I{library.FOLDER}", str(SUPPORT / "kernel_driver.c")]
    subprocess.run([*command, str(dll), "-o", str(dll.with_name("driver.exe"))], check=True, timeout=120)
    wine = str(shutil.which(WINE, path=f"{os.environ['PATH']}:/usr/lib/wine"))
    environment = os.environ | {"WINEPREFIX": str(tmp_path / "wine"), "WINEDEBUG": "-all"}
    m, n, k = 13, 33, 1096
    gemm = linear("E2M1", "E3M4", "exact_group", 8, n, k)
    operand, codes = operands(gemm, m)
    numbers = [m, n, k, gemm.group_size, operand.zero, operand.weights[0], largest_code(gemm.activation, 2)]
    numbers += [1, 1, 1, 0]  # low codes, multipliers, one stretch of sums, a table
    arrays = [np.array(numbers, np.int64), *codes, weight_panels(gemm), multiplier_panels(gemm)]
    arrays += [gemm.weight.integers.astype(np.int8), gemm.unit_scales(), weight_sums(gemm)]
    answers = []
    for variant in ("plain", "avx2", "avx512_vnni"):
        done = subprocess.run(
            [wine, str(dll.with_name("driver.exe")), "packed_gemm", variant],
            input=b"".join(map(bytes, arrays)), capture_output=True, check=False, timeout=120, env=environment,
        )  # fmt: skip
        assert done.returncode in (0, 2), done.stderr.decode()[-2000:]
        if done.returncode == 0:  # 2: this processor has no such variant
            answers.append(np.frombuffer(done.stdout, np.float32).reshape(m, n))
    assert answers
    for answer in answers:
        np.testing.assert_array_equal(answer, expected(gemm, operand, codes))
