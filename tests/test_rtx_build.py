"""The `rtx` target from a packed graph to an engine file, on a machine without a GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from export.errors import ContractError
from pipeline.backends.base import BuildResult, LoweredGraph
from pipeline.backends.rtx import ENGINE, METADATA, RtxBackend, expected_gemms
from pipeline.backends.rtx_engine_file import check_gemms, read_engine_file
from pipeline.recipe import Recipe, Rtx
from tests.rtx_models import block

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
pytestmark = pytest.mark.rtx
RECIPE = Recipe("t", "zoo:pixart_mini")
WIDTH = 128


def recipe(weights: str = "fp8", sm: tuple[int, ...] = (89, 120)) -> Recipe:
    return replace(RECIPE, rtx=Rtx(weights, sm))


def lowered(folder: Path, chosen: Recipe, model: onnx.ModelProto | None = None) -> LoweredGraph:
    portable = folder / "portable.onnx"
    onnx.save(model or block(WIDTH, group_size=64), portable, save_as_external_data=True, location="portable.onnx.data")
    (folder / "work").mkdir()
    return RtxBackend().lower(portable, folder / "work", chosen)


def built(folder: Path, chosen: Recipe) -> BuildResult:
    (folder / "rtx").mkdir()
    return RtxBackend().build(lowered(folder, chosen), folder / "rtx", chosen)


def test_one_engine_for_two_gpus_with_fp8_gemms(tmp_path: Path) -> None:
    result = built(tmp_path, recipe())
    metadata = json.loads((tmp_path / "rtx" / METADATA).read_text())
    assert metadata["compute_capabilities"] == [89, 120]
    assert metadata["gemms"]["fp8_e4m3 x fp8_e4m3"] == 6
    assert metadata["paths"] == {"fp8": 6}
    assert sorted(result.files) == ["rtx/lowering.json", "rtx/metadata.json", "rtx/model.engine"]
