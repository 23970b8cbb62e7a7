"""What the inner loops of the GEMM kernels are made of, as compiled with no GPU (compiled, not run)."""

from __future__ import annotations

from typing import Any

import pytest

from plugins.gpu.compile import Compiled, Request, compile_kernels
from plugins.gpu.spec import GemmSpec
from plugins.gpu.table import kernel
from tests.support.machine_code import chosen, count, opcodes

pytestmark = pytest.mark.kernels

pytest.importorskip("triton", reason="the GPU kernels need triton")
MULTIPLIERS = (1, 2, 3, 4, 5, 6, 8, 10)
# Projections of PixArt-XL/2: into its MLP with groups of 64 as in recipe pixart_w4a6, and out of an attention.
INTO = GemmSpec("E2M3", "E2M1", 1152, 4608, 64, MULTIPLIERS)
OUT = GemmSpec("E2M3", "E2M1", 1152, 1152, epilogue="gate_residual", output="bf16")
PLAIN = GemmSpec("E2M3", "E2M1", 4608, 1152)
CASES: dict[Any, Request] = {
    **{("into", sm): chosen(kernel("packed_gemm"), INTO, sm) for sm in (80, 89, 90, 100, 120)},
    **{("out", sm): chosen(kernel("expanded_gemm"), OUT, sm) for sm in (86, 90)},
    **{("plain", sm): chosen(kernel("packed_gemm"), PLAIN, sm) for sm in (89, 90)},
    ("promoted", 89): chosen(kernel("expanded_gemm"), GemmSpec("E3M2", "E2M1", 4608, 1152), 89),
    ("promoted", 90): chosen(kernel("expanded_gemm"), INTO, 90),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Compiled]:
    """All kernels of this file, from one process and an empty cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITC_CACHE", str(tmp_path_factory.mktemp("cache")))
        return dict(zip(CASES, compile_kernels(list(CASES.values())), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_spills_and_all_fits(built: dict[Any, Compiled], case: Any) -> None:
    assert built[case].problems() == []


@pytest.mark.parametrize("case", [case for case in CASES if case[1] >= 89], ids=str)
def test_operands_are_fetched_behind_the_products(built: dict[Any, Compiled], case: Any) -> None:
    """Asynchronous copies of 16 bytes into shared memory, ahead of the step that needs them; only FP8 products."""
    assert count(built[case], "LDGSTS.E.BYPASS.128", "LDGSTS.E.128") >= 4
    assert count(built[case], "QMMA", "QGMMA", "UTCQMMA") > 0 and count(built[case], "HMMA", "HGMMA", "UTCHMMA") == 0


def test_hopper_decodes_weights_into_registers(built: dict[Any, Compiled]) -> None:
    """wgmma takes decoded weights from registers: no store to shared memory but the epilogue's matrices (STSM), and the
    products of half a step run while the other half is decoded (a wait that leaves one group in flight)."""
    one = built["plain", 90]
    assert not [opcode for opcode in opcodes(one) if opcode.split(".")[0] == "STS"]
    assert "wgmma.wait_group.sync.aligned \t1;" in one.ptx or "wgmma.wait_group.sync.aligned 1;" in one.ptx
    assert one.registers <= 128, "two programs of 256 threads share a multiprocessor"


def test_decoding_costs_few_instructions(built: dict[Any, Compiled]) -> None:
    """A thread decodes 64 weights in a step, in words of four: no byte permutation is left of taking words apart."""
    assert count(built["plain", 90], "PRMT") < 16
    assert count(built["plain", 89], "PRMT") < 16


@pytest.mark.parametrize("sm", [89, 90])
def test_promoted_sums_are_added_in_float32(built: dict[Any, Compiled], sm: int) -> None:
    """One addition for each of a thread's 64 outputs: the compiler has not made the tensor core do it after all."""
    assert count(built["promoted", sm], "FADD") >= 64
    assert count(built["plain", sm], "FADD") < 64
