"""GPU kernels compiled for every target with no GPU: what the machine code says, and the cache they come from."""

from __future__ import annotations

import importlib.metadata
import logging
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from export.errors import ContractError, EnvironmentLacksError
from plugins.gpu import compile
from plugins.gpu.compile import TARGETS, Compiled, Request, compile_kernels
from plugins.gpu.spec import QuantizeSpec
from plugins.gpu.table import kernel
from plugins.gpu.tiles import RowTile, row_tile
from tests.support.machine_code import chosen, count, opcodes

pytest.importorskip("triton", reason="the GPU kernels need triton")
BEFORE = {"quantize": "none", "gelu_quantize": "gelu", "norm_modulate_quantize": "norm_modulate"}
NAMES = {80: "sm_80", 86: "sm_86", 89: "sm_89", 90: "sm_90a", 100: "sm_100a", 120: "sm_120a"}
WIDTH = 1152  # of PixArt-XL/2 and DiT-XL/2


def request(name: str, sm: int, channels: int = WIDTH, fmt: str = "E2M3", dtype: Any = "fp16") -> Request:
    before: Any = BEFORE[name]
    return chosen(kernel(name), QuantizeSpec(fmt, channels, before, dtype), sm)


EVERYWHERE = {(name, sm): request(name, sm) for name in BEFORE for sm in TARGETS}
# On one target: HunyuanDiT's width, the widths before and inside an MLP, an odd one; other formats and input types.
WIDER = {
    ("gelu_quantize", 4608, "E2M3", "fp16"),
    ("gelu_quantize", 4608, "INT8", "bf16"),
    ("norm_modulate_quantize", 1408, "E3M2", "bf16"),
    ("norm_modulate_quantize", 4608, "E4M3", "fp16"),
    ("norm_modulate_quantize", 2304, "INT8", "fp32"),
    ("norm_modulate_quantize", 1151, "E3M4", "fp16"),
    ("quantize", 16384, "E2M3", "fp32"),
}
STATIC = {
    (name, sm, "static"): chosen(kernel(name), QuantizeSpec("E2M3", WIDTH, BEFORE[name], static=True), sm)  # type: ignore[arg-type]
    for name, sm in (("quantize", 80), ("gelu_quantize", 90), ("quantize", 120))
}
ON_HOPPER = {case: request(case[0], 90, *case[1:]) for case in sorted(WIDER)}


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Compiled]:
    """All kernels of this file, from one process and an empty cache."""
    requests = {**EVERYWHERE, **ON_HOPPER, **STATIC}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITC_CACHE", str(tmp_path_factory.mktemp("cache")))
        return dict(zip(requests, compile_kernels(list(requests.values())), strict=True))


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DITC_CACHE", str(tmp_path))
    return tmp_path / "kernels"


# --- the machine code ----------------------------------------------------------------------------------------------


@pytest.mark.kernels
@pytest.mark.parametrize("case", STATIC, ids=str)
def test_a_given_scale_needs_no_pass_over_the_row(built: dict[Any, Compiled], case: Any) -> None:
    """No maximum, no shuffle, no store of a scale: numbers in, codes out."""
    one, least = built[case], built[case[:2]]
    assert one.problems() == [] and count(one, "SHFL", "REDUX", "CREDUX", "BAR") == 0
    assert ("static_scale", "*fp32") in one.arguments and "scales" not in dict(one.arguments)
    assert one.registers <= least.registers + 16, "as many rows in flight as with a scale per token, or nearly"


@pytest.mark.kernels
@pytest.mark.parametrize("case", [*EVERYWHERE, *ON_HOPPER], ids=str)
def test_resources(built: dict[Any, Compiled], case: Any) -> None:
    """Nothing spills, all fits, and enough rows are in flight: 16 warps in the 65536 registers of a multiprocessor."""
    one = built[case]
    assert one.problems() == []
    assert one.name == case[0] and (len(case) == 4 or one.target == NAMES[case[1]])
    assert one.local_bytes == 0 and 0 < one.registers <= 128
    assert one.num_warps == 1 or one.shared_bytes > 0, "several warps meet in shared memory, one needs none"
    assert one.num_warps > 1 or one.shared_bytes == 0


