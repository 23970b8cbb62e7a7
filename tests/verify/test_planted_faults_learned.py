"""Faults planted in what methods learn are caught by the gates meant for them; a clean graph with all of it passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from export.checkpoint import QuantizedLinear
from export.models import load as models
from export.to_onnx import export_portable
from pipeline import recipe as recipes
from pipeline.backends import BACKENDS
from pipeline.backends.base import LoweredGraph
from pipeline.backends.cpu import CpuOptions
from pipeline.backends.cuda import CudaOptions
from pipeline.backends.cuda.engine import CudaEngine
from pipeline.verify.effort import BATCHES, LARGE_INSIDE
from pipeline.verify.proof import verify_target
from pipeline.verify.report import Report
from pipeline.verify.study import study
from tests.support import learned, tiny
from tests.support.faults import INSIDE_LINEARS, Fault, Graph, LoweredFault, of_targets
from tests.support.faults_learned import LEARNED_FAULTS, LOWERED_LEARNED_FAULTS, row_of
from tests.verify.test_planted_faults import SHARP, TARGETS, Bench, str_of_fault

pytestmark = [pytest.mark.slow, pytest.mark.torch]


@dataclass(frozen=True)
class Case:
    """A target, its bench, and its graph without any fault."""

    target: str
    bench: Bench
    graph: LoweredGraph


def learned_layer(layer: QuantizedLinear, index: int, of: Any, groups: bool) -> QuantizedLinear:
    """By the layer's place: static and balanced (attention), branches (cross-attention), a zero point (behind GELU)."""
    block = int(layer.name.split(".")[1])
    if "attn1.to_out" in layer.name:
        return learned.with_scaling(layer, "token_group", 32) if groups else layer
    if "attn1" in layer.name:
        static = learned.with_balance(learned.with_scaling(layer, "per_tensor", reach=4.0 - block), block)
        return learned.with_low_rank(static, of, index) if layer.name.endswith("to_q") else static
    if "attn2.to_out" in layer.name or layer.name.endswith("net.0.proj"):
        return layer
    if "attn2" in layer.name:
        return learned.with_low_rank(layer, of, index, half=block == 0)
    return learned.with_scaling(layer, "zero", reach=1.0)


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Bench]:
    """groups -> a tiny PixArt with everything that a target takes; only the CPU takes groups of tokens."""

    @cache
    def make(groups: bool) -> Bench:
        folder, of = tmp_path_factory.mktemp("learned"), learned.router()
        model = models.load(str(tiny.folder("pixart", folder)))
        plain = tiny.quantized(model, granularity="exact_group")
        layers = [learned_layer(layer, i, of, groups) for i, layer in enumerate(plain)]
        chosen = {"name": "tiny", "model": model.source, "sampling": {"n_steps": 3}, "rtx": SHARP}
        recipe = recipes.from_dict(chosen, "test")
        export_portable(model, layers, folder / "model.onnx")
        return Bench(model, layers, recipe, folder / "model.onnx", study(model, layers, recipe))

    return make


@pytest.fixture(scope="module")
def cases(benches: Callable[[bool], Bench]) -> Callable[[str], Case]:
    """target -> it with its bench."""

    @cache
    def make(target: str) -> Case:
        bench = benches(target == "cpu")
        return Case(target, bench, bench.lower(target, bench.portable, bench.portable.parent / target))

    return make


@pytest.fixture
def case(target: str, cases: Callable[[str], Case]) -> Case:
    return cases(target)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function is test_fault_in_the_portable_graph:
        pairs = of_targets(LEARNED_FAULTS, TARGETS, metafunc.config.getoption("--all-faults"))
        metafunc.parametrize(("target", "fault"), pairs, ids=str_of_fault)


@pytest.mark.parametrize("target", TARGETS)
def test_the_clean_graph_passes_all_gates(case: Case) -> None:
    assert case.bench.failures(case.target, case.graph) == set()
    kinds = {layer.activation_scaling for layer in case.bench.layers}
    assert kinds == {"per_token", "per_tensor", *(["token_group"] if case.target == "cpu" else [])}
    chosen = learned.router().choose(np.concatenate([call["timestep"] for call in case.bench.found.calls]))
    assert len(set(chosen)) > 1  # else the branch of another timestep might be the right one


