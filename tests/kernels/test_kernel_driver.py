"""The kernels without onnxruntime: under the address and undefined-behaviour sanitizers, with the instructions of
AVX-VNNI and AVX-512 made of others and those of AMX done by a handler, and on 64-bit Arm in an emulator. Integers are
equal to the bit, and floats within their bounds."""

import functools
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import pytest

from export.dialect.ops import ABSMAX_FLOOR
from export.dialect.reference import quantize_activation
from export.formats.format import get_format, to_integers
from export.formats.operands import largest_code
from pipeline.backends.cpu.half_gemm import half_panels
from pipeline.backends.cpu.packed_gemm import multiplier_panels, packs, weight_panels, weight_sums
from pipeline.backends.cpu.quantized_attention import grid_numbers
from pipeline.verify.attention_oracle import AttentionNumbers, AttentionProbe, check_attention
from plugins.cpu import library
from tests.backends.cpu.test_cpu_quantizers import image_and_scale, on_the_grid
from tests.kernels import test_native_half_gemm as half
from tests.kernels.test_native_attention import reference, tensors
from tests.kernels.test_native_epilogue import EPILOGUES
from tests.kernels.test_native_packed_gemm import LAYERS, SHAPES, VARIANTS, expected, linear, operands
from tests.support import native, sanitized
from tests.support.attentions import operands as operands_of_attention
from tests.support.portable import activations

pytestmark = pytest.mark.kernels

KERNELS = tuple(library.FOLDER / name for name in library.KERNELS)
# Sources whose instructions other ones are made of, and what stands in for them.
EMULATED = (
    "packed_gemm.c",
    "packed_gemm_vnni.c",
    "attention.c",
    "half_gemm.c",
    "quantized_attention_vnni.c",
    "quantized_weights.c",
)
EMULATIONS = (
    "emulated_x86.c",
    "emulated_attention.c",
    "emulated_half_gemm.c",
    "emulated_quantized_attention.c",
    "emulated_weights.c",
)
STRICT = sanitized.FLAGS
EPSILON = 1e-6  # of a norm
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


class Machine(NamedTuple):
    """The command that starts the driver, and variants of PackedGemm. all_run: an emulator runs each of them, where a
    processor lacks some."""

    command: list[str]
    variants: tuple[str, ...]
    all_run: bool


