"""Small graphs of the `fpq` dialect after packing, for tests of the `rtx` target."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.dialect import ops
from export.formats.format import fold_negative_zero, get_format, pack
from export.formats.operands import exact_multipliers
from tests.support.op_models import make_node


@dataclass(frozen=True)
class Linear:
    """One packed linear: formats, sizes, and whether its groups have real scales or multipliers."""

    layer: str
    in_features: int = 64
    out_features: int = 48
    activation: str = "E2M3"
    weight: str = "E2M1"
    group_size: int = 0
    real_groups: bool = False
    with_bias: bool = True
    seed: int = 0

    @property
    def multipliers(self) -> tuple[int, ...]:
        return exact_multipliers(self.weight) if self.group_size and not self.real_groups else (1,)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Initializers: packed codes, scales, packed multiplier indices, bias; random from the seed."""
        rng, fmt = np.random.default_rng(self.seed), get_format(self.weight)
        n, k, groups = self.out_features, self.in_features, self.in_features // (self.group_size or self.in_features)
        codes = rng.integers(0, 2**fmt.bits, (n, k), dtype=np.uint8)
        codes = np.where(np.abs(fmt.values[codes]) > fmt.max_value, 0, codes)  # INT4 has -8, which no quantizer emits
        scales = rng.uniform(0.01, 0.05, (n, groups if self.real_groups else 1)).astype(np.float32)
        indices = rng.integers(0, len(self.multipliers), (n, groups), dtype=np.uint8)
        bias = rng.normal(size=n) if self.with_bias else np.zeros(n)
        return {
            "codes": pack(fold_negative_zero(fmt, codes.astype(np.uint8)), fmt.bits),
            "scales": scales,
            "multipliers": pack(indices, 4),
            "bias": bias.astype(np.float32),
        }

    def choices(self) -> dict[str, Any]:
        """Arguments of `ops.attributes("PackedGemm")`."""
        return {
            "layer": self.layer,
            "activation_format": self.activation,
            "weight_format": self.weight,
            "in_features": self.in_features,
            "group_size": self.group_size,
            "multipliers": self.multipliers,
        }


@dataclass
class Graph:
    """Collects nodes and initializers; `model` closes it. Inputs are float32 [B, S, K]."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)

    def quantize(self, x: str, format_name: str, name: str) -> tuple[str, str]:
        outputs = [f"{name}/codes", f"{name}/scale"]
        self.nodes.append(make_node("QuantizeActivation", [x], outputs, name=name, format=format_name))
        return outputs[0], outputs[1]

    def quantize_static(self, x: str, format_name: str, name: str, scale: float, zero: float = 0.0) -> tuple[str, str]:
        constants = {f"{name}/scale": scale, f"{name}/zero": zero}
        self.initializers += [numpy_helper.from_array(np.float32([value]), key) for key, value in constants.items()]
        self.nodes.append(
            make_node("QuantizeStatic", [x, *constants], [f"{name}/codes"], name=name, format=format_name)
        )
        return f"{name}/codes", f"{name}/scale"

    def norm_quantize(self, x: str, format_name: str, name: str) -> tuple[str, str]:
        outputs = [f"{name}/codes", f"{name}/scale"]
        choices = {"format": format_name, "epsilon": 1e-6}
        self.nodes.append(make_node("NormModulateQuantize", [x, "shift", "scale"], outputs, name=name, **choices))
        return outputs[0], outputs[1]

    def linear(self, quantized: tuple[str, str], linear: Linear, output: str = "") -> str:
        arrays = linear.arrays()
        self.initializers += [numpy_helper.from_array(a, f"{linear.layer}.{key}") for key, a in arrays.items()]
        inputs = [*quantized, *(f"{linear.layer}.{key}" for key in arrays)]
        output = output or f"{linear.layer}/out"
        self.nodes.append(make_node("PackedGemm", inputs, [output], name=f"{linear.layer}/gemm", **linear.choices()))
        return output

    def op(self, op_type: str, *inputs: str, out: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, list(inputs), [out], name=f"{out}/{op_type}", **attributes))
        return out

    def model(self, width: int, outputs: dict[str, int], modulated: bool = False) -> onnx.ModelProto:
        f32 = TensorProto.FLOAT
        inputs = [helper.make_tensor_value_info("x", f32, ["batch", "tokens", width])]
        if modulated:
            inputs += [helper.make_tensor_value_info(n, f32, ["batch", 1, width]) for n in ("shift", "scale")]
        results = [helper.make_tensor_value_info(n, f32, ["batch", "tokens", w]) for n, w in outputs.items()]
        graph = helper.make_graph(self.nodes, "denoiser", inputs, results, self.initializers)
        used = {node.op_type for node in self.nodes if node.domain == ops.DOMAIN}
        imports = [helper.make_opsetid("", 21), helper.make_opsetid(ops.DOMAIN, ops.VERSION)]
        functions = [ops.OPS[name].function() for name in sorted(used)]
        return helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=10)


def single(linear: Linear) -> onnx.ModelProto:
    """x -> quantize -> one packed linear -> y."""
    graph = Graph()
    graph.linear(graph.quantize("x", linear.activation, f"{linear.layer}/quantize"), linear, "y")
    return graph.model(linear.in_features, {"y": linear.out_features})


def block(width: int = 64, activation: str = "E2M3", weight: str = "E2M1", group_size: int = 0) -> onnx.ModelProto:
    """A DiT-like block: norm-modulate, q, k and v that share a quantizer, fused attention, MLP with GELU, residuals."""
    graph, common = Graph(), {"activation": activation, "weight": weight, "group_size": group_size}
    quantized = graph.norm_quantize("x", activation, "norm1")
    q, k, v = (
        graph.linear(quantized, Linear(f"attn.to_{c}", width, width, seed=i, **common)) for i, c in enumerate("qkv")
    )
    scores = graph.op("MatMul", q, graph.op("Transpose", k, out="kt", perm=[0, 2, 1]), out="scores")
    mixed = graph.op("MatMul", graph.op("Softmax", scores, out="p", axis=-1), v, out="mixed")
    out = graph.linear(
        graph.quantize(mixed, activation, "attn.to_out/quantize"), Linear("attn.to_out", width, width, seed=3, **common)
    )
    hidden = graph.op("Add", "x", out, out="hidden")
    up = graph.linear(
        graph.norm_quantize(hidden, activation, "norm2"), Linear("ff.up", width, 2 * width, seed=4, **common)
    )
    act = graph.op("Gelu", up, out="act", approximate="tanh")
    down = graph.linear(
        graph.quantize(act, activation, "ff.down/quantize"), Linear("ff.down", 2 * width, width, seed=5, **common)
    )
    graph.op("Add", hidden, down, out="y")
    return graph.model(width, {"y": width}, modulated=True)