@pytest.mark.parametrize("target", ["cpu"])
@pytest.mark.parametrize("path", ["stock", "fused"])
def test_the_cpu_engine_passes_as_well(path: str, case: Case, tmp_path: Path) -> None:
    """Built, split by how often its parts run, loaded, and run on every step; with the native ops, too."""
    recipe, bench = case.bench.recipe.with_options(CpuOptions(path)), case.bench
    backend = BACKENDS["cpu"]
    if problems := backend.problems(recipe):
        pytest.skip("; ".join(problems))
    (tmp_path / "cpu").mkdir()
    graph = replace(bench, recipe=recipe).lower("cpu", bench.portable, tmp_path / "work")
    backend.build(graph, tmp_path / "cpu", recipe)
    engine, report = backend.load(tmp_path), Report()
    try:
        verify_target("cpu", bench.model, bench.layers, graph, engine, bench.found, report, effort=INSIDE_LINEARS)
    finally:
        engine.close()
    assert report.failures() == []


@pytest.mark.parametrize("target", ["cuda"])
def test_the_cuda_engine_passes_as_well(case: Case, tmp_path: Path) -> None:
    """Built, split, and run on the CPU in float32: static scales, zero points, balance, branches."""
    bench, report = case.bench, Report()
    recipe = bench.recipe.with_options(CudaOptions(activations="fp32"))
    BACKENDS["cuda"].build(case.graph, tmp_path, recipe)
    engine = CudaEngine(tmp_path, device="cpu")
    effort = replace(INSIDE_LINEARS, special=BATCHES, inside=LARGE_INSIDE, state=True)
    verify_target("cuda", bench.model, bench.layers, case.graph, engine, bench.found, report, effort=effort)
    assert report.failures() == []


@pytest.mark.parametrize("target", ["cuda"])  # for all: it is one part of the portable graph
def test_nan_that_is_lost_fails_the_repeats(case: Case, tmp_path: Path) -> None:
    bench, report = case.bench, Report()
    graph = onnx.load(bench.portable)
    last = next(node for node in graph.graph.node if node.name == "nan/sample")
    last.op_type, kept = "Identity", last.input[0]
    last.input[:] = [kept]
    onnx.save(graph, bench.portable.with_name("forgets.onnx"))
    lowered = bench.lower("cuda", bench.portable.with_name("forgets.onnx"), tmp_path / "work")
    (tmp_path / "cuda").mkdir()
    BACKENDS["cuda"].build(lowered, tmp_path / "cuda", bench.recipe.with_options(CudaOptions(activations="fp32")))
    engine = CudaEngine(tmp_path / "cuda", device="cpu")
    effort = replace(INSIDE_LINEARS, special=(1, 2), state=True)
    verify_target("cuda", bench.model, bench.layers, lowered, engine, bench.found, report, effort=effort)
    assert {gate.name for gate in report.failures()} == {"cuda/repeats"}


def test_fault_in_the_portable_graph(fault: Fault, case: Case, tmp_path: Path) -> None:
    graph = Graph(case.bench.portable)
    fault.plant(graph)
    graph.save(tmp_path / "model.onnx")
    lowered = case.bench.lower(case.target, tmp_path / "model.onnx", tmp_path / case.target)
    assert f"{case.target}/{fault.gate}" in case.bench.failures(case.target, lowered)


OF_OWN = [
    (target, layer, fault) for target in TARGETS for layer, fault in LOWERED_LEARNED_FAULTS if target in fault.targets
]


@pytest.mark.parametrize(("target", "layer", "fault"), OF_OWN, ids=str_of_fault)
def test_fault_in_a_lowered_graph(layer: str, fault: LoweredFault, case: Case, tmp_path: Path) -> None:
    graph = Graph(case.graph.path)
    fault.plant(graph, row_of(case.graph, layer))
    graph.save(tmp_path / "model.onnx")
    changed = replace(case.graph, path=tmp_path / "model.onnx")
    assert f"{case.target}/{fault.gate}" in case.bench.failures(case.target, changed)
