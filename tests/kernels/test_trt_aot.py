"""What TensorRT is told of a kernel: PTX, launch sizes, scalars. Proven with Triton's assemblers, without TensorRT."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.errors import ContractError
from plugins.gpu import compile
from plugins.gpu.spec import GemmSpec, QuantizeSpec
from plugins.gpu.table import kernel as kernel_row
from plugins.gpu.tile_table import Tile
from plugins.tensorrt.aot import LOWEST_VERSION, aot_kernel, at_lowest_version, entry_name, keep_parameters, plugin_name
from plugins.tensorrt.expressions import Expression, as_expression, rows_of
from plugins.tensorrt.payload import Payload, Variant
from plugins.tensorrt.plugins import EXAMPLES

TEXT = """
.version 8.7
.target sm_90a
.address_size 64
.visible .entry kernel(
\t.param .u64 .ptr .global .align 1 kernel_param_0,
\t.param .u32 kernel_param_1,
\t.param .u64 .ptr .global .align 1 kernel_param_2,
\t.param .u64 .ptr .global .align 1 kernel_param_3
)
.reqntid 128
{
\tld.param.b64 \t%rd1, [kernel_param_0];
\tld.param.b32 \t%r1, [kernel_param_1];
\tret;
}
"""
GEMM = GemmSpec("E2M3", "E2M1", 64, 96, 32, (1, 2, 3), epilogue="gate_residual", output="fp32")
NORM = QuantizeSpec("E2M3", 96, "norm_modulate", "fp32")


def value(expression: Expression, shapes: Sequence[Sequence[int]]) -> int:
    """The integer for inputs of these shapes."""
    return int(expression.resolve(lambda index, axis: shapes[index][axis], lambda a, b: -(-a // b)))


def parameter_names(ptx: str) -> list[str]:
    """Of the one kernel in a text, in order."""
    return re.findall(r"\w+_param_\d+(?=\s*[,)])", ptx.split("{")[0])


# --- PTX -----------------------------------------------------------------------------------------------------------


def test_parameters_that_are_not_read_are_dropped() -> None:
    stripped = keep_parameters(TEXT, 2)
    assert entry_name(stripped) == "kernel" and parameter_names(TEXT) == [f"kernel_param_{i}" for i in range(4)]
    assert parameter_names(stripped) == ["kernel_param_0", "kernel_param_1"]
    assert stripped.split("{")[1] == TEXT.split("{")[1] and ".reqntid 128" in stripped
    assert keep_parameters(TEXT, 4).replace("\n)", ")") == TEXT.replace("\n)", ")")


def test_a_parameter_that_is_read_is_not_dropped() -> None:
    with pytest.raises(ContractError, match="kernel reads kernel_param_1, which TensorRT does not pass"):
        keep_parameters(TEXT, 1)


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        (TEXT, 5, "has 4 parameters, its arguments are 5"),
        (TEXT + TEXT, 2, "2 kernels in a PTX text"),
        (".version 8.7", 0, "0 kernels in a PTX text"),
        (".visible .entry k(garbage, more)", 1, "'garbage' is no PTX parameter|'more' is no PTX parameter"),
    ],
)
def test_other_texts_are_refused(text: str, count: int, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        keep_parameters(text, count)


def test_the_version_is_lowered_and_never_raised() -> None:
    assert at_lowest_version(TEXT) == TEXT and LOWEST_VERSION == "8.7"
    assert at_lowest_version(TEXT.replace("8.7", "9.4")) == TEXT
    assert ".version 8.4" in at_lowest_version(TEXT.replace("8.7", "8.4"))
    with pytest.raises(ContractError, match="states no version"):
        at_lowest_version("")


COMPILED = [
    ("quantize", QuantizeSpec("E2M3", 96, input="fp32"), 80),
    ("norm_modulate_quantize", NORM, 90),
    ("packed_gemm", GEMM, 90),
    ("packed_gemm", replace(GEMM, epilogue="none", multipliers=(1,)), 100),
    ("packed_gemm", replace(GEMM, activation="INT8"), 120),
]


@pytest.mark.parametrize(("kernel", "spec", "sm"), COMPILED, ids=[f"{k}-{sm}" for k, _, sm in COMPILED])
def test_stripped_kernels_assemble(kernel: str, spec: Any, sm: int, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from plugins.tensorrt.payload import compile_payload

    payload = compile_payload(kernel, spec, (128,), (sm,), "ptx")
    aot = aot_kernel(payload, payload.variants[0], [3] * 8)
    arguments = payload.row.arguments_of(spec)
    assert len(parameter_names(aot.ptx)) == len(arguments) < len(payload.variants[0].types)
    (tmp_path / "k.ptx").write_text(aot.ptx)
    target = next(word for word in aot.ptx.split() if word.startswith("sm_"))
    for assembler in ("ptxas", "ptxas-blackwell"):  # of CUDA 12.9, and of Triton's own CUDA
        command = [compile.tool(assembler), f"--gpu-name={target}", "-o", tmp_path / "k.cubin", tmp_path / "k.ptx"]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert aot.name.encode() in (tmp_path / "k.cubin").read_bytes()


# --- launch sizes --------------------------------------------------------------------------------------------------


def payload_of(kernel: str, spec: Any, tile: Any = None) -> Payload:
    row = kernel_row(kernel)
    names = [f"\t.param .u64 {kernel}_param_{i}" for i in range(len(row.arguments_of(spec)) + 2)]
    text = f".version 9.4\n.visible .entry {kernel}(\n" + ",\n".join(names) + "\n)\n{ ret; }\n"
    variant = Variant(90, 1, asdict(tile or row.tile(spec, 1, 90)), kernel, (), 128, 4096, text.encode())
    return Payload(kernel, spec, (variant,))


@given(batch=st.integers(1, 64), tokens=st.integers(1, 5000))
def test_launch_sizes_are_those_of_the_kernel_for_any_shape(batch: int, tokens: int) -> None:
    payload = payload_of("packed_gemm", GEMM)
    aot = aot_kernel(payload, payload.variants[0], [3, 3, 2, 2, 2, 1, 3, 3])
    shapes = [
        (batch, tokens, 64),
        (batch, tokens, 1),
        (96, 32),
        (96, 1),
        (96, 1),
        (96,),
        (batch, 1, 96),
        (batch, tokens, 96),
    ]
    tile = payload.tile(payload.variants[0])
    assert tuple(value(size, shapes) for size in aot.grid) == payload.row.grid(GEMM, tile, batch * tokens)
    assert [value(scalar, shapes) for scalar in aot.scalars] == [batch * tokens, tokens]
    assert (aot.name, aot.threads, aot.shared_bytes) == ("packed_gemm", 128, 4096)


@given(rows=st.integers(1, 2**20))
def test_a_quantizer_of_rows_needs_their_number_alone(rows: int) -> None:
    payload = payload_of("quantize", QuantizeSpec("E2M3", 96))
    aot = aot_kernel(payload, payload.variants[0], [2])
    tile = payload.tile(payload.variants[0])
    assert [value(scalar, [(rows, 96)]) for scalar in aot.scalars] == [rows]
    assert value(aot.grid[0], [(rows, 96)]) == payload.row.grid(payload.spec, tile, rows)[0]


def test_a_norm_shares_its_shift_over_the_tokens_of_a_sample() -> None:
    payload = payload_of("norm_modulate_quantize", NORM)
    aot = aot_kernel(payload, payload.variants[0], [3, 3, 3])
    assert [value(scalar, [(2, 256, 96), (2, 1, 96), (2, 1, 96)]) for scalar in aot.scalars] == [512, 256]


@given(a=st.integers(-100, 100), b=st.integers(1, 50), c=st.integers(0, 9))
def test_expressions_are_the_arithmetic_of_integers(a: int, b: int, c: int) -> None:
    x = rows_of(0, 2)
    assert value(x // b * c, [(a, 1)]) == a // b * c
    assert value(-(-x // b), [(a, 1)]) == -(-a // b)
    assert value(c * x, [(a, 1)]) == c * a and value(rows_of(0, 1), [(a,)]) == 1
    assert value(as_expression(c), []) == c


def test_a_size_below_zero_is_refused() -> None:
    with pytest.raises(ContractError, match="a launch size is negative"):
        value(-rows_of(0, 2), [(3, 1)])


def test_a_split_sum_is_refused() -> None:
    tile = kernel_row("packed_gemm").tile(GEMM, 1, 90)
    assert isinstance(tile, Tile)
    payload = payload_of("packed_gemm", GEMM, replace(tile, splits=2))
    with pytest.raises(ContractError, match="a sum in 2 parts needs a second kernel"):
        aot_kernel(payload, payload.variants[0], [3] * 8)


def test_each_set_of_inputs_has_a_plugin_of_its_own() -> None:
    assert [plugin_name(example) for example in EXAMPLES] == [
        "Quantize", "GeluQuantize", "NormModulateQuantize", "PackedGemm", "PackedGemmGateResidual",
        "PackedGemmMultipliers", "PackedGemmMultipliersGateResidual",
    ]  # fmt: skip
