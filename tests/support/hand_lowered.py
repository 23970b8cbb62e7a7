"""A small graph lowered by hand: quantized linears in a row, E2M3 activations, uint8 x int8 MatMulInteger."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.checkpoint import QuantizedLinear
from export.formats.format import encode, fold_negative_zero, get_format
from export.formats.operands import exact_multipliers
from pipeline.backends.base import LoweredGraph
from pipeline.passes.probes import Choice, ProbeRow
from tests.support.portable import make_linear

OFFSET = 64
# A float32 of 2^20 times the size of q is a multiple of q's rounding step in E2M3 (1 in units of the image below 16,
# doubling with every binade), so (q - c) + c rounds q to that step. (q + c) - c would not do just below 16 and 32:
# there the sum, but not c, reaches the next binade, and an odd c makes the result one step too small.
MAGIC = float(2**20)


def linear(name: str, out_features: int, in_features: int, seed: int, group_size: int = 32) -> QuantizedLinear:
    """A random layer in E2M1 with exact multipliers."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((out_features, in_features))
    groups = in_features // group_size
    multipliers = rng.choice(exact_multipliers("E2M1"), (out_features, groups)).astype(np.uint8)
    scales = (np.abs(weight).max(1, keepdims=True) / 30).astype(np.float32)
    fmt = get_format("E2M1")
    codes = fold_negative_zero(fmt, encode(fmt, weight / (scales * np.repeat(multipliers, group_size, 1))))
    fields = dict(kind="other", activation_format="E2M3", granularity="exact_group", group_size=group_size)
    bias = rng.standard_normal(out_features).astype(np.float32)
    return make_linear(
        codes, weight_format="E2M1", name=name, scales=scales, multipliers=multipliers, bias=bias, **fields
    )


def lower(layers: list[QuantizedLinear], path: Path) -> LoweredGraph:
    """The layers one after the other, as a graph with external data, and its probe rows."""
    nodes, weights, rows, x = [], [], [], "x"
    constants = {"max": 60.0, "floor": 1e-30, "magic": MAGIC, "least": 12 * MAGIC, "one": 1.0, "unit": 1 / 7.5}
    arrays = {name: np.float32(value) for name, value in constants.items()}
    arrays |= {"zero": np.uint8(OFFSET), "last": np.array([-1])}
    for layer in layers:
        added, tensors, row = _linear_nodes(layer, x)
        nodes, x = nodes + added, row.output
        arrays |= tensors
        rows.append(row)
    weights = [numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items()]
    nodes.append(helper.make_node("Identity", [x], ["sample"]))
    shapes = [["rows", layers[0].in_features], ["rows", layers[-1].out_features]]
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in zip(("x", "sample"), shapes, strict=True)
    ]
    graph = helper.make_graph(nodes, "hand", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=64)
    choices = tuple(Choice(row.layer, row.path, "by hand") for row in rows)
    return LoweredGraph(path, tuple(rows), choices)


# (op, inputs, output) of one linear; inputs in SHARED are the model's, the others the layer's.
STEPS = (
    ("Abs", ["x"], "abs"),
    ("ReduceMax", ["abs", "last"], "top"),
    ("Max", ["top", "floor"], "m"),
    ("Div", ["max", "m"], "inv"),
    ("Mul", ["inv", "magic"], "minv"),
    ("Mul", ["abs", "minv"], "grown"),
    ("Max", ["grown", "least"], "c"),
    ("Mul", ["abs", "inv"], "q"),
    ("Sub", ["q", "c"], "down"),
    ("Add", ["down", "c"], "r"),
    ("Sign", ["x"], "sign"),
    ("Mul", ["r", "sign"], "image"),
    ("QuantizeLinear", ["image", "one", "zero"], "u8"),
    ("Mul", ["m", "unit"], "scale"),
    ("MatMulInteger", ["u8", "weight", "zero"], "sum"),
    ("Cast", ["sum"], "gemm"),
    ("Mul", ["gemm", "channel"], "scaled"),
    ("Mul", ["scaled", "scale"], "product"),
    ("Add", ["product", "bias"], "y"),
)
SHARED = {"max", "floor", "magic", "least", "one", "zero", "unit", "last"}


def _linear_nodes(layer: QuantizedLinear, x: str) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray], ProbeRow]:
    name = layer.name
    nodes = []
    for op, short, output in STEPS:
        attributes = {"to": TensorProto.FLOAT} if op == "Cast" else {}
        inputs = [x if item == "x" else item if item in SHARED else f"{name}/{item}" for item in short]
        nodes.append(helper.make_node(op, inputs, [f"{name}/{output}"], name=f"{name}/{output}", **attributes))
    weight = np.ascontiguousarray(layer.integers().T.astype(np.int8))
    tensors = {f"{name}/weight": weight, f"{name}/channel": layer.scales[:, 0] / 16, f"{name}/bias": layer.bias}
    tensor = {key: f"{name}/{key}" for key in ("u8", "scale", "gemm", "y")}
    row = ProbeRow(
        name,
        "by hand",
        x,
        (tensor["u8"],),
        (1.0,),
        1.0,
        OFFSET,
        tensor["scale"],
        tensor["gemm"],
        1.0,
        None,
        True,
        tensor["y"],
    )
    return nodes, tensors, row