@pytest.mark.kernels
@pytest.mark.parametrize(
    "case", [("norm_modulate_quantize", 90), ("norm_modulate_quantize", 80), ("gelu_quantize", 89)]
)
def test_instructions(built: dict[Any, Compiled], case: tuple[str, int]) -> None:
    """16-byte loads, no barrier, no spill, divisions for the row only, FP8 conversions where the target has them."""
    one, per_thread = built[case], WIDTH // 32
    inputs = 3 if case[0] == "norm_modulate_quantize" else 1
    assert count(one, "LDG.E.128") == inputs * 1024 // 32 // 8, "1024 fp16 of 32 threads, 8 in a load"
    assert count(one, "LDG") - count(one, "LDG.E.128") == inputs, "and the 128 of the tail in one load each"
    assert count(one, "BAR", "LDL", "STL", "LDS", "STS") == 0
    assert count(one, "FCHK") <= 3, "IEEE divisions: scale, reciprocal, deviation"
    assert count(one, "F2FP.SATFINITE.E4M3") == (per_thread // 2 if case[1] >= 89 else 0)
    # The arithmetic that memory must hide: 3 bytes a number at 3.35 TB/s leave an H100 about 26 instructions for each.
    assert sum(opcodes(one).values()) <= (31 if case[1] >= 89 else 35) * per_thread, "slow paths of a division included"


@pytest.mark.kernels
@pytest.mark.parametrize("sm", TARGETS)
def test_arithmetic_is_what_the_interpreter_does(built: dict[Any, Compiled], sm: int) -> None:
    """IEEE division and square root, subnormals kept (bytes of SM80 are made of them), sums in the order written.

    Without a norm or GELU in front every float32 operation is then one that NumPy rounds alike: the codes are equal.
    """
    ptx = built["quantize", sm].ptx
    assert ".ftz" not in ptx and "div.full" not in ptx and "div.approx" not in ptx and "rcp.approx" not in ptx
    assert ptx.count("div.rn.f32") == 2, "of the scale, and its reciprocal"
    # One row's reciprocal; then two for the quotient's parts, one for the remainder, and two around the anchor.
    assert ptx.count("fma.rn.f32") == 1 + 5 * (WIDTH // 32)
    assert ptx.count("cvt.rn.satfinite.e4m3x2.f32") == (WIDTH // 64 if sm >= 89 else 0)
    norm = built["norm_modulate_quantize", sm].ptx
    assert "sqrt.rn.f32" in norm and ".ftz" not in norm and "approx" not in norm


@pytest.mark.kernels
def test_description(built: dict[Any, Compiled]) -> None:
    one = built["norm_modulate_quantize", 90]
    pointers = [("x", "*fp16"), ("shift", "*fp16"), ("scale", "*fp16"), ("codes", "*u8"), ("scales", "*fp32")]
    assert one.arguments == (*pointers[:3], ("M", "i32"), ("tokens", "i32"), *pointers[3:])
    assert ".visible .entry norm_modulate_quantize(" in one.ptx and one.cubin.startswith(b"\x7fELF")
    assert one.ptx.split(".entry")[1].split(")")[0].count(".param") == len(one.arguments) + one.unused_parameters


@pytest.mark.kernels
def test_problems_are_named(built: dict[Any, Compiled]) -> None:
    bad = replace(built["quantize", 86], local_bytes=16, registers=256, shared_bytes=100 * 1024)
    assert bad.problems() == [
        "quantize on sm_86: 16 bytes of local memory a thread: registers spill",
        "quantize on sm_86: 256 registers",
        "quantize on sm_86: 102400 bytes of shared memory; sm_86 has 101376",
    ]


@pytest.mark.kernels
def test_a_spill_is_seen(empty: Path) -> None:
    """8192 numbers held by one warp: 256 registers a thread, one more than there are, for the numbers alone."""
    spec = QuantizeSpec("E2M3", 8192, input="fp32")
    (one,) = compile_kernels([chosen(kernel("quantize"), spec, 90, RowTile(8192, 0, 1))])
    assert one.local_bytes > 0 and count(one, "LDL", "STL") > 0
    assert any("registers spill" in text for text in one.problems())


@pytest.mark.parametrize(
    ("channels", "rows", "warps"),
    [
        *[(1, 4096, 1), (1152, 4096, 1), (1536, 4096, 1), (1537, 4096, 2), (4608, 4096, 4), (16384, 4096, 16)],
        *[(1152, 2048, 2), (1152, 512, 4), (1152, 1, 4), (256, 1, 1), (4608, 256, 16), (4608, 1, 16)],
    ],
)
def test_warps_of_a_row(channels: int, rows: int, warps: int) -> None:
    """As few as hold it; more where the rows are too few to keep a GPU busy, but 8 numbers a thread at the least."""
    tile = row_tile(QuantizeSpec("E2M3", channels), rows, 90)
    assert tile.num_warps == warps and channels <= tile.block + tile.tail < max(2, 1.5 * channels)


# --- the cache -----------------------------------------------------------------------------------------------------


def test_key_names_everything_the_code_follows_from(monkeypatch: pytest.MonkeyPatch) -> None:
    base = request("quantize", 90)
    variants = [
        base,
        replace(base, sm=89),
        replace(base, tile=RowTile(1024, 128, 2)),
        replace(base, spec=QuantizeSpec("E3M2", WIDTH)),
        replace(base, spec=QuantizeSpec("E2M3", WIDTH, input="fp32")),
        request("gelu_quantize", 90),
    ]
    keys = {compile._key(one) for one in variants}
    assert len(keys) == len(variants) and compile._key(chosen(base.kernel, base.spec, 90, rows=8192)) in keys
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "99.0")
    assert compile._key(base) not in keys


def test_source_reaches_helpers_of_helpers() -> None:
    source = "".join(compile.source_of(kernel("norm_modulate_quantize").function()))
    for name in ("norm_modulate_quantize", "_quantize_row", "_bytes", "reciprocal_parts", "grid_to_byte"):
        assert f"def {name}(" in source, name
    assert "def gelu_quantize(" not in source and "def _gelu(" not in source


def test_key_follows_the_source_of_a_helper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line more in a function that the kernel's functions call is another kernel."""
    from plugins.gpu import quantize

    before = compile._key(request("quantize", 90))
    helper, read = quantize.reciprocal_parts.fn, compile.inspect.getsource
    text = read(helper) + "    # another line\n"
    monkeypatch.setattr(compile.inspect, "getsource", lambda function: text if function is helper else read(function))
    assert compile._key(request("quantize", 90)) != before


@pytest.mark.kernels
def test_second_time_from_the_cache(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compile_kernels([request("quantize", 80)])
    assert [path.name for path in empty.iterdir()] == [compile._key(request("quantize", 80))]
    monkeypatch.setattr(compile, "_compile", lambda _: pytest.fail("compiled again"))
    monkeypatch.setattr(compile, "_compile_in_another_process", lambda _: pytest.fail("compiled again"))
    assert compile_kernels([request("quantize", 80)]) == first


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:200] + b"?" + b[201:], lambda b: b"\xff"]
)
def test_damaged_entries_are_removed(empty: Path, damage: Any, caplog: pytest.LogCaptureFixture) -> None:
    compile.write_entry("k", {"numbers": list(range(100))})
    path = empty / "k"
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert compile.read_entry("k") is None
    assert not path.exists() and "is damaged; it is removed and made again" in caplog.text
    assert compile.read_entry("k") is None, "and it is as if it had never been there"


