"""All parity gates on the graphs that engines with plugins are made from, in stock onnxruntime."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.models import load as models
from export.to_onnx import export_portable
from pipeline import recipe as recipes
from pipeline.backends import BACKENDS
from pipeline.verify.proof import verify
from tests.support import tiny

pytestmark = pytest.mark.torch

TARGETS = ("rtx", "trt")


def test_graphs_of_plugins_pass_every_gate(tmp_path: Path) -> None:
    """Real scales per group and a format that no FP8 operand holds: sums of parts, codes as they are."""
    model = models.load(str(tiny.folder("dit", tmp_path)))
    layers = tiny.quantized(model, granularity="group", activation="E3M4")
    chosen = {"name": "tiny", "model": model.source, "sampling": {"n_steps": 2}, "rtx": {"path": "plugin"}}
    recipe = recipes.from_dict(chosen, "test")
    export_portable(model, layers, tmp_path / "model.onnx")
    for target in TARGETS:
        (tmp_path / target).mkdir()
    graphs = {name: BACKENDS[name].lower(tmp_path / "model.onnx", tmp_path / name, recipe) for name in TARGETS}
    report = verify(model, layers, graphs, {}, recipe, tmp_path / "report")
    assert report.failures() == [] and report.passed
    for target, graph in graphs.items():
        assert {choice.path.split(",")[0] for choice in graph.choices} == {"plugin"}
        exact = next(gate for gate in report.gates if gate.name == f"{target}/gemm_exact")
        assert exact.value == exact.limit == 0
    assert len(report.layers) == len(TARGETS) * len(layers)
    assert "engine built, not run; kernels in its plugins are proven by the tests" in report.notes[0]
