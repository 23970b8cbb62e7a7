"""GEMM kernels as the heuristics choose them for the models' shapes, and sums in splits, compiled with no GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.shapes import gemm_shapes
from plugins.gpu import tiles
from plugins.gpu.compile import Compiled, Request, compile_kernels
from plugins.gpu.spec import GemmSpec
from plugins.gpu.table import kernel
from plugins.gpu.tile_table import Tile
from tests.support.machine_code import chosen

pytestmark = [pytest.mark.slow, pytest.mark.kernels]

pytest.importorskip("triton", reason="the GPU kernels need triton")
# Recipe pixart_w4a6 on the operands that `auto` takes; on Hopper also on the others, for its largest tile.
SPEC = GemmSpec("E2M3", "E2M1", 1152, 1152, 64, (1, 2, 3, 4, 5, 6, 8, 10))
CHOSEN = ((89, True), (90, False), (90, True))
# One target of each kind of tensor core instruction.
SPLIT_ON = (89, 90, 100)
FEW = 16  # tokens: a row of tiles that does not fill a GPU
REGISTERS = 65536  # of a multiprocessor


def most_registers(request: Request) -> int:
    """Of a thread, so that a multiprocessor holds the programs that it should: of four warps three, so that while one
    waits for its first loads two multiply, a warp for each scheduler; two where weights are decoded to INT8 images,
    which takes the registers of the third. A program of eight warps has two for each scheduler by itself.
    """
    decodes = request.kernel.name == "packed_gemm" and request.spec.multiplies_integers
    programs = 1 if request.tile.num_warps == 8 else 2 if decodes else 3
    return REGISTERS // (32 * request.tile.num_warps * programs)


def choices(sm: int, integers: bool) -> dict[Any, Request]:
    """The tiles chosen for the models' shapes, each with the first shape that takes it, without splits."""
    requests: dict[Any, Request] = {}
    for shape in gemm_shapes():
        spec = replace(SPEC, in_features=shape.k, out_features=shape.n, integers=integers)
        first = tiles.expands_first(spec, shape.m, sm)
        name = tiles.EXPANDED if first else tiles.PACKED
        tile = replace(tiles.gemm_tile(name, spec, shape.m, sm, may_split=True), splits=1)
        case = (name, sm, "int8" if integers else "fp8", f"{tile.m}x{tile.n}x{tile.k}")
        requests.setdefault(case, chosen(kernel(name), spec, sm, tile))
    return requests


def in_splits(sm: int) -> dict[Any, Request]:
    """A GEMM of few tokens as it is split there, with float32 for the y that it is given at launch, and the sum of its
    splits with every argument."""
    spec = GemmSpec("E2M3", "E2M1", 4608, 1152, epilogue="gate_residual", output="bf16", zero_point=True)
    tile = tiles.gemm_tile(tiles.PACKED, spec, FEW, sm, may_split=True)
    return {
        ("packed_gemm", sm, "split"): chosen(kernel("packed_gemm"), replace(spec, output="fp32"), sm, tile),
        ("reduce_splits", sm, "split"): chosen(kernel("reduce_splits"), spec, sm, rows=FEW),
    }


TILES: dict[Any, Request] = {case: one for sm, integers in CHOSEN for case, one in choices(sm, integers).items()}
SPLIT: dict[Any, Request] = {case: one for sm in SPLIT_ON for case, one in in_splits(sm).items()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Compiled]:
    """All kernels of this file, from one process and an empty cache."""
    requests = {**TILES, **SPLIT}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITC_CACHE", str(tmp_path_factory.mktemp("cache")))
        return dict(zip(requests, compile_kernels(list(requests.values())), strict=True))


@pytest.mark.parametrize("case", [*TILES, *SPLIT], ids=str)
def test_nothing_spills_and_registers_leave_room(built: dict[Any, Compiled], case: Any) -> None:
    assert built[case].problems() == []
    assert built[case].registers <= most_registers({**TILES, **SPLIT}[case])


def test_the_models_shapes_reach_hoppers_largest_tile() -> None:
    assert ("expanded_gemm", 90, "int8", "128x256x128") in TILES


def test_the_newest_take_the_tiles_of_ada() -> None:
    """So that compiling those says what they need."""
    ada, newest = ({(name, tile) for name, _, _, tile in choices(sm, integers=True)} for sm in (89, 120))
    assert newest == ada


@pytest.mark.parametrize("sm", SPLIT_ON)
def test_splits_write_their_sums_and_nothing_else(built: dict[Any, Compiled], sm: int) -> None:
    """Float32 parts, no rounding to the output type, which reduce_splits does: to the nearest, never cut."""
    parts, whole = built["packed_gemm", sm, "split"], built["reduce_splits", sm, "split"]
    tile = SPLIT["packed_gemm", sm, "split"].tile
    assert isinstance(tile, Tile) and tile.splits > 1 and SPLIT["reduce_splits", sm, "split"].tile.splits > 1
    assert "cvt.rn.bf16" not in parts.ptx and "cvt.rn.bf16" in whole.ptx
    assert "cvt.rz.bf16" not in whole.ptx
    assert dict(whole.arguments)["parts"] == "*fp32" and dict(whole.arguments)["y"] == "*bf16"
