"""The ONNX that TensorRT-RTX's builder got, in the folder of its engine: which it is, when it is kept, what it is good
for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from pipeline.backends.base import DATA, MODEL, BuildResult, LoweredGraph
from pipeline.backends.fused.ops import DOMAIN
from pipeline.backends.rtx import RtxBackend, RtxOptions
from pipeline.backends.tensorrt.build import build_engine
from pipeline.backends.tensorrt.engine import ENGINE, RTX
from pipeline.backends.tensorrt.kept_graph import kept_names
from pipeline.backends.tensorrt.plan_file import EngineFile, read_engine_file
from pipeline.bundle.contents import is_made_by_build
from pipeline.recipe import Recipe
from plugins.tensorrt.payload import FIELD
from tests.support.rtx_models import block

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
pytestmark = pytest.mark.rtx
RECIPE = Recipe("t", "zoo:pixart_mini")
PATHS = ("tensorrt", "plugin")


def recipe(path: str, keep_onnx: str = "auto") -> Recipe:
    return RECIPE.with_options(RtxOptions(sm=(89,), path=path, keep_onnx=keep_onnx))  # type: ignore[arg-type]


def built(folder: Path, chosen: Recipe) -> tuple[LoweredGraph, BuildResult]:
    """A block's lowered graph in work/, its engine in rtx/."""
    portable = folder / "portable.onnx"
    onnx.save(block(128, group_size=64), portable, save_as_external_data=True, location="portable.onnx.data")
    for name in ("work", "rtx"):
        (folder / name).mkdir()
    lowered = RtxBackend().lower(portable, folder / "work", chosen)
    return lowered, RtxBackend().build(lowered, folder / "rtx", chosen)


@pytest.fixture(scope="module", params=PATHS)
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, LoweredGraph]:
    """Path, engine's folder, lowered graph. To be copied, not changed."""
    if request.param == "plugin":
        pytest.importorskip("triton", reason="triton is not installed")
    root = tmp_path_factory.mktemp(request.param)
    lowered, result = built(root, recipe(request.param))
    assert {f"rtx/{name}" for name in (MODEL, DATA)} < set(result.files)
    return request.param, root / "rtx", lowered


def test_it_builds_the_same_engine(kept: tuple[str, Path, LoweredGraph], tmp_path: Path) -> None:
    """To the byte; with plugins, which the process that built the first finds again, in everything that the plan says
    but the names of tensors in between: they have a number that the builder chooses."""
    path, folder, _ = kept
    build_engine(RTX, folder / MODEL, tmp_path / ENGINE, (89,), RECIPE.sampling.batch_size)
    if path == "tensorrt":
        assert (tmp_path / ENGINE).read_bytes() == (folder / ENGINE).read_bytes()
    again, first = (read_engine_file(place / ENGINE) for place in (tmp_path, folder))
    assert len(first.steps) > 10 and stated(again) == stated(first)
    assert again.bounds == first.bounds and again.constant_bytes == first.constant_bytes


def stated(engine: EngineFile) -> list[tuple[object, ...]]:
    return [(step.kind, step.name, step.layers, sorted(step.input_types)) for step in engine.steps]


def test_it_is_the_graph_that_the_builder_got(kept: tuple[str, Path, LoweredGraph]) -> None:
    path, folder, lowered = kept
    model = onnx.load(folder / MODEL, load_external_data=False)
    own = [node for node in model.graph.node if node.domain == DOMAIN]
    if path == "tensorrt":
        assert (folder / MODEL).read_bytes() == lowered.path.read_bytes() and not own
    else:
        assert own and all(FIELD in {attribute.name for attribute in node.attribute} for node in own)
    assert RtxBackend().kept_problem(folder, lowered, recipe(path)) is None


def renamed(model: onnx.ModelProto) -> None:
    model.graph.node[0].name = "other"


def rewired(model: onnx.ModelProto) -> None:
    """The last op reads what the first gives."""
    model.graph.node[-1].input[0] = model.graph.node[0].output[0]


@pytest.mark.parametrize("change", [renamed, rewired])
def test_another_graph_is_found(
    change: Callable[[onnx.ModelProto], None], kept: tuple[str, Path, LoweredGraph], tmp_path: Path
) -> None:
    path, folder, lowered = kept
    model = onnx.load(folder / MODEL, load_external_data=False)
    change(model)
    (tmp_path / MODEL).write_bytes(model.SerializeToString())
    (tmp_path / DATA).write_bytes((folder / DATA).read_bytes())
    problem = RtxBackend().kept_problem(tmp_path, lowered, recipe(path))
    assert problem is not None and str(tmp_path / MODEL) in problem


def test_other_weights_and_a_half_are_found(kept: tuple[str, Path, LoweredGraph], tmp_path: Path) -> None:
    path, folder, lowered = kept
    (tmp_path / MODEL).write_bytes((folder / MODEL).read_bytes())
    problem = RtxBackend().kept_problem(tmp_path, lowered, recipe(path))
    assert problem is not None and "without its other half" in problem
    data = bytearray((folder / DATA).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / DATA).write_bytes(data)
    problem = RtxBackend().kept_problem(tmp_path, lowered, recipe(path))
    assert problem is not None and str(tmp_path / DATA) in problem


def test_nothing_is_kept_where_that_is_asked_for(tmp_path: Path) -> None:
    lowered, result = built(tmp_path, recipe("tensorrt", "no"))
    assert not kept_names(tmp_path / "rtx") and not {f"rtx/{name}" for name in (MODEL, DATA)} & set(result.files)
    assert RtxBackend().kept_problem(tmp_path / "rtx", lowered, recipe("tensorrt", "no")) is None


def test_a_bundle_may_have_it_and_no_engine_is_loaded_from_it() -> None:
    backend, names = RtxBackend(), {f"rtx/{name}" for name in (MODEL, DATA)}
    assert all(is_made_by_build(name, ("rtx",)) and not is_made_by_build(name, ("cpu",)) for name in names)
    assert backend.files - backend.loaded_files == names and f"rtx/{ENGINE}" in backend.loaded_files
