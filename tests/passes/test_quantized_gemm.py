"""The quantized linear read from a packed node: its weight in every form is the checkpoint's."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from export.checkpoint import QuantizedLinear
from export.errors import ContractError
from export.formats.operands import weight_exponent
from pipeline.passes import run_shared
from pipeline.passes.quantized_gemm import STORED, QuantizedGemm, read_gemm, refuse_groups, refuse_unpacked
from tests.support.learned import with_scaling
from tests.support.portable import portable, random_linear

FORMS = {
    "channels": {},
    "multipliers": {"granularity": "exact_group", "group": 16},
    "real groups": {"granularity": "group", "group": 32},
}


def packed(layer: QuantizedLinear) -> ir.Model:
    model = portable('y = fpq.QuantizedLinear <layer="a"> (x)', [layer])
    run_shared(model)
    return model


def node_of(model: ir.Model) -> ir.Node:
    return next(node for node in model.graph if node.op_type.startswith("Packed"))


def gemm_of(layer: QuantizedLinear) -> QuantizedGemm:
    return read_gemm(node_of(packed(layer)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight", ["E2M1", "E1M2", "INT4", "E3M0"])
def test_integers_and_scales_are_the_checkpoints(weight: str, form: str) -> None:
    layer = random_linear(weight=weight, **FORMS[form])
    gemm = gemm_of(layer)
    for dtype in (None, np.int16, np.int32, np.float32):
        np.testing.assert_array_equal(gemm.integers(dtype), layer.integers())
    np.testing.assert_array_equal(gemm.turned_integers(np.int16), layer.integers().T)
    assert gemm.shape == (64, 16) and np.abs(gemm.integers()).max() <= gemm.weight_kmax
    assert gemm.largest_row_sum == np.abs(layer.integers()).sum(axis=1).max()
    # A float64 sum of 64 products of at most 24 + 8 bits each: exact but for the last roundings.
    np.testing.assert_allclose(gemm.channel_sums(), layer.dequantized().sum(axis=1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["E4M3", "INT8"])
def test_hardware_numbers_are_the_integers_times_a_power_of_two(kind: str) -> None:
    gemm = gemm_of(random_linear(weight="E2M1", **FORMS["multipliers"]))
    exponent = weight_exponent("E2M1", kind, gemm.multipliers)
    assert exponent is not None
    numbers = gemm.hardware_numbers(kind, exponent)
    assert numbers.dtype == STORED[kind].numpy()
    np.testing.assert_array_equal(numbers.astype(np.float64), gemm.integers().T * 2.0**exponent)


def test_wide_integers_do_not_wrap() -> None:
    """E4M3's largest integer, 448 * 2^9, needs more than 16 bits."""
    layer = random_linear(weight="E4M3")
    gemm = gemm_of(layer)
    assert gemm.integers().dtype == np.int32 and random_gemm("E2M1").integers().dtype == np.int16
    np.testing.assert_array_equal(gemm.integers(), layer.integers())


def random_gemm(weight: str) -> QuantizedGemm:
    return gemm_of(random_linear(weight=weight))


def test_a_computed_weight_is_refused_by_layer_and_port() -> None:
    node = node_of(packed(random_linear()))
    node.replace_input_with(3, ir.Value(name="made"))
    with pytest.raises(ContractError, match="a: PackedGemm reads its w_scales from the computed tensor made"):
        read_gemm(node)


def test_groups_of_activations_and_what_is_left_are_refused_by_name() -> None:
    model: Any = packed(with_scaling(random_linear(), "token_group", 32))
    with pytest.raises(ContractError, match=r"a: activation_group 32 \(1 layers\); use another target"):
        refuse_groups(model.graph, "use another target")
    with pytest.raises(ContractError, match=r"2 nodes of domain fpq .* a/quantize \(QuantizeGroups\), a/gemm"):
        refuse_unpacked(model.graph)
    refuse_groups(packed(random_linear()).graph, "never said")
