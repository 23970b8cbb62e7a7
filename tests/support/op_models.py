"""Nodes and schemas of the custom ops as ONNX has them, models of one op, and running them in every runtime."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import AttributeProto, TensorProto, helper
from onnx.defs import OpSchema
from onnx.reference import ReferenceEvaluator

from export.dialect.ops import DOMAIN, OPS, VERSION, Op, attributes

FORMATS = ("E2M1", "E1M2", "E3M0", "E2M3", "E3M2", "E3M4", "E4M3", "E5M2", "INT4", "INT6", "INT8", "UE2M2", "UE4M4")
LEVELS = ("ORT_ENABLE_ALL", "ORT_ENABLE_BASIC", "ORT_DISABLE_ALL")
F32_EPS = 2.0**-24  # largest relative error of one float32 rounding
Arrays = tuple[np.ndarray, ...]
TYPE_NAMES = {TensorProto.UINT8: "tensor(uint8)", TensorProto.FLOAT: "tensor(float)"}
ATTRIBUTE_TYPES = {
    getattr(AttributeProto, name): getattr(OpSchema.AttrType, name)
    for name in ("INT", "INTS", "FLOAT", "FLOATS", "STRING")
}


def make_node(op_name: str, inputs: list[str], outputs: list[str], name: str = "", **choices: Any) -> onnx.NodeProto:
    """A node of a custom op with its attributes from `choices`."""
    return helper.make_node(op_name, inputs, outputs, name=name, domain=DOMAIN, **attributes(op_name, **choices))


def schema_of(op: Op) -> OpSchema:
    """The row of an op as an onnx schema with shape inference, so that onnx's own checker judges it."""
    inputs, outputs = (
        [OpSchema.FormalParameter(name, TYPE_NAMES[kind]) for name, kind in ports.items()]
        for ports in (op.inputs, op.outputs)
    )
    rows = [OpSchema.Attribute(name, ATTRIBUTE_TYPES[kind], doc) for name, (kind, doc) in op.attributes.items()]
    schema = OpSchema(op.name, DOMAIN, VERSION, op.doc, inputs=inputs, outputs=outputs, attributes=rows)
    schema.set_type_and_shape_inference_function(partial(_infer_in_onnx, op))
    return schema


def _infer_in_onnx(op: Op, context: Any) -> None:
    types = [context.get_input_type(i).tensor_type for i in range(len(op.inputs))]
    if not all(one.HasField("shape") for one in types):
        return
    shapes = [tuple(dim.dim_param or dim.dim_value for dim in one.shape.dim) for one in types]
    protos = {name: context.get_attribute(name) for name in op.attributes}
    values = {name: helper.get_attribute_value(value) for name, value in protos.items() if value is not None}
    for index, (kind, shape) in enumerate(op.infer(values, *shapes)):
        context.set_output_type(index, helper.make_tensor_type_proto(kind, shape))


def model_of(op_name: str, shapes: list[tuple[Any, ...]], **choices: Any) -> onnx.ModelProto:
    """A model of one node with the given input shapes (None: unknown), checked by onnx."""
    op = OPS[op_name]
    inferred = op.infer(attributes(op_name, **choices), *shapes)
    inputs = [helper.make_tensor_value_info(n, kind, s) for (n, kind), s in zip(op.inputs.items(), shapes, strict=True)]
    outputs = [helper.make_tensor_value_info(n, kind, s) for n, (kind, s) in zip(op.outputs, inferred, strict=True)]
    node = make_node(op_name, list(op.inputs), list(op.outputs), name="node", **choices)
    graph = helper.make_graph([node], op_name, inputs, outputs)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=[op.function()])
    onnx.checker.check_model(model, full_check=True)
    return model


def session_of(model: onnx.ModelProto, level: str = "ORT_ENABLE_ALL") -> Any:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options)


def run_everywhere(op_name: str, *arrays: np.ndarray, exact: bool = True, **choices: Any) -> Arrays:
    """Outputs of the NumPy reference, after onnxruntime at three levels and onnx.reference gave the same bytes.

    `exact=False` skips the comparison and returns onnxruntime's outputs (for ops that sum in float32).
    """
    model = model_of(op_name, [array.shape for array in arrays], **choices)
    feed = dict(zip(OPS[op_name].inputs, arrays, strict=True))
    runs = {level: session_of(model, level).run(None, feed) for level in LEVELS}
    with np.errstate(invalid="ignore"):
        runs["onnx.reference"] = ReferenceEvaluator(model).run(None, feed)
    reference = OPS[op_name].numpy(*arrays, **attributes(op_name, **choices))
    for where, outputs in runs.items():
        for name, expected, output in zip(OPS[op_name].outputs, reference, outputs, strict=True):
            assert (output.dtype, output.shape) == (expected.dtype, expected.shape), (where, name)
            if exact:
                np.testing.assert_array_equal(output, expected, err_msg=f"{op_name}.{name} in {where}, {choices}")
    return reference if exact else tuple(runs["ORT_ENABLE_ALL"])
