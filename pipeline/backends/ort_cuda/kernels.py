"""What onnxruntime's CUDA execution provider has kernels for, among what lowered graphs have.

Asked of the provider itself, which says of every node whether it takes it; tests/backends/ort_cuda/test_kernels.py asks
again. Beside the table it has GemmFloat8, an FP8 GEMM, of which the CPU's has no kernel, so that a graph with it could
not be proven here; and it has no MatMulIntegerToFloat, no DynamicQuantizeLinear and no product of unsigned bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import product

import onnx
from onnx import TensorProto

from export.dialect.graph import MICROSOFT

# The release that was asked.
ONNXRUNTIME = "1.31.1"
_FLOATS = ("FLOAT", "FLOAT16")
_CODES = ("INT8", "UINT8", "FLOAT8E4M3FN")
# Ops that take either float in their first input.
_OF_FLOATS = (
    "Abs", "Add", "Clip", "Concat", "Conv", "Cos", "Div", "Einsum", "Erf", "Exp", "Expand", "Gather", "Gelu", "Gemm",
    "GreaterOrEqual", "Identity", "LayerNormalization", "MatMul", "Max", "Mul", "Neg", "Pow", "ReduceMax", "ReduceMean",
    "ReduceSum", "Reshape", "Round", "Sigmoid", "Sin", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Tanh",
    "Tile", "Transpose", "Unsqueeze",
)  # fmt: skip
_CAST = ("FLOAT", "FLOAT16", "INT8", "INT32", "INT64", "BOOL")
# (domain, op) -> element types of its first inputs, a row for each combination that has a kernel.
KERNELS: dict[tuple[str, str], tuple[tuple[str, ...], ...]] = {
    **{("", op): tuple((kind,) for kind in _FLOATS) for op in _OF_FLOATS},
    ("", "Add"): tuple((kind,) for kind in (*_FLOATS, "INT32")),
    ("", "Mul"): tuple((kind,) for kind in (*_FLOATS, "INT32")),
    ("", "Cast"): tuple((kind,) for kind in _CAST),
    ("", "Where"): tuple(("BOOL", kind) for kind in _FLOATS),
    ("", "QuantizeLinear"): tuple((kind, kind, code) for kind, code in product(_FLOATS, _CODES)),
    ("", "DequantizeLinear"): tuple((code, kind) for kind, code in product(_FLOATS, _CODES)),
    ("", "MatMulInteger"): (("INT8", "INT8"),),
    (MICROSOFT, "MatMulNBits"): tuple((kind, "UINT8", kind) for kind in _FLOATS),
}


def has(op_type: str, *types: str, domain: str = "") -> bool:
    """Is there a kernel of the op for inputs of these element types, the first ones?

    >>> has("MatMulInteger", "INT8", "INT8"), has("MatMulInteger", "UINT8", "INT8")
    (True, False)
    """
    return any(types[: len(row)] == row for row in KERNELS.get((domain, op_type), ()))


def without_kernel(model: onnx.ModelProto) -> dict[str, int]:
    """Nodes of a graph for which the table has no kernel, by op and element types of their inputs: how many. Those that
    compute shapes are left out, as the provider leaves them to the CPU."""
    types = _types(model)
    nodes = ((node, tuple(types.get(name, "") for name in node.input)) for node in model.graph.node)
    missing = [
        f"{node.op_type}({', '.join(kinds)})"
        for node, kinds in nodes
        if not (node.op_type == "Shape" or "INT64" in kinds[:1] or has(node.op_type, *kinds, domain=node.domain))
    ]
    return dict(sorted(Counter(missing).items()))


def _types(model: onnx.ModelProto) -> dict[str, str]:
    """Element type of every tensor."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values: Iterable[onnx.ValueInfoProto] = (*graph.input, *graph.value_info, *graph.output)
    types = {value.name: TensorProto.DataType.Name(value.type.tensor_type.elem_type) for value in values}
    types |= {tensor.name: TensorProto.DataType.Name(tensor.data_type) for tensor in graph.initializer}
    for node in graph.node:
        if node.domain == MICROSOFT:  # no schema of it is at hand; all of these give the type of their first input
            first, *_ = node.input
            types |= dict.fromkeys(node.output, types.get(first, ""))
    return types
