"""Custom ops as ONNX objects: function bodies, schemas, shape rules, attributes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx
import pytest
from onnx import defs

from export.dialect.ops import DOMAIN, OPS, VERSION, attributes, no_multipliers
from export.errors import ContractError, RecipeError
from tests.support.op_models import model_of, schema_of

# --- functions, schemas, shapes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("op_name", OPS)
def test_function_body_is_standard_onnx(op_name: str) -> None:
    function = OPS[op_name].function()
    assert {node.domain for node in function.node} == {""}
    assert [(opset.domain, opset.version) for opset in function.opset_import] == [("", 21)]
    assert (function.domain, function.name) == (DOMAIN, op_name)
    referenced = {a.ref_attr_name for node in function.node for a in node.attribute if a.ref_attr_name}
    assert referenced <= set(function.attribute) == set(OPS[op_name].attributes)
    assert OPS[op_name].function().SerializeToString(deterministic=True) == function.SerializeToString(
        deterministic=True
    )


CHOICES: dict[str, dict[str, Any]] = {
    "DequantizeWeight": {"format": "E2M1", "in_features": 64, "group_size": 16, "multipliers": (1, 2)},
    "QuantizeWeight": {"format": "E2M3", "in_features": 64, "group_size": 0},
    "QuantizeActivation": {"format": "E2M3"},
    "DequantizeActivation": {"format": "E2M3"},
    "PackedGemm": {
        "layer": "l",
        "activation_format": "E2M3",
        "weight_format": "E2M1",
        "in_features": 64,
        "group_size": 0,
    },
    "QuantizeStatic": {"format": "UE2M2"},
    "DequantizeStatic": {"format": "UE2M2"},
    "QuantizeGroups": {"format": "E2M3", "in_features": 64, "group_size": 16},
    "DequantizeGroups": {"format": "E2M3", "in_features": 64, "group_size": 16},
    "PackedGroupGemm": {
        "layer": "l",
        "activation_format": "E2M3",
        "weight_format": "E2M1",
        "in_features": 64,
        "group_size": 32,
        "activation_group": 16,
        "scale_groups": 2,
    },
    "NormModulateQuantize": {"format": "E2M3", "epsilon": 1e-6},
    "QuantizedAttention": {"layer": "l", "qk_format": "INT8", "pv_format": "E2M3", "scale": 0.125},
}
# input shapes -> output shapes, with symbolic sizes
SHAPES: dict[str, tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]] = {
    "DequantizeWeight": ([("N", 32), ("N", 1), ("N", 2)], [(64, "N")]),
    "QuantizeWeight": ([(64, 24), (24, 1), (1, 1)], [(24, 48)]),
    "QuantizeActivation": ([("B", "S", 64)], [("B", "S", 64), ("B", "S", 1)]),
    "DequantizeActivation": ([("B", "S", 64), ("B", "S", 1)], [("B", "S", 64)]),
    "PackedGemm": ([("B", "S", 64), ("B", "S", 1), (24, 32), (24, 1), (1, 1), (24,)], [("B", "S", 24)]),
    "QuantizeStatic": ([("B", "S", 64), (1,), (1,)], [("B", "S", 64)]),
    "DequantizeStatic": ([("B", "S", 64), (1,), (1,)], [("B", "S", 64)]),
    "QuantizeGroups": ([("B", "S", 64)], [("B", "S", 64), ("B", "S", 4)]),
    "DequantizeGroups": ([("B", "S", 64), ("B", "S", 4)], [("B", "S", 64)]),
    "PackedGroupGemm": ([("B", "S", 64), ("B", "S", 4), (24, 32), (24, 2), (1, 1), (24,)], [("B", "S", 24)]),
    "QuantizedAttention": (
        [("B", 2, "S", 64), ("B", 2, "T", 64), ("B", 2, "T", 64), ("B", 1, 1, "T")],
        [("B", 2, "S", 64)],
    ),
    "NormModulateQuantize": ([("B", "S", 64), ("B", 1, 64), ("B", 1, 64)], [("B", "S", 64), ("B", "S", 1)]),
}


@pytest.fixture
def registered() -> Iterator[None]:
    """Schemas known to onnx for one test only."""
    assert not any(defs.has(name, DOMAIN) for name in OPS), "importing export.dialect.ops must not register schemas"
    for op in OPS.values():
        defs.register_schema(schema_of(op))
    yield
    for name in OPS:
        defs.deregister_schema(name, VERSION, DOMAIN)


@pytest.mark.parametrize("op_name", OPS)
def test_shape_rule(op_name: str) -> None:
    inputs, outputs = SHAPES[op_name]
    inferred = OPS[op_name].infer(attributes(op_name, **CHOICES[op_name]), *inputs)
    assert [shape for _, shape in inferred] == outputs
    assert [kind for kind, _ in inferred] == list(OPS[op_name].outputs.values())


@pytest.mark.torch
@pytest.mark.parametrize("op_name", OPS)
def test_onnx_infers_shapes_with_the_schema(op_name: str, registered: None) -> None:
    model = model_of(op_name, SHAPES[op_name][0], **CHOICES[op_name])
    outputs = SHAPES[op_name][1]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    del model.functions[:]  # the schema alone must do
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph.output
    shapes = [tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in inferred]
    assert shapes == outputs


@pytest.mark.parametrize("op_name", OPS)
def test_schema_names_everything(op_name: str, registered: None) -> None:
    schema = defs.get_schema(op_name, VERSION, DOMAIN)
    assert [p.name for p in schema.inputs] == list(OPS[op_name].inputs)
    assert [p.name for p in schema.outputs] == list(OPS[op_name].outputs)
    assert set(schema.attributes) == set(attributes(op_name, **CHOICES[op_name]))
    assert all(attribute.required and attribute.description for attribute in schema.attributes.values())


@pytest.mark.torch
def test_checker_refuses_a_missing_attribute(registered: None) -> None:
    model = model_of("QuantizeActivation", [(2, 8)], format="E2M3")
    del model.functions[:]
    kept = [a for a in model.graph.node[0].attribute if a.name != "steps"]
    del model.graph.node[0].attribute[:]
    model.graph.node[0].attribute.extend(kept)
    with pytest.raises(onnx.checker.ValidationError, match="steps"):
        onnx.checker.check_model(model)


def test_choices_that_do_not_fit() -> None:
    grouping = {"format": "E2M1", "in_features": 50, "group_size": 16}
    with pytest.raises(ContractError, match="in_features 50 is not a multiple of group_size 16; use a divisor or 0"):
        attributes("DequantizeWeight", **grouping)
    with pytest.raises(ContractError, match="17 multipliers; a 4-bit index reaches 1 to 16"):
        attributes("DequantizeWeight", **{**grouping, "group_size": 0}, multipliers=tuple(range(1, 18)))
    with pytest.raises(RecipeError, match="number format 'FP9' is unknown"):
        attributes("QuantizeActivation", format="FP9")
    with pytest.raises(TypeError, match="QuantizeActivation has no multiplier; it has format, max_value"):
        attributes("QuantizeActivation", format="E2M3", multiplier=(1,))


def test_no_multipliers_is_a_row_of_zeros() -> None:
    assert no_multipliers(48, 16).tolist() == [[0, 0]]
    assert no_multipliers(48, 0).tolist() == [[0]]