def test_a_failed_write_leaves_nothing(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        compile.write_entry("k", 1)
    assert list(empty.iterdir()) == []


def _write_often(value: int) -> None:
    for _ in range(50):
        compile.write_entry("k", [value] * 10_000)


@pytest.mark.process
def test_several_processes(empty: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two writers of one entry, one reader: every value read is whole."""
    spawn = multiprocessing.get_context("fork")
    writers = [spawn.Process(target=_write_often, args=(value,)) for value in (1, 2)]
    for writer in writers:
        writer.start()
    seen = []
    while any(writer.is_alive() for writer in writers) or not seen:
        entry = compile.read_entry("k")
        seen += [] if entry is None else [entry]
    assert all(writer.exitcode == 0 for writer in writers) and not caplog.records
    assert all(len(value) == 10_000 and len(set(value)) == 1 for value in seen)
    assert [path.name for path in empty.iterdir()] == ["k"]


# --- what is missing -----------------------------------------------------------------------------------------------


def test_nothing_is_missing_here() -> None:
    assert compile.problems() == []


@pytest.mark.kernels
def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(_: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(EnvironmentLacksError, match=r"triton is not installed; run: pip install 'ditc\[cuda\]'"):
        compile_kernels([request("quantize", 90)])


def test_old_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "3.5.1")
    assert compile.problems() == ["triton 3.5.1 is too old; run: pip install 'triton>=3.6'"]


def test_missing_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "tool", lambda name: Path("/nowhere") / name)
    texts = compile.problems()
    assert len(texts) == 2 and texts[0].startswith("/nowhere/ptxas of triton") and "reinstall triton" in texts[0]
    with pytest.raises(EnvironmentLacksError, match=r"/nowhere/cuobjdump does not run .*; reinstall triton"):
        compile.cuobjdump(b"", "-sass")


def test_bytes_that_are_no_machine_code() -> None:
    with pytest.raises(RuntimeError, match="cuobjdump -sass failed"):
        compile.cuobjdump(b"no machine code", "-sass")


def test_unknown_target() -> None:
    with pytest.raises(ContractError, match=r"sm 75 is no target of the GPU kernels; use one of \(80, 86, 89, 90"):
        request("quantize", 75)
