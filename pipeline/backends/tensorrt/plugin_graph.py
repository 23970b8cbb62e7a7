"""A graph of fused ops -> the graph for TensorRT's parser: each fused op a node that its plugin answers to.

The fused ops are those of `fused.ops`, with function bodies in standard ops, so that stock onnxruntime runs the
graph that is verified. Here each becomes a node of the same kernel without a body, since a parser prefers bodies to
plugins: outputs that only a parity gate reads are dropped, codes are the kernels' operand bytes, and bytes are int8,
which the builder keeps as bytes (it widens uint8 to 32 bits).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import NodeProto, TensorProto, helper

from export.errors import ContractError
from pipeline.backends.fused.lower import GROUPS_REFUSED, takes_integers
from pipeline.backends.fused.ops import DOMAIN, EPILOGUE_OF, OPERANDS_KEY, OPS, PORTS
from plugins.gpu import table
from plugins.gpu.spec import Before, GemmSpec, QuantizeSpec

# Fused quantizer -> what it does first.
FUSED_QUANTIZERS: dict[str, Before] = {
    "Quantize": "none",
    "GeluQuantize": "gelu",
    "NormModulateQuantize": "norm_modulate",
}
GEMM = "packed_gemm"
# Input of a fused op -> argument of its kernel, where the two differ.
RENAMED = {port: argument for argument, port in PORTS.items()} | {"gain": "scale"}
STATIC_REFUSED = (
    "plugins quantize with one scale per token, a constant one is not theirs; use --target rtx --set rtx.path=tensorrt"
)
# Scaling of activations -> why no plugin takes it.
SCALINGS_REFUSED = {"token_group": GROUPS_REFUSED, "per_tensor": STATIC_REFUSED}
RowRange = tuple[int, int, int]
# Rows where the graph does not tell a tensor's shape.
UNKNOWN_ROWS: RowRange = (1, 1024, 65536)


@dataclass(frozen=True)
class KernelNode:
    """One plugin of the graph: name of its node, kernel of the table, spec, smallest, usual and most rows."""

    name: str
    kernel: str
    spec: GemmSpec | QuantizeSpec
    rows: RowRange

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the kernel's input arguments, in order."""
        return tuple(argument.name for argument in table.kernel(self.kernel).inputs(self.spec))

    @property
    def weight_bytes(self) -> int:
        """Bytes of its packed weight; 0 for a quantizer."""
        return self.spec.in_features * self.spec.out_features // 2 if isinstance(self.spec, GemmSpec) else 0


