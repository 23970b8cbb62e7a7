"""The kernels without onnxruntime: under the address and undefined-behaviour sanitizers, with AVX-VNNI's instruction
made of others, and on 64-bit Arm in an emulator. Integers are equal to the bit, attention is within its bound."""

import functools
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from export.formats.operands import largest_code
from pipeline.backends.cpu.half_gemm import half_panels
from pipeline.backends.cpu.packed_gemm import multiplier_panels, weight_panels, weight_sums
from plugins.cpu import library
from tests.kernels import test_native_half_gemm as half
from tests.kernels.test_native_attention import reference, tensors
from tests.kernels.test_native_packed_gemm import LAYERS, SHAPES, expected, linear, operands
from tests.support import native

pytestmark = pytest.mark.kernels

GEMM, ATTENTION, HALF = (library.FOLDER / name for name in ("packed_gemm.c", "attention.c", "half_gemm.c"))
STRICT = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover")
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64-static"
_FOLDER = tempfile.TemporaryDirectory(prefix="ditc-test-")


SUPPORT = Path(__file__).resolve().parents[1] / "support"


@functools.cache
def driver(name: str, compiler: str, flags: tuple[str, ...], sources: tuple[Path, ...]) -> str:
    path = Path(_FOLDER.name) / name
    files = [str(source) for source in (SUPPORT / "kernel_driver.c", *sources)]
    common = ("-std=c11", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Werror", f"-I{library.FOLDER}")
    subprocess.run([compiler, *common, *flags, *files, "-lm", "-o", str(path)], check=True, timeout=120)
    return str(path)


@pytest.fixture(params=["sanitizers", "vnni", "arm"])
def machine(request):
    """(command that starts the driver, names of the variants that it has)."""
    if request.param == "sanitizers":
        native.need_compiler()
        command = [driver("strict", library.compiler(), STRICT, (GEMM, ATTENTION, HALF))]
        return command, ("plain", "avx2", "avx_vnni", "avx512_vnni", "dotprod")
    if request.param == "vnni":
        native.need_compiler()
        if platform.machine() not in ("x86_64", "AMD64"):
            pytest.skip(f"this processor is no x86-64 but {platform.machine()}")
        return [driver("vnni", library.compiler(), ("-O3",), (SUPPORT / "emulated_vnni.c", ATTENTION, HALF))], (
            "avx_vnni",
        )
    missing = [tool for tool in (ARM_COMPILER, ARM_EMULATOR) if shutil.which(tool) is None]
    if missing:
        pytest.skip(
            f"no {' and no '.join(missing)} (Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static)"
        )
    return [ARM_EMULATOR, "-cpu", "max", driver("arm", ARM_COMPILER, ("-O3", "-static"), (GEMM, ATTENTION, HALF))], (
        "plain",
        "dotprod",
    )


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_no_compiler_leaves_anything_out(compiler):
    """Every source, all warnings on: an attribute that a compiler does not know would cost an instruction set."""
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    flags = [*library.FLAGS, *(library.X86_FLAGS if os.uname().machine == "x86_64" else ()), "-fsyntax-only"]
    strict = ["-pedantic", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-Wno-unused-command-line-argument"]
    done = subprocess.run(
        [compiler, *flags, *strict, *library.SOURCES], cwd=library.FOLDER, capture_output=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]


def run(command, numbers, arrays, *arguments):
    """float32 results of the driver, None where this processor has no such variant."""
    data = np.array(numbers, np.int64).tobytes() + b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}  # it ends with what it has read
    done = subprocess.run(
        [*command, *arguments], input=data, capture_output=True, timeout=120, check=False, env=environment
    )
    if done.returncode == 2:
        return None
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return np.frombuffer(done.stdout, np.float32)


@pytest.mark.parametrize("layer, shape", list(zip(LAYERS, SHAPES * 2, strict=False)), ids=str)
def test_products_are_exact(machine, layer, shape):
    command, variants = machine
    m, n, k = shape
    gemm = linear(*layer, n, k)
    operand, codes = operands(gemm, m)
    multipliers = [] if gemm.multipliers == (1,) else [multiplier_panels(gemm)]
    arrays = [*codes, weight_panels(gemm), *multipliers]
    arrays += [gemm.weight.integers.astype(np.int8), gemm.unit_scales(), weight_sums(gemm)]
    numbers = [m, n, k, gemm.group_size or k, operand.zero, operand.weights[0]]
    numbers += [largest_code(gemm.activation, len(codes)), len(codes) == 2, len(multipliers), gemm.scale_groups]
    results = [run(command, numbers, arrays, "packed_gemm", name) for name in variants]
    assert any(result is not None for result in results)
    for result in results:
        if result is not None:
            np.testing.assert_array_equal(result.reshape(m, n), expected(gemm, operand, codes))


@pytest.mark.parametrize(
    "shape, axes", [((1, 2, 7, 5, 72), ()), ((2, 1, 271, 129, 33), (0, 3)), ((1, 1, 3, 130, 8), (2, 3))]
)
def test_attention_is_within_its_bound(machine, shape, axes):
    q, k, v = tensors(shape)
    mask, step = None, [0, 0, 0, 0]
    if axes:
        sizes = [size if axis in axes else 1 for axis, size in enumerate(shape[:4])]
        mask = np.where(np.random.default_rng(2).random(sizes) < 0.3, -10000, 0).astype(np.float32)
        step = [0 if size == 1 else stride // 4 for size, stride in zip(sizes, mask.strides, strict=True)]
    result = run(
        machine[0], [*shape, *step], [np.float32(0.125), q, k, v, *([] if mask is None else [mask])], "attention"
    )
    answer, bound = reference(q, k, v, mask)
    assert (np.abs(result.reshape(q.shape) - answer) <= bound).all()


@pytest.mark.parametrize("shape", half.SHAPES, ids=str)
def test_products_with_float16_weights_are_within_their_bound(machine, shape):
    rows, k, n = shape
    x, weight, bias = half.tensors(*shape)
    weight.reshape(-1)[0] = 2.0**-24  # the least there is
    panels = half_panels(ir.tensor(weight, name="w"), by_output=True)
    result = run(machine[0], [rows, n, k], [x, panels, bias], "half_gemm")
    answer, bound = half.reference(x, weight, bias)
    assert (np.abs(result.reshape(rows, n) - answer) <= bound).all()
