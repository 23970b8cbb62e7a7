"""Every planted fault is caught by the gate that is meant to catch it; every target's clean graph passes all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from export.checkpoint import QuantizedLinear
from export.errors import ContractError
from export.models import load as models
from export.models.load import LoadedModel
from export.to_onnx import export_portable
from pipeline import recipe as recipes
from pipeline.backends import BACKENDS
from pipeline.backends.base import LoweredGraph
from pipeline.recipe import Recipe
from pipeline.verify.proof import verify_target
from pipeline.verify.report import Report
from pipeline.verify.study import Study, study
from tests.support import tiny
from tests.support.faults import (
    INSIDE_LINEARS,
    LOWERED_FAULTS,
    PORTABLE_FAULTS,
    Fault,
    Graph,
    LoweredFault,
    edited,
    of_own_lowering,
    of_targets,
)

pytestmark = [pytest.mark.slow, pytest.mark.torch]

TARGETS = ("cpu", "rtx", "cuda")
# Attention in float32 on all targets: FP16 roundings would hide the smallest faults.
SHARP = {"attention": "fp32"}


@dataclass(frozen=True)
class Bench:
    """A tiny PixArt, exported once; the reference's results serve all faults."""

    model: LoadedModel
    layers: list[QuantizedLinear]
    recipe: Recipe
    portable: Path
    found: Study

    def lower(self, target: str, portable: Path, folder: Path) -> LoweredGraph:
        folder.mkdir()
        return BACKENDS[target].lower(portable, folder, self.recipe)

    def failures(self, target: str, graph: LoweredGraph) -> set[str]:
        """Names of the gates that fail."""
        report = Report()
        verify_target(target, self.model, self.layers, graph, None, self.found, report, effort=INSIDE_LINEARS)
        return {gate.name for gate in report.failures()}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("faults")
    model = models.load(str(tiny.folder("pixart", folder)))
    layers = tiny.quantized(model, granularity="exact_group")
    recipe = recipes.from_dict(
        {"name": "tiny", "model": model.source, "sampling": {"n_steps": 3}, "rtx": SHARP}, "test"
    )
    export_portable(model, layers, folder / "model.onnx")
    return Bench(model, layers, recipe, folder / "model.onnx", study(model, layers, recipe))


@pytest.fixture(scope="module")
def clean(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LoweredGraph]:
    """target -> its graph without any fault; all gates pass on it."""

    @cache
    def make(target: str) -> LoweredGraph:
        graph = bench.lower(target, bench.portable, tmp_path_factory.mktemp("clean") / target)
        assert bench.failures(target, graph) == set()
        return graph

    return make


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function is test_fault_in_the_portable_graph:
        pairs = of_targets(PORTABLE_FAULTS, TARGETS, metafunc.config.getoption("--all-faults"))
        metafunc.parametrize(("target", "fault"), pairs, ids=str_of_fault)


def str_of_fault(part: object) -> str:
    return str(getattr(part, "name", part))


def test_fault_in_the_portable_graph(target: str, fault: Fault, bench: Bench, tmp_path: Path) -> None:
    graph = Graph(bench.portable)
    fault.plant(graph)
    graph.save(tmp_path / "model.onnx")
    if target in fault.refused_by:
        with pytest.raises(ContractError, match="cannot be lowered"):
            bench.lower(target, tmp_path / "model.onnx", tmp_path / target)
        return
    lowered = bench.lower(target, tmp_path / "model.onnx", tmp_path / target)
    assert f"{target}/{fault.gate}" in bench.failures(target, lowered)


@pytest.mark.parametrize(("target", "fault"), of_own_lowering(LOWERED_FAULTS, TARGETS), ids=str_of_fault)
def test_fault_in_a_lowered_graph(
    target: str, fault: LoweredFault, clean: Callable[[str], LoweredGraph], bench: Bench, tmp_path: Path
) -> None:
    assert f"{target}/{fault.gate}" in bench.failures(target, edited(clean(target), fault, tmp_path))


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_external_data(damage: str, clean: Callable[[str], LoweredGraph], bench: Bench, tmp_path: Path) -> None:
    graph = clean("cpu")  # read in one place for all targets
    Graph(graph.path).save(tmp_path / "model.onnx")
    data = tmp_path / "model.onnx.data"
    words = {"truncated": r"model\.onnx\.data has \d+ bytes, but .* ends at byte", "missing": "is missing"}
    if damage == "truncated":
        data.write_bytes(data.read_bytes()[:-100])
    else:
        data.unlink()
    with pytest.raises(ContractError, match=words[damage]):
        bench.failures("cpu", LoweredGraph(tmp_path / "model.onnx", graph.probes, graph.choices))
