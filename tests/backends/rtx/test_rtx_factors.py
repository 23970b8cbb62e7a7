"""A factor of a thousandth on attention in FP16, planted in the graph of target `rtx` alone, is seen and named.

One such number is as far off as the rounding of FP16 leaves it; all of them together are not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from export.models import load as models
from export.models.load import LoadedModel
from export.to_onnx import export_portable
from pipeline import recipe as recipes
from pipeline.backends import BACKENDS
from pipeline.backends.base import LoweredGraph
from pipeline.backends.rtx import RtxOptions
from pipeline.verify.probe import ProbedGraph
from pipeline.verify.report import SegmentResult
from pipeline.verify.segments import SegmentCheck, SegmentReference
from tests.support import tiny
from tests.support.graph_edit import GraphEdit, Step

pytestmark = pytest.mark.torch

FAMILIES = ("pixart", "hunyuan", "dit")


@pytest.fixture(scope="module", params=FAMILIES)
def lowered(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, LoweredGraph]:
    folder = tmp_path_factory.mktemp(request.param)
    model = models.load(str(tiny.folder(request.param, folder)))
    layers = tiny.quantized(model, granularity="exact_group")
    export_portable(model, layers, folder / "model.onnx")
    recipe = recipes.from_dict({"name": "tiny", "model": model.source}, "test")
    assert recipe.options(RtxOptions).attention == "fp16"
    (folder / "rtx").mkdir()
    return model, BACKENDS["rtx"].lower(folder / "model.onnx", folder / "rtx", recipe)


def _stretches(model: LoadedModel, graph: LoweredGraph) -> dict[str, SegmentResult]:
    """Every stretch of the graph in a call of three samples, by the layer that it ends at."""
    inputs = models.sample_inputs(model, 3, 0)
    reference, probed = SegmentReference(model, inputs["hidden_states"].shape[2:]), ProbedGraph(graph)
    with SegmentCheck("rtx", reference, {"a call": inputs}, "fp16") as comparison:
        for layer, probes in probed.probes(reference.order(inputs), [inputs]):
            comparison.at(layer, probes)
        comparison.end([probed.cut(["sample"], {})(inputs)])
    return {row.layer: row for row in comparison.results}


def _planted(graph: LoweredGraph, plant: Callable[[GraphEdit], None]) -> LoweredGraph:
    edit = GraphEdit(graph.path)
    plant(edit)
    return replace(graph, path=edit.save())


def _grown_attention(edit: GraphEdit) -> None:
    """The mixed values of the last attention times 1.001, in FP16."""
    softmax = edit.nodes("Softmax")[-1]
    tensor = softmax.output[0]
    while edit.readers(tensor)[0].op_type != "MatMul":
        tensor = edit.readers(tensor)[0].output[0]
    edit.route(edit.readers(tensor)[0].output[0], Step("Mul", (np.float16(1.001),)))


def test_a_thousandth_on_attention_in_fp16_is_named(lowered: tuple[LoadedModel, LoweredGraph]) -> None:
    model, graph = lowered
    right, wrong = _stretches(model, graph), _stretches(model, _planted(graph, _grown_attention))
    assert max(row.error for row in right.values()) < 0.6
    failed = [row for row in wrong.values() if row.error > 1]
    assert [row.layer.rpartition(".to_out")[1] for row in failed] == [".to_out"]
    assert failed[0].diagnosis is not None and "all numbers times 1.001 and rounded" in failed[0].diagnosis
