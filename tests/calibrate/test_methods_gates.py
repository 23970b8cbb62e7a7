"""Every calibration method through a build's gates: calibrated, exported, lowered for the CPU, verified; and so is the
portable model, which is a target itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from export import to_onnx
from export.models import load as models
from pipeline import recipe as recipes
from pipeline.backends import BACKENDS
from pipeline.backends.base import Engine, LoweredGraph
from pipeline.calibrate import calibrate
from pipeline.generate import case as picture_case
from pipeline.methods import COMPUTED, METHODS
from pipeline.recipe import Recipe
from pipeline.verify.effort import LARGE_INSIDE, Effort
from pipeline.verify.proof import verify_target
from pipeline.verify.report import Report
from pipeline.verify.study import study
from plugins.cpu import library
from tests.support import tiny

pytestmark = [pytest.mark.slow, pytest.mark.torch]

# One block of width 128, in which the groups of 128 that methods ask for exist.
SMALL = tiny.DIT | {"num_layers": 1, "num_attention_heads": 4}
SETTINGS = (
    "sampling.n_steps=2",
    "sampling.guidance_scale=1.0",
    "calibrate.size=1",
    "calibrate.timesteps=2",
    "weights.group_size=64",
)
FEW = {"iterations": 3, "step_iterations": 2, "batch": 2, "rows": 16, "lora_rank": 2}
GROUPS = ("weights.granularity=group",)
# Method and what its recipe sets beside; real scales per group wherever a method has them.
CASES: dict[str, tuple[str, tuple[str, ...]]] = {name: (name, ()) for name in COMPUTED} | {
    "fp4dit, groups": ("fp4dit", GROUPS),
    "qdit, per token": ("qdit", (*GROUPS, "calibrate.options.activations=per_token")),
}
# All their linears are sums of scaled sums, which stock ops add up in floats and the kernel library gives one by one.
# (g4w_p4a's groups are 128, all of K but in one layer; activations by group keep an exact sum for each group.)
WITHOUT_SUM = {"fp4dit, groups", "qdit, per token"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("methods")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.MODELS, "dit", ("DiTTransformer2DModel", SMALL))
        return models.load(str(tiny.folder("dit", folder)))


@pytest.fixture(scope="module", autouse=True)
def one_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Calibration data are made once for all methods, apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def few(method: str) -> list[str]:
    """Settings that keep the method short."""
    return [f"calibrate.options.{name}={value}" for name, value in FEW.items() if name in METHODS[method].options]


@pytest.mark.parametrize("case", CASES)
def test_every_method_passes_the_gates(case: str, model: Any, tmp_path: Path) -> None:
    method, more = CASES[case]
    base = recipes.with_settings(recipes.load("pixart_w4a8"), [*SETTINGS, f"method={method}", *few(method), *more])
    recipe, report = replace(base, model=model.source), Report()
    layers = calibrate(model, recipe, tmp_path / "layers")
    to_onnx.export_portable(model, layers, tmp_path / "model.onnx")
    with mock.patch.object(picture_case, "SMALL_PICTURES", 2):
        studied = study(model, layers, recipe)
    # Both steps and all calls by their outputs; linears and stretches in the last step and in one call, as of a large
    # model: what a method gives a layer is the same in every call.
    effort = Effort((0, 1), studied.probed[-1:], pictures=1, inside=LARGE_INSIDE)
    verify_target("cpu", model, layers, lowered(recipe, "stock", tmp_path), None, studied, report, effort=effort)
    verify_target("onnx", model, layers, *portable(tmp_path), studied, report, effort=effort)
    assert report.failures() == []
    names = {gate.name: gate.why for gate in report.gates}
    assert {"cpu/coverage", "cpu/linear_output", "cpu/codes_equal", "cpu/step_sqnr_db"} <= names.keys()
    assert ("cpu/gemm_exact" not in names) is (case in WITHOUT_SUM)
    assert ("5 of 6 layers" in names.get("cpu/gemm_exact", "")) is (case == "g4w_p4a")
    assert any(f"cpu: gemm_exact compares 0 of {len(layers)}" in note for note in report.notes) is (case in WITHOUT_SUM)
    expected = {"onnx/coverage", "onnx/operands_exact", "onnx/linear_output", "onnx/codes_equal", "onnx/step_sqnr_db"}
    assert expected <= names.keys() and "onnx/gemm_exact" not in names
    assert any(f"onnx: gemm_exact compares 0 of {len(layers)}" in note for note in report.notes)
    if case in WITHOUT_SUM and library.problem() is None:
        by_library = Report()
        graph = lowered(recipe, "fused", tmp_path)
        verify_target("cpu", model, layers, graph, None, studied, by_library, effort=effort)
        assert by_library.failures() == [] and not any("gemm_exact" in note for note in by_library.notes)
        assert "cpu/gemm_exact" in {gate.name for gate in by_library.gates}


def lowered(recipe: Recipe, path: str, folder: Path) -> LoweredGraph:
    """The folder's portable model lowered for the target `cpu`."""
    (folder / path).mkdir()
    recipe = recipes.with_settings(recipe, [f"cpu.path={path}"])
    return BACKENDS["cpu"].lower(folder / "model.onnx", folder / path, recipe)


def portable(folder: Path) -> tuple[LoweredGraph, Engine]:
    """The portable model of a folder as a target: its graph and its engine."""
    backend = BACKENDS["onnx"]
    return backend.lower(folder / "model.onnx", folder / "work", Recipe("test", "none")), backend.load(folder)
