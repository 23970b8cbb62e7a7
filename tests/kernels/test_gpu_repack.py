"""pack and expand on the device, under Triton's interpreter; and what the launch functions say of wrong tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from export.errors import ContractError, EnvironmentLacksError, RecipeError
from export.formats.format import decode, get_format, pack, unpack
from plugins.gpu import launch
from plugins.gpu.spec import GemmSpec
from plugins.gpu.table import kernel
from tests.support.gpu_gemms import case, tensor

pytestmark = pytest.mark.kernels

MULTIPLIERS = (1, 2, 3, 4, 5, 6, 8, 10)
WEIGHTS = ("E2M1", "E1M2", "E3M0", "INT4", "UE2M2")


def codes_of(n: int, k: int) -> np.ndarray:
    """[n, k]: all 16 codes in every position of a byte, then any."""
    codes = np.random.default_rng(n * k).integers(0, 16, (n, k)).astype(np.uint8)
    codes.flat[:32] = np.tile(np.arange(16), 2)[: codes.size]
    return codes


@pytest.mark.parametrize(("n", "k"), [(1, 2), (3, 34), (5, 130), (9, 2050)])
def test_pack(interpreter: None, n: int, k: int) -> None:
    codes = codes_of(n, k)
    packed = launch.pack(torch.from_numpy(codes)).numpy()
    np.testing.assert_array_equal(packed, pack(codes, 4))
    assert packed[0, 0] == codes[0, 0] | codes[0, 1] << 4, "element 0 in the low nibble"


@pytest.mark.parametrize(
    ("weight", "n", "k"),
    [("E2M1", 1, 2), ("E1M2", 3, 66), ("E3M0", 5, 132), ("INT4", 9, 2052), ("UE2M2", 3, 66), ("E2M1", 9, 2052)],
)
def test_expand(interpreter: None, weight: str, n: int, k: int) -> None:
    """E4M3 bytes of value * 2^e, and their values are the codes' values."""
    spec = GemmSpec("E2M3", weight, k, n)
    packed = np.ascontiguousarray(pack(codes_of(n, k), 4))
    result = launch.expand(spec, torch.from_numpy(packed)).numpy()
    np.testing.assert_array_equal(result, kernel("expand").reference(spec, packed)[0])
    values = decode(get_format("E4M3"), result) * 2.0**-spec.byte_exponent
    np.testing.assert_array_equal(values, get_format(weight).values[unpack(packed, 4, k)])


@pytest.mark.parametrize(("k", "group"), [(256, 128), (128, 16), (144, 48), (132, 22), (1200, 24), (12, 2)])
def test_expand_with_multipliers(interpreter: None, k: int, group: int) -> None:
    spec = GemmSpec("E2M3", "E2M1", k, 7, group, MULTIPLIERS)
    arrays = case(spec, 1)
    result = launch.expand(spec, tensor(arrays["w"]), multiplier_codes=tensor(arrays["multiplier_codes"])).numpy()
    np.testing.assert_array_equal(result, kernel("expand").reference(spec, arrays["w"], arrays["multiplier_codes"])[0])


@pytest.mark.fast
@settings(max_examples=15, deadline=None)
@given(
    hnp.arrays(
        np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 40).map(lambda x: 2 * x)), elements=st.integers(0, 15)
    )
)
def test_expanding_what_was_packed_gives_the_values(codes: np.ndarray) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec = GemmSpec("E2M3", "E1M2", codes.shape[1], len(codes))
        expanded = launch.expand(spec, launch.pack(torch.from_numpy(codes))).numpy()
    values = decode(get_format("E4M3"), expanded) * 2.0**-spec.byte_exponent
    np.testing.assert_array_equal(values, get_format("E1M2").values[codes])


