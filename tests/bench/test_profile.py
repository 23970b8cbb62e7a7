"""Where a call's time goes: products are those of the graph, parts add up, and what is not known is not claimed."""

import json
import platform
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest

from pipeline.backends.cpu import CpuBackend, CpuOptions
from pipeline.backends.sizes import evaluated
from pipeline.bench import profile
from pipeline.recipe import Recipe
from plugins.cpu import library, limits
from plugins.cpu.attention_operands import head_bytes
from tests.kernels.test_native_packed_gemm import VARIANTS
from tests.support import native
from tests.support.portable import activations, portable, random_linear

BODY = """
  q = fpq.QuantizedLinear <layer="a"> (x)
  parts = Constant <value_ints = [0, 0, 4, 16]> ()
  qs = Reshape(q, parts)
  qt = Transpose <perm = [0, 2, 1, 3]> (qs)
  kt = Transpose <perm = [0, 2, 3, 1]> (qs)
  s = MatMul(qt, kt)
  p = Softmax <axis = -1> (s)
  o = MatMul(p, qt)
  y = Neg(o)
"""
DOCUMENT = {
    "threads": 2,
    "call_ms": 10.0,
    "floor_ms": 5.0,
    "variant": "avx2",
    "byte_products_per_s": 4e11,
    "float_products_per_s": 1e11,
    "memory_bytes_per_s": 2.04e10,
    "parts": [
        {"part": profile.GEMM, "ms": 6.0, "products": 1.2e9, "weight_bytes": 100},
        {"part": profile.ATTENTION, "ms": 3.0, "products": 0.2e9, "weight_bytes": 0},
        {"part": profile.BETWEEN, "ms": 1.0, "products": 0.0, "weight_bytes": 0},
        {"part": profile.REST, "ms": 0.0, "products": 0.0, "weight_bytes": 0},
    ],
    "machine": {"cpu": "a processor"},
}


