"""The GPU benchmark's checks find planted faults, its sections run on a machine without a GPU with time made up, and
its own kernels compile."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.gpu import denoiser_times as gpu_denoiser_times
from benchmarks.gpu import exactness as gpu_exactness
from benchmarks.gpu import fused as gpu_fused
from benchmarks.gpu import gemm as gpu_gemm
from benchmarks.gpu import timing as gpu_timing
from benchmarks.gpu.denoiser import Size
from benchmarks.gpu.run import Device
from benchmarks.gpu.weights import dequantized, fake_quantize, quantize_weight, relative_error
from benchmarks.shapes import CHANNEL, EXACT_64, Granularity, Shape
from export.dialect import reference as op_reference
from export.errors import ContractError
from export.formats.operands import exact_multipliers

pytest.importorskip("triton", reason="the GPU kernels need triton")
pytestmark = [
    pytest.mark.kernels,
    pytest.mark.usefixtures("interpreter"),
    pytest.mark.filterwarnings("ignore:All-NaN slice"),
]
CPU = Device("cpu", 0, l2_bytes=4096, tiny=True)
REAL_16 = Granularity("real groups of 16", 16, True)
GROUPS_32 = Granularity("exact groups of 32", 32)


# --- numbers in plain torch -------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["E2M3", "E3M2", "E4M3", "INT8", "INT6", "E3M4"]), st.integers(0, 2**32 - 1), st.floats(-9, 9))
def test_fake_quantizing_is_the_op_and_its_inverse(name: str, seed: int, magnitude: float) -> None:
    x = (np.random.default_rng(seed).standard_normal((3, 40)) * 2.0**magnitude).astype(np.float32)
    x[0] = 0
    codes, scale = op_reference.quantize_activation(x, format=name)
    (expected,) = op_reference.dequantize_activation(codes, scale, format=name)
    assert np.array_equal(fake_quantize(torch.from_numpy(x), name).numpy(), expected)


@pytest.mark.parametrize("weight", ["E2M1", "E1M2", "E3M0", "INT4"])
@pytest.mark.parametrize("granularity", [CHANNEL, Granularity("exact", 16), REAL_16], ids=lambda row: row.name)
def test_packed_weights_stand_for_what_the_op_says(weight: str, granularity: Granularity) -> None:
    w = torch.randn(10, 80, generator=torch.Generator().manual_seed(0))
    w[3, 5] = 8.0
    packed = quantize_weight(w, weight, granularity)
    fields = granularity.spec_fields(weight)
    group_size = fields.get("group_size", 0)
    codes = packed.multiplier_codes
    (expected,) = op_reference.dequantize_weight(
        packed.codes.numpy(),
        packed.scales.numpy(),
        op_reference.no_multipliers(80, group_size) if codes is None else codes.numpy(),
        format=weight,
        in_features=80,
        group_size=group_size,
        multipliers=fields.get("multipliers", (1,)),
    )
    decoded = dequantized(packed).numpy()
    assert np.allclose(decoded, expected.T, rtol=2.0**-23, atol=0)  # scale times multiplier rounds before or after
    # Half the largest step of a 4-bit format is a third of its largest value (E3M0), under the scale of the group.
    assert (
        np.abs(decoded - w.numpy()) <= np.abs(w.numpy()).reshape(10, -1, group_size or 80).max(-1).max() * 0.34
    ).all()


def test_group_multipliers_bring_weights_closer() -> None:
    w = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 0, 256)
    errors = [float((dequantized(quantize_weight(w, "E2M1", g)) - w).norm()) for g in (CHANNEL, EXACT_64)]
    assert errors[1] < errors[0]
    assert EXACT_64.spec_fields("E2M1") == {
        "group_size": 64, "real_groups": False, "multipliers": exact_multipliers("E2M1"),
    }  # fmt: skip


# --- sections with time made up ---------------------------------------------------------------------------------------


@pytest.fixture
def clockless(monkeypatch: pytest.MonkeyPatch) -> None:
    """No CUDA: a graph is the list of its calls, and every replay takes one of five times."""

    class Replay:
        def __init__(self, calls: Any) -> None:
            self.calls = calls
            self.replay()

        def replay(self) -> None:
            for call in self.calls:
                call()

    ticks = itertools.count()
    monkeypatch.setattr(gpu_timing, "captured", Replay)
    monkeypatch.setattr(gpu_timing, "ROUNDS", (2, 2))
    monkeypatch.setattr(gpu_timing, "_milliseconds", lambda call, flush: 1.0 + next(ticks) % 5)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda: 0)
    monkeypatch.setattr("torch.compile", lambda function, **_: function)


def test_small_shapes_of_hunyuan_have_fewer_contestants() -> None:
    hopper = Device("cuda", 90)
    small, large = Shape(1024, 64, 64, 512, ("hunyuan ff.in",)), Shape(4096, 64, 64, 1024, ("hunyuan ff.in",))
    assert gpu_gemm.contestants_of(hopper, small) == ("packed_gemm", "expanded_gemm", *gpu_gemm.FP8, "bf16")
    assert gpu_gemm.contestants_of(hopper, large) == EVERYONE
    assert gpu_gemm.contestants_of(Device("cuda", 80), large) == (*gpu_gemm.OURS, *gpu_gemm.WAYS, "bf16")


EVERYONE = (*gpu_gemm.OURS, *gpu_gemm.WAYS, *gpu_gemm.FP8, "bf16")


@pytest.mark.usefixtures("clockless")
@pytest.mark.parametrize("granularity", [CHANNEL, Granularity("exact", 16), REAL_16], ids=lambda row: row.name)
def test_a_row_of_gemms(granularity: Granularity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_gemm, "contestants_of", lambda device, shape: EVERYONE)
    row = gpu_gemm.measure(CPU, Shape(16, 32, 64, 256, ("pixart ff.in",)), granularity, lambda: None)
    json.dumps(row)
    assert set(row["contestants"]) | set(row["refused"]) == set(EVERYONE)
    assert set(row["contestants"]) >= {*gpu_gemm.OURS, *gpu_gemm.WAYS, "bf16"}
    assert row["expands_first"] == {"packed_gemm": False, "packed_gemm_int8": False}
    assert row["passed"] and row["wrong"] == {}
    assert set(row["error"]) >= {*gpu_gemm.OURS, *gpu_gemm.WAYS}
    assert all(0 < error < 2.0**-7 for error in row["error"].values())  # the interpreter cuts bf16 off, a whole unit
    for name, timing in row["contestants"].items():
        assert timing["gb_per_s"] > 0 and timing["rounds"] == 2, name


@pytest.mark.parametrize("contestant", [*gpu_gemm.OURS, "bf16"])
@pytest.mark.parametrize("granularity", [CHANNEL, Granularity("exact", 16), REAL_16], ids=lambda row: row.name)
def test_counted_bytes_are_those_of_the_tensors(contestant: str, granularity: Granularity) -> None:
    shape = Shape(6, 8, 64, 256, ())
    operands = gpu_gemm.operands(CPU, shape, granularity)
    y = torch.empty(shape.m, shape.n, dtype=torch.bfloat16)
    ours = [operands.a, operands.a_scale, operands.packed.scales, operands.bias, y]
    codes = [] if operands.packed.multiplier_codes is None else [operands.packed.multiplier_codes]
    tensors = {
        "packed_gemm": [*ours, operands.packed.codes, *codes],
        "expanded_gemm": [*ours, operands.expanded],
        "packed_gemm_int8": [*ours, operands.packed.codes, *codes],
        "expanded_gemm_int8": [*ours, operands.expanded_int8],
        "bf16": [operands.a_wide, operands.w_wide, y],
    }[contestant]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert gpu_gemm.moved_bytes(shape, granularity, contestant) == size


@pytest.mark.usefixtures("clockless")
@pytest.mark.parametrize(
    "case", [gpu_fused.FusedCase("norm_modulate", 2, 3, 72), gpu_fused.FusedCase("gelu", 1, 5, 72)], ids=str
)
def test_a_row_of_fused_kernels(case: gpu_fused.FusedCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._dynamo.reset", lambda: None)
    row = gpu_fused.measure(CPU, case, lambda: None)
    json.dumps(row)
    assert set(row["contestants"]) == {"fused", "triton_alone", "compiled_alone", "copy"} and not row["refused"]
    assert set(row["ratios"]) == {"over_alone", "of_copy"}
    assert row["alone_differs"] < 2.0**-6  # bf16, which the interpreter cuts off, and torch's LayerNorm rounds twice
    inputs = gpu_fused.inputs_of(CPU, case)
    read = sum(2 * tensor.numel() for tensor in inputs.values())
    assert case.moved_bytes(False) == read + 2 * case.m * case.channels
    assert case.moved_bytes(True) == read + case.m * case.channels + 4 * case.m


@pytest.mark.usefixtures("clockless")
def test_a_row_of_attention_alone() -> None:
    row = gpu_denoiser_times.attention_row(gpu_denoiser_times.Size(64, 4), "cpu", lambda: None, 64)
    json.dumps(row)
    assert set(row["contestants"]) | set(row["refused"]) == set(gpu_denoiser_times.ATTENTION)
    assert "default" in row["contestants"], row["refused"]
    assert (row["heads"], row["tokens"], row["head_size"]) == (4, 16, 16)
    timing = row["contestants"]["default"]
    assert timing["tflops"] == pytest.approx(4 * 4 * 16 * 16 * 16 / timing["latency_ms"] / 1e9)


def test_a_contestant_that_cannot_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("row-wise scaling is not on this GPU")

    monkeypatch.setattr(gpu_timing, "captured", lambda calls: calls[0]())
    times, refused = gpu_timing.contest({"fp8_rowwise": [broken]}, lambda: None, 1.0, lambda *_: {})
    assert times == {} and refused == {"fp8_rowwise": "RuntimeError: row-wise scaling is not on this GPU"}


@pytest.mark.usefixtures("clockless")
def test_a_row_in_which_ours_cannot_run_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    from plugins.gpu import launch

    def packed_gemm(*_inputs: Any, **_options: Any) -> None:
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(launch, "packed_gemm", packed_gemm)
    row = gpu_gemm.measure(CPU, Shape(16, 32, 64, 256, ("pixart ff.in",)), CHANNEL, lambda: None)
    why = "RuntimeError: out of shared memory"
    assert row["failed"] == f"packed_gemm: {why}; packed_gemm_int8: {why}"
    assert "expanded_gemm" in row["contestants"] and set(row["error"]) >= {"expanded_gemm"}


@pytest.mark.parametrize(("integers", "shape"), [(False, Shape(4096, 1408, 6144, 1024, ())), (True, None)])
def test_a_tile_left_out_is_further_off_than_the_limit(integers: bool, shape: Shape | None) -> None:
    shape = shape or Shape(4096, 6144, 1408, 1024, ())
    limit = gpu_gemm.limit(gpu_gemm.spec_of(shape, CHANNEL, integers), 90)
    y = torch.ones(shape.m, shape.n)
    y[:128, :128] = 0
    assert 2.0**-8 <= limit < relative_error(y, torch.ones_like(y, dtype=torch.float64))


def test_wrong_outputs_are_named() -> None:
    spec = gpu_gemm.spec_of(Shape(16, 32, 64, 256, ()), CHANNEL)
    errors = {"packed_gemm": 0.001, "expanded_gemm": 0.3, "expanded_gemm_int8": float("nan"), "fp8_rowwise": 0.3}
    assert set(gpu_gemm.wrong_of(errors, spec, 90)) == {"expanded_gemm", "expanded_gemm_int8"}


@pytest.mark.torch
@pytest.mark.usefixtures("clockless")
def test_the_rows_of_the_denoiser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._dynamo.reset", lambda: None)
    monkeypatch.setattr(gpu_denoiser_times, "EXACT_64", Granularity("exact", 16))
    monkeypatch.setattr(gpu_denoiser_times, "host_milliseconds", lambda call: 0.5)
    size = Size(width=32, heads=4, layers=1, caption=3, caption_channels=16)
    models = gpu_denoiser_times.make_models(CPU, size)
    weights = gpu_denoiser_times.weights_row(models)
    assert weights["packed_of_bf16"] < weights["expanded_of_bf16"] < 1
    numbers = gpu_denoiser_times.numbers_row(models, 32)
    assert set(numbers["error"]) == set(gpu_denoiser_times.OURS) and numbers["error"]["packed"] < 0.05
    row = gpu_denoiser_times.times_row(models, lambda: None, 32, 2)
    assert set(row["contestants"]) == {"bf16_eager", "bf16_compiled_blocks", *gpu_denoiser_times.OURS}
    assert set(row["ratios"]) >= {"over_eager", "over_compiled"} and not row["refused"]
    whole = gpu_denoiser_times.times_row(models, lambda: None, 32, 1, whole=True)
    assert set(whole["contestants"]) == {"bf16_compiled_whole", "expanded"}
    json.dumps([weights, numbers, row, whole])


# --- the accumulator's probe ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["E2M3", "E3M2"])
@pytest.mark.parametrize("interval", [0, 64, None])
def test_the_probe_counts_nothing_where_sums_are_exact(activation: str, interval: int | None) -> None:
    row = gpu_exactness.count(CPU, gpu_exactness.spec_of(activation, 96, GROUPS_32, 16), GROUPS_32, interval)
    assert (
        set(row["differ"].values()) == {0}
        and row["outputs"] == 256
        and set(row["differ"]) == set(gpu_exactness.PATTERNS)
    )


def test_the_probe_counts_sums_that_lose_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_exactness.probe
    cut = lambda *arguments: right(*arguments).half().float()  # noqa: E731  an accumulator of 11 bits
    monkeypatch.setattr(gpu_exactness, "probe", cut)
    row = gpu_exactness.count(CPU, gpu_exactness.spec_of("E2M3", 96, CHANNEL, 16), CHANNEL, 0)
    assert row["differ"]["one sign"] > 200 and row["worst_over_mean"]["one sign"] > 0


def test_inputs_of_the_probe_are_on_their_formats_grids() -> None:
    for (activation, _), pattern in itertools.product(gpu_exactness.PAIRS, gpu_exactness.PATTERNS):
        spec = gpu_exactness.spec_of(activation, 96, GROUPS_32, 8)
        a, w = gpu_exactness.operands(CPU, spec, pattern)
        exponents = gpu_exactness.operand_of(activation).shift, spec.byte_exponent
        for values, exponent in zip((a, w), exponents, strict=True):
            back = gpu_exactness.e4m3_bytes(values, exponent).view(torch.float8_e4m3fn).double()
            assert torch.equal(back, values * 2.0**exponent), (pattern, activation)
        products = np.outer(np.abs(gpu_exactness.get_format("E2M1").values), spec.multipliers)
        assert set(w.abs().unique().tolist()) <= set(products.ravel().tolist())


def test_a_gpu_without_fp8_is_told_so() -> None:
    (task,) = gpu_exactness.tasks(Device("cuda", 80))
    assert "no FP8 tensor cores" in task.run()["skipped"]
    names = [task.name for task in gpu_exactness.tasks(Device("cuda", 90))]
    assert len(set(names)) == len(names) == 42
    assert {name.split(", ")[-1] for name in names if "groups of 64, K 1152" in name} >= {
        "never promoted", "promoted every 64", "expanded_gemm as compiled",
    }  # fmt: skip


# --- compiled, not run ------------------------------------------------------------------------------------------------


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from benchmarks.gpu import kernels as k
from benchmarks.gpu.exactness import TILE, WARPS
from plugins.gpu.compile import resources

def build(function, sm, types, constants, warps):
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    aligned = [index for index, name in enumerate(function.arg_names) if types.get(name) and name != "tokens"]
    attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}  # as launched: torch's memory, whole tiles
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options).asm

rows = dict(C=1152, BLOCK=1024, TAIL=128)
x = {"x": "*bf16", "y": "*bf16", "shift": "*bf16", "scale": "*bf16", "tokens": "i32"}
sums = {"a": "*u8", "w": "*u8", "y": "*fp32", "M": "i32", "N": "i32", "K": "i32"}
for sm in (80, 90):
    build(k.norm_modulate, sm, x, rows | {"EPSILON": 1e-6}, 4)
    build(k.gelu, sm, x, rows, 4)
for interval in (32, 64, 8192):
    constants = dict(PROMOTE=interval, BM=TILE, BN=TILE, BK=min(interval, 128))
    kernel = build(k.fp8_sums, 90, sums, constants, WARPS)
    assert "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3" in kernel["ptx"]
    registers, local_bytes = resources(kernel["cubin"], "fp8_sums")
    assert registers and local_bytes == 0, interval
print("ok")
"""


def test_the_kernels_of_the_benchmark_compile(tmp_path: Path) -> None:
    import os

    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.strip() == "ok", done.stderr


def test_an_odd_depth_is_refused() -> None:
    with pytest.raises(ContractError):
        gpu_gemm.operands(CPU, Shape(2, 3, 63, 256, ()), CHANNEL)