def test_into_given_tensors(interpreter: None) -> None:
    codes = torch.from_numpy(codes_of(4, 64))
    packed, expanded = torch.empty(4, 32, dtype=torch.uint8), torch.empty(4, 64, dtype=torch.uint8)
    assert launch.pack(codes, packed=packed) is packed
    spec = GemmSpec("E2M3", "E2M1", 64, 4)
    assert launch.expand(spec, packed, expanded=expanded) is expanded
    assert launch.pack(torch.empty(0, 4, dtype=torch.uint8)).shape == (0, 2)


# --- wrong tensors ---------------------------------------------------------------------------------------------------

PLAIN = GemmSpec("E2M3", "E2M1", 64, 8)
GROUPED = GemmSpec("E2M3", "E2M1", 64, 8, 16, MULTIPLIERS)
GATED = GemmSpec("E2M3", "E2M1", 64, 8, epilogue="gate_residual", output="bf16")
ZERO = GemmSpec("UE2M2", "E2M1", 64, 8, zero_point=True)


def launched(spec: GemmSpec, tokens: int = 3, **changed: Any) -> torch.Tensor:
    arguments = {name: tensor(value) for name, value in case(spec, 6, tokens=3).items() if name != "codes"} | changed
    first = [arguments.pop(name) for name in ("a", "a_scale", "w", "w_scales", "bias")]
    return launch.packed_gemm(spec, *first, **arguments, tokens=tokens)


@pytest.mark.parametrize(
    ("spec", "changed", "message"),
    [
        (
            PLAIN,
            {"a": torch.zeros(6, 62, dtype=torch.uint8)},
            r"a is uint8 \[6, 62\]; packed_gemm takes uint8 \[6, 64\]",
        ),
        (PLAIN, {"a": torch.zeros(6, 64)}, r"a is float32 \[6, 64\]; packed_gemm takes uint8"),
        (PLAIN, {"a": torch.zeros(64, 6, dtype=torch.uint8).T}, r"a is uint8 \[6, 64\], not contiguous"),
        (PLAIN, {"a_scale": torch.ones(6, 1)}, r"a_scale is float32 \[6, 1\]; packed_gemm takes float32 \[6\]"),
        (
            PLAIN,
            {"w": torch.zeros(8, 64, dtype=torch.uint8)},
            r"w is uint8 \[8, 64\]; packed_gemm takes uint8 \[8, 32\]",
        ),
        (PLAIN, {"y": torch.zeros(6, 8)}, r"y is float32 \[6, 8\]; packed_gemm takes float16 \[6, 8\]"),
        (GROUPED, {"multiplier_codes": None}, r"multiplier_codes is missing; packed_gemm needs it as uint8 \[8, 2\]"),
        (GATED, {"gate": None}, r"gate is missing; packed_gemm needs it as bfloat16 \[2, 8\]"),
        (GATED, {"residual": torch.zeros(6, 8)}, r"residual is float32 \[6, 8\]; packed_gemm takes bfloat16"),
        (GATED, {"tokens": 4}, "tokens 4: the rows that share a row of gate must divide the 6 rows"),
        (GATED, {"tokens": 0}, "tokens 0: the rows that share a row of gate must divide the 6 rows"),
        (ZERO, {"w_sums": None}, r"w_sums is missing; packed_gemm needs it as float32 \[8\]"),
    ],
)
def test_wrong_tensors(interpreter: None, spec: GemmSpec, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        launched(spec, **changed)


def test_the_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(EnvironmentLacksError, match="tensors on cpu: the kernels run on a GPU, or on the CPU with"):
        launched(PLAIN)


def test_groups_share_whole_bytes() -> None:
    with pytest.raises(ContractError, match="group_size 33 must be even"):
        GemmSpec("E2M3", "E2M1", 66, 8, 33, MULTIPLIERS)
    with pytest.raises(RecipeError, match="multiplier 7 takes E2M1 out of E4M3"):
        GemmSpec("E2M3", "E2M1", 64, 8, 16, (1, 7))
    with pytest.raises(ContractError, match="in_features 65 must be even"):
        launch.pack(torch.zeros(2, 65, dtype=torch.uint8))