@pytest.mark.kernels
@pytest.mark.parametrize("path", ["fused", "stock"])
def test_products_are_those_of_the_graph(path, tmp_path):
    native.need_compiler()
    model = portable(BODY, [random_linear("a", n=64)], "float[B,S,64] x", "float y")
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    recipe = Recipe(name="test", model="none").with_options(CpuOptions(path))
    for folder in ("work", "cpu"):
        (tmp_path / folder).mkdir()
    backend = CpuBackend()
    backend.build(backend.lower(tmp_path / "model.onnx", tmp_path / "work", recipe), tmp_path / "cpu", recipe)
    document = profile.profile(tmp_path / "cpu", {"x": activations(np.random.default_rng(0), tokens=12, k=64)}, 1)
    batch = activations(np.random.default_rng(0), tokens=12, k=64).shape[0]
    by_part = {row["part"]: row for row in document["parts"]}
    assert by_part[profile.GEMM]["products"] == batch * 12 * 64 * 64
    assert by_part[profile.ATTENTION]["products"] == batch * 4 * 2 * 12 * 12 * 16
    # Of 4 bits with a multiplier for each group; stock ops have a byte each, which onnxruntime may have packed anew.
    assert by_part[profile.GEMM]["weight_bytes"] in ({"fused": (64 * 64 // 2,), "stock": (0, 64 * 64)}[path])
    assert document["call_ms"] == pytest.approx(sum(row["ms"] for row in document["parts"])) and document["call_ms"] > 0
    if document["floor_ms"] is not None:
        assert 0 < document["floor_ms"] < document["call_ms"]
    json.dumps(document)


TWO_LINEARS = """
  a = fpq.QuantizedLinear <layer="a"> (x)
  y = fpq.QuantizedLinear <layer="b"> (a)
"""


@pytest.mark.kernels
def test_what_a_gemm_quantizes_of_its_rows_is_counted_between_gemms(tmp_path, monkeypatch):
    native.need_compiler()
    layers = [random_linear(name, n=64) for name in "ab"]
    model = portable(TWO_LINEARS, layers, "float[B,S,64] x", "float[B,S,64] y")
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    recipe = Recipe(name="test", model="none").with_options(CpuOptions("fused"))
    for folder in ("work", "cpu"):
        (tmp_path / folder).mkdir()
    backend = CpuBackend()
    backend.build(backend.lower(tmp_path / "model.onnx", tmp_path / "work", recipe), tmp_path / "cpu", recipe)
    inputs = {"x": activations(np.random.default_rng(0), tokens=700, k=64)}
    before = limits.quantizing_s()
    profile.profile(tmp_path / "cpu", inputs, 2)
    assert limits.quantizing_s() > before
    turns = iter(range(100))
    monkeypatch.setattr(limits, "quantizing_s", lambda: 2.0 * next(turns))  # two seconds a call, by two threads
    document = profile.profile(tmp_path / "cpu", inputs, 2)
    by_part = {row["part"]: row["ms"] for row in document["parts"]}
    assert by_part[profile.GEMM] < 0 and by_part[profile.BETWEEN] > 1000, "a second of each call is moved"
    assert document["call_ms"] == pytest.approx(sum(by_part.values())) and document["call_ms"] < 1000


@pytest.mark.kernels
def test_rates_are_those_of_the_variant_that_is_used():
    native.need_compiler()
    rates = limits.measure(1)
    assert rates.variant in VARIANTS
    assert (rates.byte_products_per_s > 0) == (rates.variant != "plain")
    assert rates.memory_bytes_per_s > 0


def test_a_gemm_takes_as_long_as_its_weight_comes_from_memory():
    rates = limits.Limits("avx2", byte_products_per_s=1e9, float_products_per_s=5e8, memory_bytes_per_s=2e8)
    few_rows = profile.Event("PackedGemm", 9.0, products=1e8, weight_bytes=300 << 20)
    many_rows = profile.Event("MatMulInteger", 9.0, products=4e9, weight_bytes=100 << 20)
    attention, other = profile.Event("Attention", 9.0, 1e9, 0), profile.Event("Neg", 9.0, 0.0, 0)
    call = [few_rows, many_rows, attention, other]
    assert profile.floor_s(call, rates) == pytest.approx((300 << 20) / 2e8 + 4 + 2)
    in_a_cache = [profile.Event("PackedGemm", 9.0, products=1e8, weight_bytes=limits.STREAM_BYTES)]
    assert profile.floor_s(in_a_cache, rates) == pytest.approx(0.1)
    assert profile.floor_s(call, replace(rates, memory_bytes_per_s=0.0)) is None


def test_the_table_says_shares_of_the_time_and_of_the_machine():
    header, rows = profile.summary(DOCUMENT)
    assert rows[0] == [profile.GEMM, "6.0", "60%", "200", "50%"]
    assert rows[1] == [profile.ATTENTION, "3.0", "30%", "67", "67%"]
    assert rows[2][3:] == ["-", "-"] and len(header) == len(rows[0])
    words = profile.conditions(DOCUMENT)
    assert "20.4 GB/s from memory" in words and "at least 5.0 ms: the call takes 2.00 times that" in words


def test_products_of_quantized_attention_are_bytes():
    """Those of scores and of values, of as many keys as the bytes hold, at the rate of bytes."""
    head = evaluated(head_bytes("20", 16), {})
    for op_type in ("QuantizedAttention", "AttentionOperands"):
        assert profile.PARTS[op_type] == profile.BYTE_ATTENTION
    assert profile._products("AttentionOperands", [[2, 4, 20, 16]] * 2, [2, 4, head]) == 0
    shapes = [[2, 4, 12, 16], [2, 4, head], [1, 1, 1, 1]]
    assert profile._products("QuantizedAttention", shapes, shapes[0]) == 2 * 2 * 4 * 12 * 24 * 16, "20 in whole octets"
    row = {"part": profile.BYTE_ATTENTION, "ms": 2.0, "products": 0.4e9, "weight_bytes": 0}
    assert profile.summary(DOCUMENT | {"parts": [row]})[1] == [[profile.BYTE_ATTENTION, "2.0", "20%", "200", "50%"]]


def test_rates_that_are_not_known_give_no_floor():
    unknown = DOCUMENT | {"floor_ms": None, "byte_products_per_s": 0.0}
    assert profile.summary(unknown)[1][0][4] == "-"
    assert "rates are not known" in profile.conditions(unknown)


def test_rates_of_all_threads_are_added(monkeypatch):
    streams = []
    kernels = SimpleNamespace(
        packed_gemm_variant=lambda: b"avx2",
        byte_products_per_second=lambda seconds: 3.0,
        float_products_per_second=lambda seconds: 2.0,
        memory_bytes_per_second=lambda seconds, size: streams.append(size.value) or 1.0,
    )
    monkeypatch.setattr(limits.ctypes, "CDLL", lambda path: kernels)
    monkeypatch.setattr(limits.library, "path_of_library", lambda: "kernels.so")
    assert limits.measure(3) == limits.Limits("avx2", 9.0, 6.0, 3.0)
    assert streams == [limits.STREAM_BYTES // 3] * 3, "together no more than that"


@pytest.mark.kernels
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the assembly that is read is x86-64's")
def test_loops_that_measure_rates_keep_their_sums_in_registers(tmp_path):
    """Sums in memory would make the machine look half as fast as it is, and engines faster than it."""
    native.need_compiler()
    flags = [flag for flag in library.FLAGS if flag not in ("-shared", "-s")]
    command = [library.compiler(), *flags, "-S", str(library.FOLDER / "limits.c"), "-o", str(tmp_path / "limits.s")]
    subprocess.run(command, check=True, timeout=120)
    text = (tmp_path / "limits.s").read_text()
    for name in ("bytes_avx2", "floats_avx2", "bytes_vnni_256", "bytes_vnni", "floats_avx512"):
        body = text.split(f"\n{name}:\n")[1].split(f".size\t{name}")[0]
        assert "mm" in body and "(%rsp" not in body and "(%rbp" not in body, name
