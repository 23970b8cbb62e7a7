"""Every planted fault is caught by the gate that is meant to catch it, on every target; the clean graph passes all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from tests.support.faults import INSIDE_LINEARS, LOWERED_FAULTS, PORTABLE_FAULTS, Fault, Graph, LoweredFault, edited

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


@pytest.fixture(scope="module", params=TARGETS)
def clean(request: Any, bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, LoweredGraph]:
    """A target and its graph without any fault; all gates pass on it."""
    graph = bench.lower(request.param, bench.portable, tmp_path_factory.mktemp("clean") / request.param)
    assert bench.failures(request.param, graph) == set()
    return request.param, graph


@pytest.mark.parametrize("fault", PORTABLE_FAULTS, ids=lambda fault: fault.name)
def test_fault_in_the_portable_graph(fault: Fault, clean: Any, bench: Bench, tmp_path: Path) -> None:
    target, _ = clean
    graph = Graph(bench.portable)
    fault.plant(graph)
    graph.save(tmp_path / "model.onnx")
    if target in fault.refused_by:
        with pytest.raises(ContractError, match="cannot be lowered"):
            bench.lower(target, tmp_path / "model.onnx", tmp_path / target)
        return
    lowered = bench.lower(target, tmp_path / "model.onnx", tmp_path / target)
    assert f"{target}/{fault.gate}" in bench.failures(target, lowered)


@pytest.mark.parametrize("fault", LOWERED_FAULTS, ids=lambda fault: fault.name)
def test_fault_in_a_lowered_graph(fault: LoweredFault, clean: Any, bench: Bench, tmp_path: Path) -> None:
    target, graph = clean
    if target not in fault.targets:
        pytest.skip(f"{target} has nothing of the kind")
    assert f"{target}/{fault.gate}" in bench.failures(target, edited(graph, fault, tmp_path))


def test_truncated_external_data(clean: Any, bench: Bench, tmp_path: Path) -> None:
    target, graph = clean
    copy = Graph(graph.path)
    copy.save(tmp_path / "model.onnx")
    data = tmp_path / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(ContractError, match=r"model\.onnx\.data has \d+ bytes, but .* ends at byte"):
        bench.failures(target, LoweredGraph(tmp_path / "model.onnx", graph.probes, graph.choices))


def test_missing_external_data(clean: Any, bench: Bench, tmp_path: Path) -> None:
    target, graph = clean
    Graph(graph.path).save(tmp_path / "model.onnx")
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(ContractError, match="is missing"):
        bench.failures(target, LoweredGraph(tmp_path / "model.onnx", graph.probes, graph.choices))
