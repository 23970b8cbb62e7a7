"""The target `onnx` on a graph of two linears made in code: where they are, and what onnxruntime makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from export.errors import ContractError, RecipeError
from pipeline.backends import BACKENDS
from pipeline.backends.base import DATA, MODEL
from pipeline.backends.portable.engine import PortableEngine
from pipeline.backends.portable.linears import portable_linears
from pipeline.passes.probes import ProbeRow
from pipeline.recipe import Recipe
from tests.support.portable import HEADER, activations, portable, random_linear, run

BACKEND = BACKENDS["onnx"]
RECIPE = Recipe("t", "none")
BODY = 'h = fpq.QuantizedLinear <layer="first"> (x)\ny = fpq.QuantizedLinear <layer="second"> (h)'


@pytest.fixture(scope="module")
def model() -> ir.Model:
    """x [B, S, 64] -> "first" [B, S, 32], in groups -> "second" [B, S, 16], without a bias."""
    layers = [
        random_linear("first", n=32, granularity="exact_group", group=32),
        random_linear("second", k=32, activation="INT8", bias=False),
    ]
    return portable(BODY, layers, inner="float[B,S,32] h")


@pytest.fixture
def folder(model: ir.Model, tmp_path: Path) -> Path:
    ir.save(model.clone(), tmp_path / MODEL, external_data=DATA)
    return tmp_path


def test_linears_are_read_from_the_graph_as_it_is_wired(model: ir.Model) -> None:
    first, second = portable_linears(model)
    assert (first.layer, second.layer) == ("first", "second")
    assert first.output.producer() is not first.matmul and second.output.producer() is second.matmul
    assert "E2M3 and E2M1 are decoded by function bodies" in first.choice.why
    x = activations(np.random.default_rng(0))
    probe = first.probe
    tensors = dict(zip((*probe.operands, probe.gemm, probe.output), run_for(model, probe, x), strict=True))
    a, w = (tensors[name].astype(np.float64) for name in probe.operands)
    # Sums of 64 products in float32, each rounding at most 2^-24 of the sum of their sizes.
    assert (np.abs(tensors[probe.gemm] - a @ w) <= 64 * 2.0**-24 * (np.abs(a) @ np.abs(w))).all()


def run_for(model: ir.Model, probe: ProbeRow, x: np.ndarray) -> list[np.ndarray]:
    """The tensors of a probe, in the order of its operands, its GEMM and its output."""
    shown = model.clone()
    names = (*probe.operands, probe.gemm, probe.output)
    values = {value.name: value for node in shown.graph for value in node.outputs}
    shown.graph.outputs.extend(values[name] for name in names)
    return run(shown, {"x": x}, list(names))


def test_the_target_states_every_linear_and_runs_the_file_as_it_is(model: ir.Model, folder: Path) -> None:
    lowered = BACKEND.lower(folder / MODEL, folder, RECIPE)
    assert lowered.path == folder / MODEL and [row.layer for row in lowered.probes] == ["first", "second"]
    assert BACKEND.build(lowered, folder, RECIPE).files == (MODEL, DATA)
    engine, x = BACKEND.load(folder, threads=1), activations(np.random.default_rng(1))
    np.testing.assert_array_equal(engine.run({"x": x})["y"], run(model, {"x": x})[0])
    with pytest.raises(RecipeError, match="z"):
        engine.run({"z": x})
    engine.close()
    with pytest.raises(RecipeError, match="the engine is closed; load it again"):
        engine.run({"x": x})
    assert isinstance(engine, PortableEngine)


def test_a_graph_without_quantized_linears_is_refused(tmp_path: Path) -> None:
    plain = ir.from_onnx_text(f"{HEADER}\ng (float[B,64] x) => (float[B,64] y) {{ y = Relu(x) }}")
    ir.save(plain, tmp_path / MODEL)
    with pytest.raises(ContractError, match="has no quantized linear; export the model again"):
        BACKEND.lower(tmp_path / MODEL, tmp_path, RECIPE)
