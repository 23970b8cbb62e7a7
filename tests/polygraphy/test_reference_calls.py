"""The calls that Polygraphy gets and their limits: right graphs are within them, wrong ones beyond."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from export.checkpoint import QuantizedLinear
from export.models.load import LoadedModel, load
from export.to_onnx import export_portable
from pipeline import recipe as recipes
from pipeline.backends import BACKENDS, PORTABLE
from pipeline.backends.base import LoweredGraph
from pipeline.distance import sqnr_db
from pipeline.polygraphy.layer_table import LayerRow, layer_table
from pipeline.polygraphy.reference_calls import ReferenceCalls, reference_calls
from pipeline.recipe import Recipe
from pipeline.verify.gates import ROUNDED_DB
from pipeline.verify.probe import ProbedGraph
from tests.support import learned, tiny, tiny_text, tiny_vae

Layers = list[QuantizedLinear]
# A model's folder, its quantized layers, and which half of an autoencoder it is.
MODELS: dict[str, tuple[Callable[[Path], Path], Callable[[Layers], Layers], str | None]] = {
    "pixart": (lambda parent: tiny.folder("pixart", parent), list, None),
    "pixart, learned": (lambda parent: tiny.folder("pixart", parent), learned.mixed, None),
    "dit": (lambda parent: tiny.folder("dit", parent), list, None),
    "hunyuan": (lambda parent: tiny.folder("hunyuan", parent), list, None),
    "t5": (tiny_text.t5_folder, list, None),
    "clip": (tiny_text.clip_folder, list, None),
    "decoder": (tiny_vae.vae_folder, list, "decoder"),
}


@dataclass(frozen=True)
class Subject:
    model: LoadedModel
    layers: Layers
    recipe: Recipe
    calls: ReferenceCalls

    def lowered(self, folder: Path, layers: Layers) -> LoweredGraph:
        folder.mkdir()
        export_portable(self.model, layers, folder / "model.onnx")
        return BACKENDS[PORTABLE].lower(folder / "model.onnx", folder, self.recipe)

    def table(self, graph: LoweredGraph) -> list[LayerRow]:
        return layer_table(self.layers, {PORTABLE: graph}, {PORTABLE: "fp32"}, self.calls, 1)


@pytest.fixture(scope="module", params=MODELS)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    make, learn, half = MODELS[request.param]
    path = str(make(tmp_path_factory.mktemp("model")))
    model = load(path, half=half) if half else load(path)
    document: dict[str, object] = {"name": "tiny", "model": path, "sampling": {"n_steps": 3}}
    recipe = recipes.from_dict(document | ({"half": half} if half else {}), "test")
    layers = [] if half else learn(tiny.quantized(model))
    return Subject(model, layers, recipe, reference_calls(model, layers, recipe, {"fp32"}))


pytestmark = pytest.mark.torch


def test_calls_have_one_sample_and_several_and_every_output(subject: Subject) -> None:
    calls, streamed = subject.calls, subject.model.family.streamed
    sizes = [len(inputs[streamed]) for inputs in calls.inputs]
    assert sizes[0] == 1 and sizes[1] > 1
    for inputs, outputs in zip(calls.inputs, calls.outputs, strict=True):
        assert tuple(outputs) == subject.model.family.outputs
        for output in outputs.values():
            assert output.dtype == np.float32 and len(output) == len(inputs[streamed]) and np.isfinite(output).all()
    if counted := subject.model.family.counted:
        assert all(inputs[counted].all() for inputs in calls.inputs), "rows of padding are nobody's"


def test_the_portable_model_is_within_its_limits(subject: Subject, tmp_path: Path) -> None:
    graph = subject.lowered(tmp_path / "right", subject.layers)
    limits, run = subject.calls.limits["fp32"], ProbedGraph(graph, 1).denoiser()
    assert set(limits.outputs) == set(subject.model.family.outputs) and max(limits.outputs.values()) <= ROUNDED_DB
    for inputs, expected in zip(subject.calls.inputs, subject.calls.outputs, strict=True):
        for name, output in run(inputs).items():
            assert sqnr_db(expected[name], output) >= limits.outputs[name]
    assert set(limits.layers) == {layer.name for layer in subject.layers}
    assert all(row.margin_db >= 0 for row in subject.table(graph))


def test_a_linear_with_other_weights_is_the_first_of_the_table(subject: Subject, tmp_path: Path) -> None:
    """Those before it are within their limits still, in whatever order the table has them."""
    if not subject.layers:
        pytest.skip("an autoencoder has no quantized linear")
    place = len(subject.layers) // 2
    wrong = replace(subject.layers[place], codes=subject.layers[place].codes ^ 0x22)
    layers = [*subject.layers[:place], wrong, *subject.layers[place + 1 :]]
    rows = subject.table(subject.lowered(tmp_path / "wrong", layers))
    margins = [row.margin_db for row in rows]
    assert margins == sorted(margins) and margins[0] < 0
    order = list(subject.calls.layers)
    beyond = {row.name for row in rows if row.margin_db < 0}
    assert min(beyond, key=order.index) == wrong.name
