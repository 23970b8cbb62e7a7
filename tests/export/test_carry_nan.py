"""Models with static activation scales give NaN for a sample with NaN in its inputs, as PyTorch does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from export.carry_nan import carry_nan
from export.checkpoint import QuantizedLinear
from export.models import load as models
from export.models.load import LoadedModel, sample_inputs
from export.to_onnx import export_portable
from pipeline import recipe as recipes
from pipeline.backends import BACKENDS
from pipeline.backends.base import Arrays
from pipeline.backends.reference import ReferenceEngine, fake_quant
from pipeline.verify.probe import ProbedGraph
from tests.support import learned, tiny

pytestmark = pytest.mark.torch

TARGETS = ("onnx", "cpu", "cpu fused", "rtx", "cuda")
SETTINGS = {"cpu fused": ["cpu.path=fused"], "cuda": ["cuda.activations=fp32"]}


@dataclass(frozen=True)
class Case:
    """A model with static scales, its portable form, and calls with NaN in the first of three samples.

    calls: by the input that is spoilt; lost: which numbers of the reference's answer are NaN then.
    """

    model: LoadedModel
    portable: Path
    inputs: Arrays
    calls: dict[str, Arrays]
    lost: dict[str, Any]


@pytest.fixture(scope="module", params=("pixart", "hunyuan"))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    model = models.load(str(tiny.folder(request.param, folder)))
    layers = [_static(layer) for layer in tiny.quantized(model)]
    export_portable(model, layers, folder / "model.onnx")
    inputs = sample_inputs(model, 3, 0)
    floats = [row.name for row in model.inputs if row.dtype == "float32"]
    calls = {name: _spoilt(inputs, name) for name in floats}
    exact = ReferenceEngine(fake_quant(model, layers, torch.float64), torch.float64)
    lost = {name: np.isnan(exact.run(call)["sample"]) for name, call in calls.items()}
    return Case(model, folder / "model.onnx", inputs, calls, lost)


def _static(layer: QuantizedLinear) -> QuantizedLinear:
    """All but one kind, so that the cpu's own op has something to fuse."""
    return layer if layer.name.endswith("net.0.proj") else learned.with_scaling(layer, "per_tensor")


def _spoilt(inputs: Arrays, name: str) -> Arrays:
    """NaN in the last number of the first sample."""
    array = inputs[name].copy()
    array.reshape(len(array), -1)[0, -1] = np.nan
    return inputs | {name: array}


@pytest.mark.parametrize("target", TARGETS)
def test_nan_in_an_input_of_a_sample_is_all_that_sample_gives(case: Case, target: str, tmp_path: Path) -> None:
    """NaN exactly where the reference has it: also not behind a mask that takes no notice of a token."""
    recipe = recipes.from_dict({"name": "t", "model": case.model.source}, "t")
    recipe = recipes.with_settings(recipe, SETTINGS.get(target, []))
    lowered = BACKENDS[target.removesuffix(" fused")].lower(case.portable, tmp_path, recipe)
    run = ProbedGraph(lowered).denoiser()
    plain = run(case.inputs)["sample"]
    assert np.isfinite(plain).all()
    for row in case.model.inputs:
        if row.name in case.calls:
            answer = run(case.calls[row.name])["sample"]
            np.testing.assert_array_equal(np.isnan(answer), case.lost[row.name], row.name)
            if row.batched:
                np.testing.assert_array_equal(answer[1:], plain[1:], row.name)


def test_where_there_is_nan_and_where_not(case: Case) -> None:
    """What the reference forgets is nothing but tokens and numbers that a model does not look at."""
    everywhere = {name for name, lost in case.lost.items() if lost[0].all()}
    nowhere = {name for name, lost in case.lost.items() if not lost.any()}
    assert everywhere | nowhere == set(case.lost) and {"hidden_states", "timestep"} <= everywhere
    if case.model.family.name == "hunyuan":
        assert nowhere == {"encoder_hidden_states", "text_embedding_mask", "text_embedding_mask_t5"}


GRAPHS = {
    "an input called rows": ("a (float[B,2] rows) => (float[B,2] out) { out = Relu(rows) }", "rows"),
    "an input called sample": ("a (float[B,2] sample) => (float[B,2] out) { out = Relu(sample) }", "sample"),
    "a selection called sample": (
        "a (float[B,2] x, bool[B,2] m) => (float[B,2] sample) { h = Relu(x)  z = Neg(x)  sample = Where(m, h, z) }", "x"
    ),
}  # fmt: skip


@pytest.mark.fast
@pytest.mark.parametrize("name", GRAPHS)
def test_names_of_a_model_meet_none_of_ours(name: str) -> None:
    text, place = GRAPHS[name]
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]> {text}')
    carry_nan(model.graph, [place])
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    fed = {place: np.array([[np.nan, 1], [2, 3]], np.float32), "m": np.ones((2, 2), bool)}
    (out,) = session.run(None, {value.name: fed[value.name] for value in session.get_inputs()})
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()