def plugin_graph(
    model: onnx.ModelProto,
    bounds: Mapping[str, Sequence[Sequence[int]]],
    plugin: Callable[[KernelNode], tuple[str, dict[str, object]]],
    integers: bool = False,
) -> list[KernelNode]:
    """Turn the fused ops of `model` into plugin nodes, in place; its weights may stay in their file.

    bounds: input -> (smallest, usual, largest) shape. plugin: name of a node's plugin, and the attributes that rebuild
    it. integers: whether codes are INT8 where the lowering left that to the GPU. Raises ContractError for an op
    without a plugin.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    rows, channels = _rows(model, bounds), _channels(model)
    kernel_nodes = []
    for node in model.graph.node:
        if node.domain == DOMAIN:
            kernel = _kernel_node(node, constants, channels, rows, integers)
            _rewrite(node, kernel, constants)
            node.op_type, attributes = plugin(kernel)
            node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
            kernel_nodes.append(kernel)
    _clean(model)
    return kernel_nodes


def _kernel_node(
    node: NodeProto,
    constants: Mapping[str, TensorProto],
    channels: Mapping[str, int],
    rows: Mapping[str, RowRange],
    preferred: bool,
) -> KernelNode:
    attributes: dict[str, Any] = {item.name: _plain(helper.get_attribute_value(item)) for item in node.attribute}
    inputs, outputs = _ports(node)
    chosen = {item.key: item.value for item in node.metadata_props}.get(OPERANDS_KEY)
    attributes["integers"] = takes_integers(chosen, preferred)
    if node.op_type in FUSED_QUANTIZERS:
        before = FUSED_QUANTIZERS[node.op_type]
        extra = {key: attributes[key] for key in ("epsilon", "integers") if key in attributes}
        spec = QuantizeSpec(attributes["format"], channels[outputs["codes"]], before, "fp32", **extra)
        return KernelNode(node.name, table.QUANTIZER_OF[before], spec, rows.get(inputs["x"], UNKNOWN_ROWS))
    if node.op_type not in EPILOGUE_OF:
        raise ContractError(f"{node.name} ({node.op_type}) has no plugin; use --target rtx --set rtx.path=tensorrt")
    gemm = GemmSpec(
        attributes["activation_format"],
        attributes["weight_format"],
        in_features=attributes["in_features"],
        out_features=constants[inputs["codes"]].dims[0],
        group_size=attributes["group_size"],
        multipliers=tuple(attributes["multipliers"]),
        real_groups=constants[inputs["w_scales"]].dims[1] > 1,
        epilogue=EPILOGUE_OF[node.op_type],
        output="fp32",
        integers=attributes["integers"],
    )
    return KernelNode(node.name, GEMM, gemm, rows.get(inputs["a_codes"], UNKNOWN_ROWS))


def _plain(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def _ports(node: NodeProto) -> tuple[dict[str, str], dict[str, str]]:
    """Inputs and outputs of a fused op: tensors by the names of its row."""
    row = OPS[node.op_type]
    return dict(zip(row.inputs, node.input, strict=True)), dict(zip(row.outputs, node.output, strict=True))


def _rewrite(node: NodeProto, kernel: KernelNode, constants: Mapping[str, TensorProto]) -> None:
    """Inputs in the kernel's order, no outputs that only a parity gate reads, no attributes, bytes as int8."""
    inputs, outputs = _ports(node)
    arguments = {RENAMED.get(name, name): value for name, value in inputs.items()}
    _check_multipliers(kernel, constants.get(arguments.get("multiplier_codes", "")))
    del node.input[:], node.output[:], node.attribute[:]
    node.input.extend(arguments[name] for name in kernel.inputs)
    node.output.extend(value for name, value in outputs.items() if name not in OPS[node.op_type].proof)
    for name in node.input:
        if name in constants and constants[name].data_type == TensorProto.UINT8:
            constants[name].data_type = TensorProto.INT8  # the same bytes


def _check_multipliers(kernel: KernelNode, codes: TensorProto | None) -> None:
    """A kernel reads one row of indices for each channel."""
    if codes is None or "multiplier_codes" not in kernel.inputs or not isinstance(kernel.spec, GemmSpec):
        return
    if codes.dims[0] != kernel.spec.out_features:
        raise ContractError(
            f"{kernel.name}: multiplier indices of shape {list(codes.dims)}; a kernel reads a row for each of "
            f"{kernel.spec.out_features} channels, export the model again"
        )


def _clean(model: onnx.ModelProto) -> None:
    """No function bodies, no types of tensors in between (codes are int8 now), no constant that only bodies read."""
    del model.functions[:], model.graph.value_info[:]
    read = {name for node in model.graph.node for name in node.input} | {item.name for item in model.graph.output}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _channels(model: onnx.ModelProto) -> dict[str, int]:
    """Codes -> input channels of the GEMMs that read them."""
    gemms = [node for node in model.graph.node if node.domain == DOMAIN and node.op_type in EPILOGUE_OF]
    return {_ports(node)[0]["a_codes"]: next(a.i for a in node.attribute if a.name == "in_features") for node in gemms}


def _rows(model: onnx.ModelProto, bounds: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, RowRange]:
    """Name of a tensor -> rows at the smallest, usual and largest inputs, wherever the graph tells its shape."""
    symbols = {
        dim.dim_param: column
        for value in model.graph.input
        for dim, column in zip(value.type.tensor_type.shape.dim, zip(*bounds[value.name], strict=True), strict=True)
        if dim.dim_param
    }
    values = [value for value in (*model.graph.input, *model.graph.value_info) if value.type.tensor_type.shape.dim]
    dims_of = {value.name: [_bounds(dim, symbols) for dim in value.type.tensor_type.shape.dim[:-1]] for value in values}
    rows = {
        name: [math.prod(column) for column in zip(*dims, strict=True)] for name, dims in dims_of.items() if all(dims)
    }
    return {name: (low, usual, high) for name, (low, usual, high) in ((n, r) for n, r in rows.items() if len(r) == 3)}


def _bounds(dim: onnx.TensorShapeProto.Dimension, symbols: Mapping[str, RowRange]) -> RowRange | None:
    return (dim.dim_value,) * 3 if dim.HasField("dim_value") else symbols.get(dim.dim_param)
