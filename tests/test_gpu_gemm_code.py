"""GEMM kernels compiled for every target with no GPU: tensor core instructions, registers, shared memory, no spills."""

from __future__ import annotations

from typing import Any

import pytest

from plugins.gpu.compiled import Compiled, Request, compile_kernels
from plugins.gpu.machine_code import TARGETS
from plugins.gpu.specs import GemmSpec, PackSpec
from plugins.gpu.table import kernel

pytest.importorskip("triton", reason="the GPU kernels need triton")
MULTIPLIERS = (1, 2, 3, 4, 5, 6, 8, 10)
# Projections of PixArt-XL/2: into its MLP with groups of 64 as in recipe pixart_w4a6, and out of an attention.
INTO = GemmSpec("E2M3", "E2M1", 1152, 4608, 64, MULTIPLIERS, epilogue="gelu")
OUT = GemmSpec("E2M3", "E2M1", 1152, 1152, epilogue="gate_residual", output="bf16")
PLAIN = GemmSpec("E2M3", "E2M1", 4608, 1152)
INTEGERS = GemmSpec("INT8", "INT4", 1152, 1152, 128, real_groups=True)
FP8 = {80: "HMMA", 86: "HMMA", 89: "QMMA", 90: "QGMMA", 100: "UTCQMMA", 120: "QMMA"}
FP16 = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
SPECS = {"packed_gemm": INTO, "expanded_gemm": OUT}
EVERYWHERE: dict[Any, Request] = {
    (name, sm): Request(kernel(name), spec, sm) for name, spec in SPECS.items() for sm in TARGETS
}
OTHERS: dict[Any, Request] = {
    ("plain", 90): Request(kernel("packed_gemm"), PLAIN, 90),
    ("plain", 89): Request(kernel("packed_gemm"), PLAIN, 89),
    ("few rows", 90): Request(kernel("packed_gemm"), PLAIN, 90, rows=16),
    ("promoted", 90): Request(kernel("expanded_gemm"), GemmSpec("E3M2", "E2M1", 1152, 1152), 90),
    ("promoted multipliers", 90): Request(kernel("expanded_gemm"), INTO, 90),
    ("integers", 90): Request(kernel("packed_gemm"), INTEGERS, 90),
    ("integers", 86): Request(kernel("packed_gemm"), INTEGERS, 86),
    ("pack", 80): Request(kernel("pack"), PackSpec(1152), 80),
    ("expand", 90): Request(kernel("expand"), INTO, 90),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Compiled]:
    """All kernels of this file, from one process and an empty cache."""
    requests = {**EVERYWHERE, **OTHERS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITC_CACHE", str(tmp_path_factory.mktemp("cache")))
        return dict(zip(requests, compile_kernels(list(requests.values())), strict=True))


def tensor_core(one: Compiled) -> set[str]:
    """Which tensor core instructions the machine code has."""
    names = ("HMMA", "QMMA", "IMMA", "HGMMA", "QGMMA", "IGMMA", "UTCQMMA", "UTCHMMA")
    return {opcode.split(".")[0] for opcode in one.opcodes} & set(names)


@pytest.mark.parametrize("case", [*EVERYWHERE, *OTHERS], ids=str)
def test_nothing_spills_and_all_fits(built: dict[Any, Compiled], case: Any) -> None:
    assert built[case].problems() == []


@pytest.mark.parametrize("case", EVERYWHERE, ids=str)
def test_fp8_tensor_cores_where_they_are(built: dict[Any, Compiled], case: Any) -> None:
    assert tensor_core(built[case]) == {FP8[case[1]]}


@pytest.mark.parametrize("sm", [86, 90])
def test_integers_go_to_fp16(built: dict[Any, Compiled], sm: int) -> None:
    assert tensor_core(built["integers", sm]) == {FP16[sm]}


@pytest.mark.parametrize("case", [("packed_gemm", 90), ("plain", 90), ("expanded_gemm", 90), ("promoted", 90)], ids=str)
def test_operands_are_fetched_behind_the_products(built: dict[Any, Compiled], case: Any) -> None:
    """Asynchronous copies of 16 bytes into shared memory, several steps ahead."""
    assert built[case].count("LDGSTS") >= 8
    assert built[case].count("LDGSTS.E.BYPASS.128", "LDGSTS.E.128") > 0


def test_hopper_decodes_weights_into_registers(built: dict[Any, Compiled]) -> None:
    """wgmma takes decoded weights from registers: no store to shared memory but the epilogue's matrices (STSM), and the
    products of half a step run while the other half is decoded (a wait that leaves one group in flight)."""
    one = built["plain", 90]
    assert not [opcode for opcode in one.opcodes if opcode.split(".")[0] == "STS"]
    assert "wgmma.wait_group.sync.aligned \t1;" in one.ptx or "wgmma.wait_group.sync.aligned 1;" in one.ptx
    assert one.registers <= 128, "two programs of 256 threads share a multiprocessor"


def test_decoding_costs_few_instructions(built: dict[Any, Compiled]) -> None:
    """A thread decodes 64 weights in a step, in words of four: no byte permutation is left of taking words apart."""
    assert built["plain", 90].count("PRMT") < 16
    assert built["plain", 89].count("PRMT") < 16
