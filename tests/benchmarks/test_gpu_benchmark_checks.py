"""The checks of the GPU benchmark: right kernels pass, planted faults are found, every timed GEMM is checked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu import check as gpu_check
from benchmarks.gpu import check_quantizers as gpu_check_quantizers
from benchmarks.gpu import gemm as gpu_gemm
from benchmarks.gpu.check_quantizers import QuantizerCase
from benchmarks.gpu.run import Device
from benchmarks.shapes import EXACT_64, REAL_128, Granularity
from plugins.gpu.tile_table import Tile
from plugins.gpu.tiles import gemm_tile

pytest.importorskip("triton", reason="the GPU kernels need triton")
pytestmark = [
    pytest.mark.kernels,
    pytest.mark.usefixtures("interpreter"),
    pytest.mark.filterwarnings("ignore:All-NaN slice"),
]
CPU = Device("cpu", 0, l2_bytes=4096, tiny=True)
SMALL = gpu_check.GemmCase("E2M3", "E2M1", 6, 8, 64, Granularity("exact groups of 16", 16))


@pytest.mark.parametrize("case", [SMALL, gpu_check.GemmCase("E4M3", "E3M0", 5, 7, 66, output="fp16")], ids=str)
def test_right_kernels_pass(case: gpu_check.GemmCase) -> None:
    row = gpu_check.check_gemm(CPU, case)
    assert row["passed"]
    for name in gpu_check.GEMMS:
        assert row[name]["sums_differ"] == 0 and 0 < row[name]["error_over_allowed"] <= 1


FAULTS = {
    "a sum off by its last bit": lambda spec, y: _changed(y, lambda v: np.nextafter(v, np.float32(1e9))),
    "an output off by 2 percent": lambda spec, y: y if spec.output == "fp32" else _changed(y, lambda v: v * 1.02),
    "an output not written": lambda spec, y: y if spec.output == "fp32" else _changed(y, lambda v: 0 * v),
    "a NaN lost": lambda spec, y: np.nan_to_num(y),
    "a NaN more": lambda spec, y: y if spec.output == "fp32" else _changed(y, lambda v: v * np.nan),
}


def _changed(y: np.ndarray, change: Any) -> np.ndarray:
    """y with its largest finite element changed."""
    y = y.copy()
    at = np.unravel_index(np.nanargmax(np.abs(y)), y.shape)
    y[at] = change(y[at])
    return y


@pytest.mark.parametrize("name", gpu_check.GEMMS)
@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_gemms_are_found(name: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_check.run_gemm

    def wrong(device: Device, spec: Any, arrays: Any, kernel: str, tokens: int) -> np.ndarray:
        y = right(device, spec, arrays, kernel, tokens)
        return FAULTS[fault](spec, y) if kernel == name else y

    monkeypatch.setattr(gpu_check, "run_gemm", wrong)
    assert not gpu_check.check_gemm(CPU, SMALL)["passed"]


@pytest.mark.parametrize("before", ["none", "gelu", "norm_modulate"])
@pytest.mark.parametrize("fault", ["code", "scale", "nan", "format"])
def test_wrong_quantizers_are_found(before: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from plugins.gpu import launch

    right, case = launch.quantize, QuantizerCase(before, "E2M3", 8, 40, "bf16")
    assert gpu_check_quantizers.check_quantizer(CPU, case)["passed"]

    def wrong(spec: Any, x: Any, **operands: Any) -> Any:
        codes, scales = right(spec, x, **operands)
        if fault == "code":
            codes[5, 7] ^= 8  # another binade of the same token
        elif fault == "scale":
            scales[5] *= 1.001
        elif fault == "nan":
            scales[torch.isnan(scales)] = 1.0
        else:
            codes, _ = right(gpu_check_quantizers.QuantizeSpec("E3M2", 40, before, "bf16"), x, **operands)
        return codes, scales

    monkeypatch.setattr(launch, "quantize", wrong)
    assert not gpu_check_quantizers.check_quantizer(CPU, case)["passed"]


def test_every_case_on_a_gpu_is_one_that_the_kernels_take() -> None:
    cases = gpu_check.gemm_cases(tiny=False)
    assert len({case.name for case in cases}) == len(cases) >= 20
    assert {case.spec.epilogue for case in cases} == {"none", "gate_residual"}
    assert {case.output for case in cases} == {"fp16", "bf16", "fp32"}
    assert {case.weight for case in cases} >= {"E2M1", "E1M2", "E3M0", "INT4"}
    assert all(case.spec for case in gpu_check_quantizers.quantizer_cases(tiny=False))


@pytest.mark.parametrize(
    "case",
    [
        gpu_check.GemmCase("E2M3", "E2M1", 5, 2, 4608),
        gpu_check.GemmCase("E4M3", "E2M1", 5, 2, 1152),
        gpu_check.GemmCase("E2M3", "E2M1", 5, 2, 1152, EXACT_64),
        gpu_check.GemmCase("E2M3", "E2M1", 5, 2, 1152, REAL_128),
    ],
    ids=lambda case: case.name,
)
def test_sums_of_the_check_are_exact_in_an_accumulator_of_14_bits(case: gpu_check.GemmCase) -> None:
    codes = gpu_check.inputs_of(case, sm=90)["a"]
    values = np.abs(gpu_check.reference.byte_values(case.activation)[codes])
    unit = values[values > 0].min() * 0.5
    span, _ = gpu_check.places_of_a_sum(case.spec, 1, 90)
    sums = (values * 6 * max(case.spec.multipliers) / unit).reshape(5, -1, span)
    alone = (sums > 0).sum(-1) <= 1
    assert ((sums.sum(-1) <= 2**13) | alone).all()
    assert (np.count_nonzero(codes, 1) > 0).sum() == 4  # all but the token of zeros
    dense = gpu_check.inputs_of(case, sm=80)["a"]
    assert np.count_nonzero(dense) > 4 * case.k / 2  # float32 accumulators take them all


HOPPER = Device("cuda", 90)


def test_every_gemm_that_is_timed_is_checked_in_its_tile() -> None:
    timed = gpu_check.timed_gemms(HOPPER)
    assert len({one.name for one in timed}) == len(timed)
    variants = {one.variant for one in timed}
    for shape, granularity in gpu_gemm.rows_to_measure():
        for name in set(gpu_gemm.OURS) & set(gpu_gemm.contestants_of(HOPPER, shape)):
            case = gpu_check.GemmCase("E2M3", "E2M1", 1, shape.n, shape.k, granularity, integers="int8" in name)
            expands = name.startswith("packed") and gpu_gemm.expands_first(case.spec, shape.m, 90)
            run = "expanded_gemm" if expands else name.removesuffix("_int8")
            tile = gemm_tile(run, case.spec, shape.m, 90, may_split=True)
            one = gpu_check.TimedGemm(run, case, tile)
            assert one.variant in variants, (name, shape.name)
    assert {one.case.epilogue for one in timed} == {"none", "gate_residual"}
    assert {one.tile.splits for one in timed} >= {1, 3, 6}
    for one in timed:
        assert one.small.m > one.tile.m and one.small.m % 32 == 0
    names = [task.name for task in gpu_check.tasks(HOPPER)]
    assert names[: len(timed)] == [one.name for one in timed] and len(set(names)) == len(names)


@pytest.mark.parametrize("splits", [1, 3])
def test_a_wrong_kernel_is_found_in_the_tile_it_is_timed_in(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = gpu_check.GemmCase("E2M3", "E2M1", 4096, 16, 192)
    timed = gpu_check.TimedGemm("packed_gemm", case, Tile(16, 16, 32, 4, 1, splits))
    assert gpu_check.check_timed(CPU, timed)["passed"]
    other = replace(timed, tile=replace(timed.tile, m=32))
    right = gpu_check.run_gemm
    monkeypatch.setattr(gpu_check, "run_gemm", lambda *inputs: 1.02 * right(*inputs))
    assert not gpu_check.check_timed(CPU, other)["passed"]


@pytest.mark.parametrize("activation", ["E2M3", "E4M3", "E3M4"])
def test_sums_of_the_drawn_codes_are_exact_in_float32_whatever_their_order(activation: str) -> None:
    case = gpu_check.GemmCase(activation, "E2M1", 4, 5, 1152)
    arrays = gpu_check.inputs_of(case)
    values = gpu_check.reference.byte_values(activation)[arrays["a"]]
    assert np.abs(values).sum(1).max() * 6 / (np.abs(values[values != 0]).min() * 0.5) < 2**24
