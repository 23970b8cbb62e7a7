"""The table of kernels of `ort_cuda`, held against onnxruntime's CUDA execution provider itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks.tools.environments import CannotBeHadError
from export.dialect.graph import MICROSOFT
from pipeline.backends.ort_cuda.kernels import KERNELS, ONNXRUNTIME, has, without_kernel
from pipeline.backends.ort_cuda.lower import LowerOrtCuda
from tests.support import cuda_provider
from tests.support.rtx_models import Linear, block, single

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
SHAPE = [4, 32]
# What ops need beside inputs of SHAPE: shapes of their first inputs, stored integers behind them, attributes.
SHAPES: dict[str, list[list[int]]] = {
    "Conv": [[1, 4, 8, 8], [8, 4, 2, 2]],
    "Gemm": [SHAPE, [32, 8]],
    "MatMul": [SHAPE, [32, 8]],
    "MatMulInteger": [SHAPE, [32, 8]],
    "LayerNormalization": [SHAPE, [32]],
    "MatMulNBits": [SHAPE, [8, 2, 8], [8, 2]],
    "QuantizeLinear": [SHAPE, [], []],
    "DequantizeLinear": [SHAPE, []],
    "Squeeze": [[1, 32]],
}
STORED: dict[str, list[list[int]]] = {
    **{name: [[-1]] for name in ("ReduceMax", "ReduceMean", "ReduceSum")},
    **{name: [[0]] for name in ("Squeeze", "Unsqueeze")},
    **{name: [SHAPE] for name in ("Reshape", "Expand")},
    "Gather": [[1]],
    "Slice": [[0], [2]],
    "Split": [[2, 2]],
    "Tile": [[1, 2]],
}
ATTRIBUTES: dict[str, dict[str, Any]] = {
    "Concat": {"axis": 0},
    "Einsum": {"equation": "ij->ji"},
    "MatMulNBits": {"K": 32, "N": 8, "bits": 4, "block_size": 16},
    "Cast": {"to": TensorProto.FLOAT},
}
BINARY = {"Add", "Sub", "Mul", "Div", "Pow", "Max", "GreaterOrEqual"}


def node(op_type: str, types: tuple[str, ...], domain: str = "") -> onnx.ModelProto:
    """A graph of one node of the name "asked", for inputs of these types, the last of which more inputs share."""
    count = 3 if op_type == "Where" else 2 if op_type in BINARY else len(SHAPES.get(op_type, types))
    types = (*types, *[types[-1]] * (count - len(types)))
    shapes = SHAPES.get(op_type, [SHAPE] * len(types))
    inputs = [
        helper.make_tensor_value_info(f"x{i}", getattr(TensorProto, kind), shape)
        for i, (kind, shape) in enumerate(zip(types, shapes, strict=True))
    ]
    integers = [np.array(row, np.int64) for row in STORED.get(op_type, ())]
    stored = [numpy_helper.from_array(row, f"s{i}") for i, row in enumerate(integers)]
    outputs = ["y", "y2"] if op_type == "Split" else ["y"]
    names = [value.name for value in (*inputs, *stored)]
    asked = helper.make_node(op_type, names, outputs, name="asked", domain=domain, **ATTRIBUTES.get(op_type, {}))
    values = [onnx.ValueInfoProto(name=name) for name in outputs]  # onnxruntime infers their types
    graph = helper.make_graph([asked], "asked", inputs, values, stored)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def lowered(linear: Linear) -> onnx.ModelProto:
    model = ir.from_proto(single(linear))
    LowerOrtCuda()(model)
    return ir.to_proto(model)


GRAPHS = {
    "int8": lowered(Linear("layer")),
    "int8, 2 limbs": lowered(Linear("layer", activation="E3M4")),
    "int8, shifted": lowered(Linear("layer", activation="INT8", weight="INT8")),
    "fp8 qdq": lowered(Linear("layer", activation="E4M3")),
    "fp16, int4 weights": lowered(Linear("layer", weight="INT4", group_size=32, real_groups=True)),
    "fp16": lowered(Linear("layer", group_size=32, real_groups=True)),
}


@pytest.mark.parametrize("path", GRAPHS)
def test_every_node_of_a_lowered_linear_has_a_kernel(path: str) -> None:
    assert without_kernel(GRAPHS[path]) == {}


def test_a_node_without_a_kernel_is_named_by_its_types() -> None:
    model = lowered(Linear("layer"))
    for kept in model.graph.node:
        if kept.op_type == "QuantizeLinear":
            kept.op_type, kept.input[2] = "QuantizeLinear", ""
    assert without_kernel(model) == {"MatMulInteger(UINT8, INT8)": 1, "QuantizeLinear(FLOAT, FLOAT, )": 1}
    portable = block(64)
    assert "QuantizeActivation(FLOAT)" in without_kernel(portable), "the dialect has none"


def test_products_of_unsigned_bytes_have_none() -> None:
    assert has("MatMulInteger", "INT8", "INT8") and not has("MatMulInteger", "UINT8", "INT8")
    assert not has("MatMulIntegerToFloat", "INT8", "INT8", domain=MICROSOFT)


@pytest.mark.slow
def test_the_provider_takes_what_the_table_says(tmp_path: Path) -> None:
    try:
        folder = cuda_provider.installed(ONNXRUNTIME)
    except CannotBeHadError as error:
        pytest.skip(f"onnxruntime-gpu: {error}")
    rows = [(op, row, domain) for (domain, op), kinds in KERNELS.items() for row in kinds]
    refused = [("MatMulInteger", (a, b), "") for a in ("INT8", "UINT8") for b in ("INT8", "UINT8")][1:]
    models = {f"{op}{row}": node(op, row, domain) for op, row, domain in (*rows, *refused)} | GRAPHS
    paths = [tmp_path / f"{index}.onnx" for index in range(len(models))]
    for path, model in zip(paths, models.values(), strict=True):
        onnx.save(model, path)
    answers = dict(zip(models, cuda_provider.placements(folder, paths), strict=True))
    for op, row, _ in rows:
        assert answers[f"{op}{row}"] == {"asked": CUDA}, (op, row)
    for op, row, _ in refused:
        assert answers[f"{op}{row}"] == {"asked": CPU}, (op, row)
    for path in GRAPHS:
        assert isinstance(answers[path], dict) and set(answers[path].values()) == {CUDA}, path  # type: ignore[union-attr]
