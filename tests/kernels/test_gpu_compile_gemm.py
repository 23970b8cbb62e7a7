"""GEMM kernels compiled for every target with no GPU: the tensor core's instructions stand in the machine code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from plugins.gpu.compile import TARGETS, Compiled, Request, compile_kernels
from plugins.gpu.spec import GemmSpec, PackSpec
from plugins.gpu.table import KERNELS, kernel
from tests.kernels.test_gpu_compile_tiles import SPLIT, most_registers
from tests.support.machine_code import chosen, count

pytestmark = pytest.mark.kernels

pytest.importorskip("triton", reason="the GPU kernels need triton")
# Tensor core instructions of each target: mma.sync (QMMA, IMMA, HMMA), wgmma (QGMMA, IGMMA), tcgen05 (UTC...).
FP8 = {80: "HMMA", 86: "HMMA", 89: "QMMA", 90: "QGMMA", 100: "UTCQMMA", 120: "QMMA"}
INT8 = {80: "IMMA", 86: "IMMA", 89: "IMMA", 90: "IGMMA", 100: "UTCIMMA", 120: "IMMA"}
FP16 = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
PLAIN = GemmSpec("E2M3", "E2M1", 1152, 1152)
EXACT = GemmSpec("E2M3", "E2M1", 1152, 1152, 64, (1, 2, 3, 4, 5, 6, 8, 10))
REAL = GemmSpec("E2M3", "E2M1", 1152, 1152, 128, real_groups=True, output="bf16")
HALF = GemmSpec("E3M4", "E2M1", 1152, 1152)
MODULATED = GemmSpec("E4M3", "E3M0", 4608, 1152, zero_point=True, epilogue="gate_residual", output="fp32")
E1M2 = GemmSpec("E2M3", "E1M2", 1152, 4608)
MANY, FEW = 4096, 64  # tokens

# Each kernel for each target, in turn with FP8 and INT8 operands: every target has both.
IN_TURN = [
    (name, sm, (i + j) % 2) for i, name in enumerate(("packed_gemm", "expanded_gemm")) for j, sm in enumerate(TARGETS)
]
FLOATS = {(name, sm): chosen(kernel(name), PLAIN, sm, rows=MANY) for name, sm, turn in IN_TURN if turn == 0}
ON_HOPPER = {
    "packed, few tokens": chosen(kernel("packed_gemm"), PLAIN, 90, rows=FEW),
    "packed, multipliers": chosen(kernel("packed_gemm"), EXACT, 90, rows=MANY),
    "packed, real groups": chosen(kernel("packed_gemm"), REAL, 90, rows=MANY),
    "packed, every epilogue": chosen(kernel("packed_gemm"), MODULATED, 90, rows=MANY),
    "expanded, few tokens": chosen(kernel("expanded_gemm"), PLAIN, 90, rows=FEW),
    "expanded, E1M2": chosen(kernel("expanded_gemm"), E1M2, 90, rows=MANY),
}
INTEGERS = {
    (name, sm, "integers"): chosen(kernel(name), replace(EXACT, integers=True), sm, rows=MANY)
    for name, sm, turn in IN_TURN
    if turn == 1
}
IN_HALF = {sm: chosen(kernel("packed_gemm"), HALF, sm, rows=MANY) for sm in (80, 90)}
AT_LOAD = {
    ("pack", 80): chosen(kernel("pack"), PackSpec(1152), 80),
    ("expand", 80): chosen(kernel("expand"), EXACT, 80),
    ("expand", 90): chosen(kernel("expand"), PLAIN, 90),
    ("expand integers", 90): chosen(kernel("expand"), replace(EXACT, integers=True), 90),
}


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Compiled]:
    """All kernels of this file, from one process and an empty cache."""
    requests: dict[Any, Request] = {**FLOATS, **INTEGERS, **ON_HOPPER, **IN_HALF, **AT_LOAD}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITC_CACHE", str(tmp_path_factory.mktemp("cache")))
        return dict(zip(requests, compile_kernels(list(requests.values())), strict=True))


@pytest.mark.parametrize("case", [*FLOATS, *INTEGERS, *ON_HOPPER, *IN_HALF, *AT_LOAD], ids=str)
def test_resources(built: dict[Any, Compiled], case: Any) -> None:
    """Nothing spills; what a program takes leaves room for those that a multiprocessor should hold beside it."""
    requests: dict[Any, Request] = {**FLOATS, **INTEGERS, **ON_HOPPER, **IN_HALF, **AT_LOAD}
    assert built[case].problems() == [] and built[case].local_bytes == 0
    assert built[case].registers <= most_registers(requests[case])


@pytest.mark.parametrize("case", FLOATS, ids=str)
def test_fp8_tensor_cores(built: dict[Any, Compiled], case: tuple[str, int]) -> None:
    instructions = {name for name in {*FP8.values(), *FP16.values()} if count(built[case], name + ".", name)}
    assert instructions == {FP8[case[1]]}


@pytest.mark.parametrize("case", INTEGERS, ids=str)
def test_int8_tensor_cores(built: dict[Any, Compiled], case: tuple[str, int, str]) -> None:
    every = {*INT8.values(), *FP8.values(), *FP16.values()}
    assert {name for name in every if count(built[case], name + ".", name)} == {INT8[case[1]]}


@pytest.mark.parametrize("case", ON_HOPPER)
def test_fp8_on_hopper(built: dict[Any, Compiled], case: str) -> None:
    assert count(built[case], "QGMMA") > 0 and count(built[case], "HGMMA", "HMMA", "QMMA") == 0


def test_bf16_is_rounded_to_nearest(built: dict[Any, Compiled]) -> None:
    """The interpreter cuts the last 16 bits off, so the instruction is what proves the rounding."""
    ptx = built["packed, real groups"].ptx
    assert REAL.output == "bf16" and "cvt.rn.bf16" in ptx and "cvt.rz.bf16" not in ptx


@pytest.mark.parametrize("sm", IN_HALF)
def test_operands_that_are_no_e4m3_go_to_fp16_tensor_cores(built: dict[Any, Compiled], sm: int) -> None:
    assert count(built[sm], FP16[sm]) > 0 and count(built[sm], "QGMMA", "QMMA") == 0


def test_every_kernel_of_the_table_is_compiled_somewhere() -> None:
    from tests.kernels.test_gpu_compile import BEFORE

    every: tuple[dict[Any, Request], ...] = (FLOATS, ON_HOPPER, IN_HALF, AT_LOAD, SPLIT)  # type: ignore[assignment]
    here = {one.kernel.name for cases in every for one in cases.values()}
    assert here | set(BEFORE) == {row.name for row in KERNELS}