@pytest.fixture(params=["sanitizers", "emulated x86", "emulated x86, sanitizers", "arm", "arm, sanitizers"])
def machine(request):
    strict = STRICT if "sanitizers" in request.param else ("-O3",)
    if request.param == "sanitizers":
        native.need_compiler()
        return Machine([driver("strict", library.compiler(), STRICT, KERNELS)], VARIANTS, all_run=False)
    if "x86" in request.param:
        native.need_compiler()
        if platform.machine() != "x86_64" or sys.platform != "linux":
            pytest.skip(f"the emulation is of x86-64 on Linux, this is {platform.machine()} on {sys.platform}")
        rest = tuple(path for path in KERNELS if path.name not in EMULATED)
        sources = (*(SUPPORT / name for name in EMULATIONS), *rest)
        command = [driver(request.param, library.compiler(), strict, sources)]
        return Machine(command, ("avx_vnni", "avx512_vnni", "amx_int8"), all_run=True)
    missing = [tool for tool in (ARM_COMPILER, ARM_EMULATOR) if shutil.which(tool) is None]
    if missing:
        pytest.skip(
            f"no {' and no '.join(missing)} (Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static)"
        )
    if strict is STRICT:  # the address sanitizer's shadow memory does not fit the emulator's
        strict = ("-O1", "-g", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")
    flags = (*strict, "-static")
    command = [ARM_EMULATOR, "-cpu", "max", driver(request.param, ARM_COMPILER, flags, KERNELS)]
    return Machine(command, ("plain", "dotprod", "i8mm"), all_run=True)


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


def run_variants(machine, numbers, arrays, mode):
    """Results of the variants that the machine has: all of them, where it is an emulator."""
    results = {name: run(machine.command, numbers, arrays, mode, name) for name in machine.variants}
    absent = [name for name, result in results.items() if result is None]
    assert len(absent) < len(results) and not (machine.all_run and absent), f"{absent} did not run"
    return [result for result in results.values() if result is not None]


def packed_gemm(gemm, operand, codes, scales):
    """(numbers, arrays) of the driver."""
    packed = packs(gemm)
    multipliers = [multiplier_panels(gemm)] if packed and gemm.multipliers != (1,) else []
    arrays = [*codes, weight_panels(gemm), *multipliers, *([gemm.weight.integers.astype(np.int8)] if packed else [])]
    arrays += [gemm.unit_scales(), weight_sums(gemm), *([] if scales is None else [scales])]
    numbers = [len(codes[0]), gemm.out_features, gemm.in_features, gemm.group_size or gemm.in_features]
    numbers += [operand.zero, operand.weights[0], largest_code(gemm.activation, len(codes))]
    numbers += [len(codes) == 2, len(multipliers), gemm.sum_groups, 0 if packed else gemm.weight_kmax]
    numbers += [gemm.scale_groups, 0 if scales is None else gemm.activation_groups]
    return numbers, arrays


@pytest.mark.parametrize("layer, shape", list(zip(LAYERS, SHAPES * 4, strict=False)), ids=str)
def test_products_are_exact(machine, layer, shape):
    m, n, k = shape
    gemm = linear(*layer, n, k)
    operand, codes, scales = operands(gemm, m)
    for result in run_variants(machine, *packed_gemm(gemm, operand, codes, scales), "packed_gemm"):
        np.testing.assert_array_equal(result.reshape(m, n), expected(gemm, operand, codes, scales))


@pytest.mark.parametrize("stages", EPILOGUES, ids=str)
@pytest.mark.parametrize("layer", [LAYERS[1], LAYERS[6], LAYERS[18]], ids=str)
def test_an_epilogue_gives_the_bits_of_a_chain(machine, layer, stages):
    samples, tokens, n = stages.samples, stages.tokens, stages.n
    gemm = linear(*layer, n, 64)
    operand, codes, scales = operands(gemm, samples * tokens)
    numbers, arrays = packed_gemm(gemm, operand, codes, scales)
    given = stages.inputs()
    both = "GATE" in given
    per_gate = tokens if both and not stages.row_gates else 1
    more = np.array([tokens, per_gate, stages.heads, stages.activation, both], np.int64)
    arrays += [more, *(given[port] for port in ("TOKEN_SCALE", "BIAS", "GATE", "RESIDUAL") if port in given)]
    for result in run_variants(machine, numbers, arrays, "epilogue"):
        linear_, y, *of_chain = result.reshape(4, -1)
        for fused, unfused in zip((linear_, y), of_chain, strict=True):
            np.testing.assert_array_equal(fused, unfused)
        product = expected(gemm, operand, codes, scales)
        with np.errstate(invalid="ignore"):
            scaled = product * given["TOKEN_SCALE"].reshape(-1, 1) + given["BIAS"]
        np.testing.assert_array_equal(linear_.reshape(-1, n), scaled)


def chain_of_rows(machine, x, fmt, limbs, norm=()):
    """(what was quantized, scales, integers) of rows x [rows, n] by TokenChain. norm: rows of scale and of shift."""
    attributes = native.quantizer(fmt, limbs)
    zero, base = attributes["zero"], attributes.get("limb_base", 0)
    names = ("max_value", "kmax", "rounding_factor")
    options = np.array([EPSILON, ABSMAX_FLOOR, *(attributes[name] for name in names)], np.float32)
    numbers = [*x.shape, zero, base, len(x) // len(norm[0]) if norm else 0]
    result = run(machine.command, numbers, [options, x, *norm], "token_chain")
    quantized, scale, *codes = np.split(result, np.cumsum([x.size, len(x), x.size])[: 2 + (limbs == 2)])
    integers = [part.astype(np.int64).reshape(x.shape) - zero for part in codes]
    return quantized.reshape(x.shape), scale[:, None], integers[0] if limbs == 1 else base * integers[0] + integers[1]


@pytest.mark.parametrize("fmt, limbs", [("E2M1", 1), ("E2M3", 1), ("INT8", 1), ("E2M3", 2), ("E3M4", 2)])
def test_codes_are_those_of_the_dialect_and_of_the_stock_ops(machine, fmt, limbs):
    """All values, midpoints and their neighbours; then rows of 391 numbers, of zeros, with outliers, NaN and Inf."""
    x = on_the_grid(fmt)[0]
    _, scale, integers = chain_of_rows(machine, x, fmt, limbs)
    codes, expected_scale = quantize_activation(x, format=fmt)
    np.testing.assert_array_equal(integers, to_integers(get_format(fmt), codes))
    np.testing.assert_array_equal(scale, expected_scale)
    x = activations(np.random.default_rng(3), tokens=12, k=391).reshape(-1, 391)
    _, scale, integers = chain_of_rows(machine, x, fmt, limbs)
    stock, stock_scale = image_and_scale(fmt, x[None], limbs)
    np.testing.assert_array_equal(integers, stock[0])
    np.testing.assert_array_equal(scale, stock_scale[0])
    x[[2, 5, 7], [0, 390, 16]] = np.nan, np.inf, -np.inf
    _, damaged_scale, damaged = chain_of_rows(machine, x, fmt, limbs)
    sick = np.isin(np.arange(len(x)), (2, 5, 7))
    assert np.isnan(damaged_scale[sick]).all() and not damaged[sick].any()
    np.testing.assert_array_equal(damaged[~sick], integers[~sick])
    np.testing.assert_array_equal(damaged_scale[~sick], scale[~sick])


@pytest.mark.parametrize("n", [1, 15, 64, 391])
def test_a_norm_has_the_same_bits_everywhere(machine, n):
    """Those of float32 sums in 16 parts, whatever the width of vectors."""
    rng = np.random.default_rng(n)
    x = rng.standard_normal((6, n)).astype(np.float32) * 3 + 1
    scale, shift = (rng.standard_normal((2, n)).astype(np.float32) for _ in range(2))
    mean = in_parts(x) / np.float32(n)
    off = x - mean
    inverse = np.float32(1) / np.sqrt(in_parts(off * off) / np.float32(n) + np.float32(EPSILON))
    expected = (off * inverse) * scale.repeat(3, axis=0) + shift.repeat(3, axis=0)
    quantized, _, integers = chain_of_rows(machine, x, "INT8", 1, (scale, shift))
    np.testing.assert_array_equal(quantized, expected)
    np.testing.assert_array_equal(integers, image_and_scale("INT8", expected[None], 1)[0][0])


def in_parts(x):
    """Sums of rows [rows, 1] float32: number i is added to part i modulo 16, then the parts in turn."""
    parts = np.zeros((len(x), 16), np.float32)
    for first in range(0, x.shape[1], 16):
        piece = x[:, first : first + 16]
        parts[:, : piece.shape[1]] += piece
    total = np.zeros(len(x), np.float32)
    for part in parts.T:
        total += part
    return total[:, None]


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
        machine.command, [*shape, *step], [np.float32(0.125), q, k, v, *([] if mask is None else [mask])], "attention"
    )
    answer, bound = reference(q, k, v, mask)
    assert (np.abs(result.reshape(q.shape) - answer) <= bound).all()


@pytest.mark.parametrize("shape", [(1, 2, 7, 5, 72), (1, 1, 30, 1100, 33), (2, 1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("formats", [("INT8", "INT8"), ("E2M3", "INT6"), ("INT8", "E2M3")], ids=str)
def test_attention_of_codes_is_within_its_bound_and_the_same_everywhere(machine, shape, formats):
    given = operands_of_attention(*shape, mask="penalty")
    step = [0 if size == 1 else stride // 4 for size, stride in zip(given.mask.shape, given.mask.strides, strict=True)]
    rows = [list(grid_numbers(get_format(name)).values()) for name in formats]
    grids = np.array([*rows[0], *rows[1], ABSMAX_FLOOR], np.float32)
    arrays = [np.array([*shape, *step], np.int64), np.float32(0.125), given.q, given.k, given.v]
    arrays += [given.mask] if given.mask.size > 1 else []
    if given.mask.size == 1:
        given = given._replace(mask=np.zeros_like(given.mask))
    results = run_variants(machine, [], [grids, *arrays], "quantized_attention")
    here = Machine([driver("strict", library.compiler(), STRICT, KERNELS)], VARIANTS, all_run=False)
    results += run_variants(here, [], [grids, *arrays], "quantized_attention")
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
    probe = AttentionProbe(*given, results[0].reshape(given.q.shape))
    assert check_attention(probe, AttentionNumbers(*formats, 0.125)).output_error <= 1


@pytest.mark.slow
def test_the_ops_in_onnxruntime_under_sanitizers():
    """All ops, and what they share: odd shapes, masks, heads, limbs, what is not finite, what is refused."""
    native.need_compiler()
    if sys.platform != "linux" or "gcc" not in Path(library.compiler()).resolve().name:
        pytest.skip("the sanitizers' run time is looked for as GCC has it on Linux")
    ops = ("chain", "limbs", "epilogue", "attention", "quantized_attention", "half_gemm", "packed_gemm")
    files = [f"tests/kernels/test_native_{name}.py" for name in (*ops, "quantized_rows")]
    names = ("odd_shapes", "left_out", "heads", "all_stages", "do_not_fit", "does_not_fit", "in_turn", "nan")
    of_attention = ("masks", "several_panels", "same_bits", "without_any_key", "not_finite", "no_byte", "row_of_zeros")
    of_gemms = ("every_float16", "damaged", "no_rows", "sums_of_groups", "nobody_reads", "be_exact", "by_the_weights")
    of_rows = ("of_the_chain",)
    chosen = " or ".join((*names, *of_attention, *of_gemms, *of_rows))
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.sanitized", *files, "-k", chosen],
        cwd=SUPPORT.parents[1], env=os.environ | sanitized.environment(), capture_output=True, text=True, timeout=600,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > 100


@pytest.mark.parametrize("shape", half.SHAPES, ids=str)
def test_products_with_float16_weights_are_within_their_bound(machine, shape):
    rows, k, n = shape
    x, weight, bias = half.tensors(*shape)
    weight.reshape(-1)[0] = 2.0**-24  # the least there is
    panels = half_panels(ir.tensor(weight, name="w"), by_output=True)
    result = run(machine.command, [rows, n, k], [x, panels, bias], "half_gemm")
    answer, bound = half.reference(x, weight, bias)
    assert (np.abs(result.reshape(rows, n) - answer) <= bound).all()
