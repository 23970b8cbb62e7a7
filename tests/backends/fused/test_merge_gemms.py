"""Linears of the same codes as one plugin: what is merged, what stays alone, and where the gates find the sums."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from export.dialect.graph import drop_unused
from pipeline.backends import lowering_file
from pipeline.backends.base import LoweredGraph
from pipeline.backends.fused.lower import LowerFused
from pipeline.backends.fused.ops import DOMAIN, add_functions
from pipeline.backends.tensorrt import plugin_payloads
from pipeline.passes import run_shared
from pipeline.verify.oracle import LinearProbe
from pipeline.verify.probe import ProbedGraph
from tests.support.portable import activations, portable, random_linear

SHAPES = {"inputs": "float[B,S,64] x, float[B,1,64] gate", "outputs": "float[B,S,192] y", "inner": "float[B,S,64] h"}
LINEARS = 'h = fpq.QuantizedLinear <layer="a"> (x)\nk = fpq.QuantizedLinear <layer="b"> (x)\n'
JOIN = "y = Concat <axis = -1> (k, h)"
FEEDS = {"x": activations(np.random.default_rng(4)), "gate": np.ones((1, 1, 64), np.float32)}
Lower = Callable[..., LowerFused]


def lowered(low: Lower, base: dict[str, Any], other: dict[str, Any], body: str = JOIN) -> tuple[ir.Model, LowerFused]:
    """A linear of 64 channels and one of 128 on the same x."""
    layers = [random_linear("a", n=64, k=64, **base), random_linear("b", n=128, k=64, seed=1, **other)]
    model = portable(LINEARS + body, layers, **SHAPES)
    run_shared(model)
    lowering = low(model)
    drop_unused(model)
    return model, lowering


def lower_apart(model: ir.Model) -> LowerFused:
    """Fused ops, one Gemm for each linear."""
    lowering = LowerFused()
    lowering(model)
    add_functions(model)
    return lowering


def gemms(model: ir.Model) -> list[str]:
    return [str(node.name) for node in model.graph if node.domain == DOMAIN and node.op_type.startswith("Gemm")]


def probed(model: ir.Model, lowering: LowerFused, folder: Path) -> dict[str, LinearProbe]:
    """What each linear computes in stock onnxruntime, found through a lowering file."""
    folder.mkdir()
    ir.save(model, folder / "model.onnx", external_data="data", size_threshold_bytes=64)
    written = LoweredGraph(folder / "model.onnx", tuple(lowering.probes), tuple(lowering.choices))
    lowering_file.write(written, folder / lowering_file.NAME)
    graph = ProbedGraph(lowering_file.read(folder / lowering_file.NAME))
    assert graph.complete == {"a", "b"}
    return {layer: one for layer, (one,) in graph.probes(["a", "b"], [FEEDS])}


@pytest.mark.parametrize(
    "chosen",
    [{}, {"granularity": "exact_group", "group": 16}, {"granularity": "group", "group": 32}],
    ids=["channels", "multipliers", "real groups"],
)
def test_two_linears_are_one_gemm_and_the_gates_find_each(chosen: dict[str, Any], tmp_path: Path) -> None:
    """Codes, exact sums and results are those of the graph with both apart, to the bit; weights are stored once."""
    model, lowering = lowered(plugin_payloads.lower, chosen, chosen)
    assert gemms(model) == ["a+b"]
    apart, lowering_apart = lowered(lower_apart, chosen, chosen)
    assert gemms(apart) == ["a", "b"]
    merged, expected = probed(model, lowering, tmp_path / "one"), probed(apart, lowering_apart, tmp_path / "two")
    for layer in ("a", "b"):
        for name in ("integers", "gemm", "output"):
            np.testing.assert_array_equal(getattr(merged[layer], name), getattr(expected[layer], name))
    sizes = [(folder / "data").stat().st_size for folder in (tmp_path / "one", tmp_path / "two")]
    assert sizes[0] <= sizes[1] + 4096, "no part is stored beside the whole; 4096: alignment"


@pytest.mark.parametrize(
    ("other", "body"),
    [
        ({"weight": "E1M2"}, JOIN),
        ({"granularity": "exact_group", "group": 16}, JOIN),
        ({"granularity": "group", "group": 16}, JOIN),
        ({"activation": "E3M2"}, JOIN),
        ({}, "g = Mul(gate, h)\ns = Add(x, g)\ny = Concat <axis = -1> (k, s)"),
    ],
    ids=["weight formats", "multipliers", "real groups", "codes", "an epilogue"],
)
def test_other_linears_stay_alone(other: dict[str, Any], body: str) -> None:
    model, lowering = lowered(plugin_payloads.lower, {}, other, body)
    assert sorted(gemms(model)) == ["a", "b"] and "Split" not in [node.op_type for node in model.graph]
    assert {probe.gemm_columns for probe in lowering.probes} == {None}


def test_gemms_are_merged_up_to_a_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.backends.fused.merge_gemms.MERGED_COLUMNS", 64 + 127)
    model, _ = lowered(plugin_payloads.lower, {}, {})
    assert gemms(model) == ["a", "b"]
