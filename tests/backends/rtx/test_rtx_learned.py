"""The rtx lowering of static scales, zero points, balance and branches: proven by the gates; groups are refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from export.checkpoint import QuantizedLinear
from export.errors import ContractError
from export.formats.format import get_format
from pipeline import recipe as recipes
from pipeline.backends.base import LoweredGraph
from pipeline.backends.rtx import RtxBackend, RtxOptions
from pipeline.backends.rtx.build import gemm_rows, problems
from pipeline.backends.rtx.lower import LowerRtx
from pipeline.passes import run_shared
from pipeline.verify.oracle import activation_oracle, check_linear, joined
from pipeline.verify.probe import ProbedGraph
from tests.backends.cpu.test_cpu_learned import AROUND, INPUTS, ONE, SCALINGS, UNSIGNED, assert_proven, inputs
from tests.support import learned
from tests.support.portable import op_types, portable, random_linear

WEIGHTS = [("E2M1", "per_channel", 0), ("E2M1", "exact_group", 16), ("INT4", "group", 32)]


def lowered(layer: QuantizedLinear, folder: Path, weights: str = "fp8") -> tuple[ir.Model, LowerRtx, ProbedGraph]:
    model = portable(ONE, [layer], INPUTS)
    run_shared(model)
    rewrite = LowerRtx(gemm_rows(weights, (89, 120)))
    rewrite(model)
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
    return (
        model,
        rewrite,
        ProbedGraph(LoweredGraph(folder / "model.onnx", tuple(rewrite.probes), tuple(rewrite.choices))),
    )


def prove(layer: QuantizedLinear, probed: ProbedGraph, exact: bool) -> None:
    ((_, probes),) = probed.probes([layer.name], inputs())
    probe = joined(probes)
    result = check_linear(layer, probe, activation_oracle(probe.x, layer))
    assert_proven(result if exact else replace(result, gemm_max_abs_diff=0))


# Everything learned with everything else that is; how weights are stored in turn.
STORED = cycle(("fp8", "int8", "int4", "int8"))
COMBINED = list(zip(product(AROUND, ("static", "zero", "token"), WEIGHTS), STORED, strict=False))


@pytest.mark.parametrize(("learned_with", "weights"), COMBINED, ids=str)
def test_gates_prove_every_combination(learned_with: Any, weights: str, tmp_path: Path) -> None:
    around, scaling, (name, granularity, group) = learned_with
    one = random_linear(weight=name, activation="E2M3", granularity=granularity, group=group)
    layer = AROUND[around](SCALINGS.get(scaling, lambda one: one)(one))
    model, rewrite, probed = lowered(layer, tmp_path, weights)
    assert not any(node.domain == "fpq" for node in model.graph)
    assert rewrite.probes[0].exact == (granularity != "group")
    prove(layer, probed, rewrite.probes[0].exact)


@pytest.mark.parametrize("activation", ["E2M1", "E1M2", "E3M0", "INT4", "INT6", "INT8", "E3M2", "E3M4", "E4M3"])
@pytest.mark.parametrize("weights", ["fp8", "int8"])
def test_every_signed_static_activation(activation: str, weights: str, tmp_path: Path) -> None:
    layer = SCALINGS["static"](random_linear(weight="INT4", activation=activation))
    _, rewrite, probed = lowered(layer, tmp_path, weights)
    prove(layer, probed, rewrite.probes[0].exact)


@pytest.mark.parametrize("activation", UNSIGNED)
@pytest.mark.parametrize("weights", ["fp8", "int8"])
def test_every_unsigned_activation_with_a_zero(activation: str, weights: str, tmp_path: Path) -> None:
    layer = learned.with_scaling(random_linear(weight="INT4"), "zero")
    reach = np.float32([3.2 / get_format(activation).max_value])
    layer = replace(layer, activation_format=activation, activation_scale=reach)
    _, rewrite, probed = lowered(layer, tmp_path, weights)
    assert rewrite.probes[0].exact
    prove(layer, probed, True)


def uniform(weight: str, k: int = 64) -> QuantizedLinear:
    layer = learned.with_scaling(random_linear(weight=weight, k=k), "zero")
    return replace(layer, activation_format="UE1M7", activation_scale=np.float32([3.2 / 63.75]))


def test_asymmetric_8_bit_integers_are_one_int8_gemm(tmp_path: Path) -> None:
    """Codes of 0 to 255 less 128; what is missing in the sum is added exactly."""
    layer = uniform("INT4")
    model, rewrite, probed = lowered(layer, tmp_path)
    (row,) = rewrite.probes
    assert (row.path, row.codes_offset, len(row.codes)) == ("int8", -128.0, 1)
    assert "UE1M7 is exact in INT8 less 128" in rewrite.choices[0].why
    shift = model.graph.initializers["a.rtx_shift"].const_value.numpy()
    np.testing.assert_array_equal(shift, 128 * layer.integers().astype(np.int64).sum(axis=1))
    prove(layer, probed, True)


def test_where_the_shift_would_not_be_exact_two_limbs_are_taken(tmp_path: Path) -> None:
    """255 * 127 * 1024 exceeds 2^24: a float32 sum of shifted images would round more than one of the images."""
    model = portable(ONE, [uniform("INT8", 2048)], "float[batch,S,2048] x, float[batch] timestep")
    run_shared(model)
    rewrite = LowerRtx(gemm_rows("fp8", (89, 120)))
    rewrite(model)
    assert rewrite.choices[0].path == "int8, 2 limbs" and rewrite.probes[0].codes_offset == 0
    assert "not int8: sums of integers less 128 are not exact in float32" in rewrite.choices[0].why


def test_a_static_scale_costs_no_reduction_and_no_multiplication(tmp_path: Path) -> None:
    plain, _, _ = lowered(random_linear(), tmp_path)
    static, _, _ = lowered(SCALINGS["static"](random_linear()), tmp_path)
    assert "ReduceMax" in op_types(plain) and "ReduceMax" not in op_types(static)
    assert op_types(static).count("Mul") == op_types(plain).count("Mul") - 1


# --- what it refuses, and what it must not refuse ------------------------------------------------------------------

GROUPS = "target rtx runs one GEMM for each linear and has no scale per token and group .*--target cpu"


def test_groups_of_a_token_are_refused_before_anything_is_changed() -> None:
    model = portable(ONE, [SCALINGS["groups"](random_linear())], INPUTS)
    run_shared(model)
    before = op_types(model)
    with pytest.raises(ContractError, match=rf"a: activation_group 16 \(1 layers\); {GROUPS}"):
        LowerRtx(gemm_rows("fp8", (89, 120)))(model)
    assert op_types(model) == before


def recipe_of(method: str, **options: Any) -> Any:
    calibrate = {"method": method, "options": options}
    return recipes.from_dict({"name": "tiny", "model": "zoo:dit_mini", "calibrate": calibrate}, "test")


def test_a_method_with_groups_is_refused_before_work_starts() -> None:
    (problem,) = problems(recipe_of("qdit"), RtxOptions(), [])
    assert problem.startswith("calibrate.method qdit scales activations token_group: target rtx runs one GEMM")
    assert problem in RtxBackend().problems(recipe_of("qdit", activations="token_group"))


@pytest.mark.parametrize(
    ("method", "options"),
    [("rtn", {}), ("qdit", {"activations": "per_token"}), ("qdit", {"activations": "per_tensor"}), ("msfp", {})],
)
def test_methods_without_groups_are_not_refused(method: str, options: dict[str, Any]) -> None:
    assert problems(recipe_of(method, **options), RtxOptions(), []) == []


# --- the engine builder --------------------------------------------------------------------------------------------


@pytest.mark.rtx
@pytest.mark.parametrize(
    ("weights", "first", "gemms"),
    [
        ("fp8", "UE2M2", {"fp8_e4m3 x fp8_e4m3": 2}),
        ("int4", "UE2M2", {"fp8_e4m3 x fp8_e4m3": 2}),
        ("fp8", "UE1M7", {"fp8_e4m3 x fp8_e4m3": 1, "int8 x int8": 1}),
    ],
)
def test_the_builder_takes_zero_points_and_branches(
    weights: str, first: str, gemms: dict[str, int], tmp_path: Path
) -> None:
    """Plan and promise agree: the quantized GEMMs have the promised operand types."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    of = learned.router()
    layers = [
        AROUND["both"](learned.with_scaling(random_linear(name, n=64, seed=i), scaling))
        for i, (name, scaling) in enumerate((("a", "zero"), ("b", "per_tensor")))
    ]
    layers = [replace(layers[0], activation_format=first, router=of), replace(layers[1], router=of)]
    body = 'h = fpq.QuantizedLinear <layer="a"> (x) g = Gelu(h) y = fpq.QuantizedLinear <layer="b"> (g)'
    shapes = "float[batch,tokens,64] x, float[batch] timestep", "float[batch,tokens,64] y"
    model = portable(body, layers, *shapes, inner="float[batch,tokens,64] h, float[batch,tokens,64] g")
    ir.save(model, tmp_path / "portable.onnx", external_data="portable.onnx.data")
    chosen = recipe_of("rtn").with_options(RtxOptions(weights, (89, 120)))
    for name in ("work", "rtx"):
        (tmp_path / name).mkdir()
    lowered = RtxBackend().lower(tmp_path / "portable.onnx", tmp_path / "work", chosen)
    built = RtxBackend().build(lowered, tmp_path / "rtx", chosen)
    assert {kind: count for kind, count in built.metadata["gemms"].items() if kind in gemms} == gemms
