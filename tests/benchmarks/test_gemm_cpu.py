"""Every contestant at a small size: ours are exact, and each row says what it measured."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import gemm_cpu
from tests.support import native

pytestmark = pytest.mark.kernels


def test_our_sums_are_exact_and_every_contestant_has_a_row():
    native.need_compiler()
    rows = {row["kernel"]: row for row in gemm_cpu.measure(5, 32, 256, rounds=1, threads=1)}
    assert {kernel.name for kernel in gemm_cpu.KERNELS} < set(rows) and gemm_cpu.PEER in rows
    for kernel in gemm_cpu.KERNELS:
        assert rows[kernel.name]["largest_error_of_a_sum"] == 0
    assert all(row["gop_per_s"] >= row["median_gop_per_s"] > 0 for row in rows.values())


def test_attention_of_each_kind_has_a_row():
    native.need_compiler()
    rows = gemm_cpu.measure_attention(20, heads=2, rounds=2, threads=1)
    kinds = ["float32", "E2M3 x E2M3", "INT8 x INT8"]
    assert [row["attention"] for row in rows] == 3 * kinds
    caption = gemm_cpu.CAPTION_TOKENS
    padding = caption - gemm_cpu.CAPTION_WORDS
    reaches = [(20, 0)] * 3 + [(caption, 0)] * 3 + [(caption, padding)] * 3
    assert [(row["keys"], row["hidden_keys"]) for row in rows] == reaches and 0 < padding < caption
    assert all(row["median_ns_per_score"] >= row["ns_per_score"] > 0 for row in rows)


@pytest.mark.parametrize("formats", gemm_cpu.ATTENTIONS, ids=str)
def test_hidden_keys_of_a_caption_count_for_nothing(formats):
    """What is measured with a mask is the attention to the keys that it leaves."""
    native.need_compiler()
    call = gemm_cpu.attention(formats, tokens=9, keys=20, hidden=15, heads=2, threads=1)
    v = call.feeds["v"]
    other = replace(call, feeds=call.feeds | {"v": np.concatenate([v[:, :, :5], -v[:, :, 5:]], axis=2)})
    np.testing.assert_array_equal(other.result(), call.result())


def test_every_call_writes_where_the_first_did():
    native.need_compiler()
    call = gemm_cpu.attention(None, tokens=9, keys=20, hidden=0, heads=2, threads=1)
    addresses = set()
    for _ in range(3):
        call()
        (output,) = call._binding.get_outputs()
        addresses.add(output.data_ptr())
        np.testing.assert_array_equal(output.numpy(), call.result())
    assert len(addresses) == 1
