"""The `rtx` target from a packed graph to an engine file, on a machine without a GPU."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.errors import ContractError
from pipeline.backends import lowering_file
from pipeline.backends.base import DATA, MODEL, BuildResult, LoweredGraph
from pipeline.backends.metadata_file import NAME as METADATA
from pipeline.backends.rtx import RtxBackend, RtxOptions
from pipeline.backends.rtx.build import ENGINE, expected_gemms, sm_problems
from pipeline.backends.tensorrt.build import build_engine, shape_bounds
from pipeline.backends.tensorrt.plan_file import check_gemms, read_engine_file
from pipeline.recipe import Recipe
from tests.support.rtx_models import Linear, block, single

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
pytestmark = pytest.mark.rtx
RECIPE = Recipe("t", "zoo:pixart_mini")
WIDTH = 128


def recipe(weights: str = "fp8", sm: tuple[int, ...] = (89, 120)) -> Recipe:
    return RECIPE.with_options(RtxOptions(weights, sm))


def lowered(folder: Path, chosen: Recipe, model: onnx.ModelProto | None = None) -> LoweredGraph:
    portable = folder / "portable.onnx"
    onnx.save(model or block(WIDTH, group_size=64), portable, save_as_external_data=True, location="portable.onnx.data")
    (folder / "work").mkdir()
    return RtxBackend().lower(portable, folder / "work", chosen)


def built(folder: Path, chosen: Recipe, model: onnx.ModelProto | None = None) -> BuildResult:
    folder.mkdir(exist_ok=True)
    (folder / "rtx").mkdir()
    return RtxBackend().build(lowered(folder, chosen, model), folder / "rtx", chosen)


@pytest.fixture(scope="module")
def fp8_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8")
    built(folder, recipe())
    return folder / "rtx"


@pytest.mark.fast
def test_one_engine_for_two_gpus_with_fp8_gemms(fp8_folder: Path) -> None:
    metadata = json.loads((fp8_folder / METADATA).read_text())
    assert metadata["compute_capabilities"] == [89, 120]
    assert metadata["gemms"]["fp8_e4m3 x fp8_e4m3"] == 6
    assert metadata["paths"] == {"fp8": 6}
    assert metadata["dimension_bounds"] == [[1, 8], [1, 300]]
    assert metadata["shapes"]["shift"] == [[1, 1, WIDTH], [2, 1, WIDTH], [8, 1, WIDTH]]
    assert sorted(path.name for path in fp8_folder.iterdir()) == [lowering_file.NAME, METADATA, ENGINE, MODEL, DATA]


@pytest.mark.fast
def test_the_file_tells_weights_and_layers_of_each_gemm(fp8_folder: Path) -> None:
    engine = read_engine_file(fp8_folder / ENGINE)
    # q, k, v, out: 128 x 128, up and down 128 x 256; one byte each.
    assert engine.constant_bytes["fp8_e4m3"] == 4 * WIDTH**2 + 2 * 2 * WIDTH**2
    step = engine.step_of("ff.up/matmul")
    assert step is not None and step.is_gemm and step.input_types[:2] == ("fp8_e4m3", "fp8_e4m3")
    assert engine.version.startswith("1.7") and engine.size_bytes == (fp8_folder / ENGINE).stat().st_size


def test_an_engine_for_a_single_gpu(tmp_path: Path) -> None:
    assert built(tmp_path, recipe(sm=(120,))).metadata["compute_capabilities"] == [120]


def test_gpus_without_fp8_get_int8_gemms(tmp_path: Path) -> None:
    metadata = built(tmp_path, recipe(sm=(86, 89))).metadata
    assert metadata["paths"] == {"int8": 6} and metadata["compute_capabilities"] == [86, 89]
    assert metadata["gemms"]["int8 x int8"] >= 1  # q, k and v may be merged into one
    assert not [kind for kind in metadata["gemms"] if "fp8" in kind]


@pytest.mark.parametrize(("sm", "gemm"), [((89, 120), "fp8_e4m3 x fp8_e4m3"), ((86,), "int8 x int8")])
def test_int4_weights_take_half_the_bytes_of_fp8(
    sm: tuple[int, ...], gemm: str, fp8_folder: Path, tmp_path: Path
) -> None:
    metadata = built(tmp_path, recipe("int4", sm)).metadata
    fp8_bytes = json.loads((fp8_folder / METADATA).read_text())["constant_bytes"]["fp8_e4m3"]
    assert metadata["constant_bytes"]["int4"] * 2 == fp8_bytes and gemm in metadata["gemms"]
    # Multipliers: one byte for each group of 64 and channel.
    assert metadata["constant_bytes"]["int8"] * 64 == fp8_bytes


@pytest.mark.parametrize(
    ("activation", "path", "kind"),
    [
        ("E3M4", "fp8, 2 limbs", "fp8_e4m3 x fp8_e4m3"),
        ("E3M2", "fp8", "fp8_e4m3 x fp8_e4m3"),
        ("E4M3", "fp8", "fp8_e4m3 x fp8_e4m3"),
        ("INT6", "int8", "int8 x int8"),
    ],
)
def test_other_activation_formats_build(activation: str, path: str, kind: str, tmp_path: Path) -> None:
    metadata = built(tmp_path, recipe(), single(Linear("layer", 128, 128, activation))).metadata
    assert metadata["paths"] == {path: 1} and kind in metadata["gemms"]


@pytest.mark.parametrize(
    ("weight", "sm", "path", "stored"),
    [
        ("E2M1", 89, "fp16, fp8 weights", {"fp8_e4m3": 128**2, "half": 2 * 2 * 128}),
        ("E2M1", 86, "fp16", {"half": 2 * 128**2}),
        ("INT4", 86, "fp16, int4 weights", {"int4": 128**2 // 2, "half": 2 * 2 * 128}),
        ("E1M2", 120, "fp16, int4 weights", {"int4": 128**2 // 2, "half": 2 * 2 * 128}),
    ],
)
def test_real_group_scales_build_as_a_half_gemm(
    weight: str, sm: int, path: str, stored: dict[str, int], tmp_path: Path
) -> None:
    linear = Linear("layer", 128, 128, weight=weight, group_size=64, real_groups=True)
    metadata = built(tmp_path, recipe(sm=(sm,)), single(linear)).metadata
    assert metadata["paths"] == {path: 1}
    assert {kind: count for kind, count in metadata["constant_bytes"].items() if kind != "float"} == stored


def test_two_builds_give_the_same_bytes(fp8_folder: Path, tmp_path: Path) -> None:
    built(tmp_path, recipe())
    for name in (ENGINE, METADATA, lowering_file.NAME):
        assert (tmp_path / "rtx" / name).read_bytes() == (fp8_folder / name).read_bytes(), name


# --- what must be refused ------------------------------------------------------------------------------------------


def plant_float_weight(path: Path, layer: str) -> None:
    """Give one MatMul a float32 weight, as if its quantization had been lost."""
    model = onnx.load(path)
    node = next(node for node in model.graph.node if node.name == f"{layer}/matmul")
    node.input[1] = "planted"
    planted = np.ones((WIDTH, WIDTH), np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(planted, "planted"))
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)


def test_a_linear_that_is_no_fp8_gemm_is_found_and_named(tmp_path: Path) -> None:
    chosen = recipe(sm=(89,))
    graph = lowered(tmp_path, chosen)
    plant_float_weight(graph.path, "attn.to_k")
    with pytest.raises(
        ContractError, match=r"attn\.to_k/matmul: the engine runs it as .*, not as a fp8_e4m3 x fp8_e4m3"
    ):
        RtxBackend().build(graph, tmp_path, chosen)


@pytest.mark.fast
def test_a_linear_that_the_engine_lacks_is_named(fp8_folder: Path) -> None:
    engine = read_engine_file(fp8_folder / ENGINE)
    check_gemms(engine, {"ff.up/matmul": "fp8_e4m3"})
    with pytest.raises(ContractError, match=r"ff\.gone/matmul: the engine .* has no kernel"):
        check_gemms(engine, {"ff.gone/matmul": "fp8_e4m3"})
    with pytest.raises(ContractError, match="not as a int8 x int8 GEMM"):
        check_gemms(engine, {"ff.up/matmul": "int8"})


@pytest.mark.fast
def test_expected_gemms_cover_every_limb(tmp_path: Path) -> None:
    graph = lowered(tmp_path, recipe(), single(Linear("layer", 128, 128, "E3M4")))
    assert expected_gemms(graph) == {"layer/matmul_high": "fp8_e4m3", "layer/matmul_low": "fp8_e4m3"}


@pytest.mark.fast
@pytest.mark.parametrize("sm", [75, 90, 100, 103, 70])
def test_gpus_that_cannot_be_built_for_are_refused_before_any_work(sm: int) -> None:
    problems = RtxBackend().problems(recipe(sm=(89, sm)))
    assert len(problems) == 1 and f"SM {sm}" in problems[0] and "--target-sm" in problems[0]


@pytest.mark.fast
def test_nothing_is_missing_for_the_default_gpus() -> None:
    assert RtxBackend().problems(RECIPE) == [] and sm_problems((86, 121)) == []


def test_a_missing_package_is_a_problem_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.machine.find_spec", lambda name: None)
    (problem,) = RtxBackend().problems(RECIPE)
    assert "pip install tensorrt-rtx" in problem


@pytest.mark.parametrize("keep", [0, 10, 63, 64, 5000, -1])
def test_truncated_engines_are_refused(keep: int, fp8_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / ENGINE
    path.write_bytes((fp8_folder / ENGINE).read_bytes()[:keep])
    with pytest.raises(ContractError, match=r"no TensorRT-RTX engine|its header says"):
        read_engine_file(path)


@pytest.mark.fast
def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / ENGINE
    path.write_bytes(b"ftrt" + bytes(200))
    with pytest.raises(ContractError, match="starts with b'ftrt'"):
        read_engine_file(path)


def test_an_engine_without_a_plan_is_refused(tmp_path: Path) -> None:
    header = bytearray(128)
    header[:4] = b"vtrt"
    struct.pack_into("<Q", header, 16, len(header))
    (tmp_path / ENGINE).write_bytes(header)
    with pytest.raises(ContractError, match="no readable plan"):
        read_engine_file(tmp_path / ENGINE)


def test_parser_errors_name_the_node(tmp_path: Path) -> None:
    graph = lowered(tmp_path, recipe(), single(Linear("layer", 128, 128)))
    model = onnx.load(graph.path)
    node = next(node for node in model.graph.node if node.name == "layer/channel_scale")
    node.op_type = "StringNormalizer"
    del node.input[1]
    onnx.save(model, graph.path)
    with pytest.raises(ContractError, match=r"node layer/channel_scale \(StringNormalizer\)"):
        build_engine("tensorrt_rtx", graph.path, tmp_path / ENGINE, (89,), 1)


def test_builder_errors_say_for_which_gpu_and_leave_no_file(tmp_path: Path) -> None:
    graph = lowered(tmp_path, recipe(), single(Linear("layer", 128, 128)))
    with pytest.raises(ContractError, match=r"cannot build for SM 86: .*fp8"):
        build_engine("tensorrt_rtx", graph.path, tmp_path / ENGINE, (86,), 1)
    assert not list(tmp_path.glob(f"{ENGINE}*"))


@pytest.mark.fast
def test_usual_batch_is_doubled_for_guidance() -> None:
    bounds = shape_bounds(block(WIDTH), batch_size=5)
    assert bounds["x"] == ((1, 1, WIDTH), (10, 120, WIDTH), (10, 300, WIDTH))
    assert MODEL == "model.onnx"
