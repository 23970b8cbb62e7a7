"""Small portable graphs with random quantized linears, for tests of passes and lowerings."""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import IdentityEliminationPass

from export.checkpoint import QuantizedLinear
from export.formats.format import encode, get_format, pack
from export.formats.operands import exact_multipliers
from export.quantize_graph import PLACEHOLDER, quantize_graph

HEADER = '<ir_version: 10, opset_import: ["" : 21, "fpq" : 1]>'


def make_linear(codes: np.ndarray, *, weight_format: str, **fields: object) -> QuantizedLinear:
    """QuantizedLinear from unpacked codes [N, K]."""
    packed = pack(codes, get_format(weight_format).bits)
    return QuantizedLinear(codes=packed, weight_format=weight_format, in_features=codes.shape[1], **fields)


def random_linear(
    name="a", n=16, k=64, weight="E2M1", activation="E2M3", granularity="per_channel", group=0, bias=True, seed=0
) -> QuantizedLinear:
    """A linear of random codes, scales, multipliers and bias."""
    rng = np.random.default_rng([seed, n, k])
    top = get_format(weight).max_value
    codes = encode(get_format(weight), rng.uniform(-top, top, (n, k)))
    groups = k // group if group else 1
    scales = rng.uniform(0.01, 0.1, (n, groups if granularity == "group" else 1)).astype(np.float32)
    table = exact_multipliers(weight, ("INT8", "E4M3"))
    multipliers = rng.choice(table, (n, groups)).astype(np.uint8) if granularity == "exact_group" else None
    return make_linear(
        codes,
        weight_format=weight,
        activation_format=activation,
        name=name,
        kind="other",
        granularity=granularity,
        group_size=group,
        scales=scales,
        multipliers=multipliers,
        bias=rng.standard_normal(n).astype(np.float32) if bias else None,
    )


def portable(
    body: str, layers: list[QuantizedLinear], inputs="float[B,S,64] x", outputs="float[B,S,16] y", inner=""
) -> ir.Model:
    """Graph text with `fpq.QuantizedLinear <layer="a"> (x)` placeholders -> portable model with those layers.

    inner: shapes of tensors in between, for example "float[B,S,64] h".
    """
    model = ir.from_onnx_text(f"{HEADER}\ng ({inputs}) => ({outputs}) {f'<{inner}>' if inner else ''} {{\n{body}\n}}")
    for node in [node for node in model.graph if node.op_type == PLACEHOLDER]:
        _copy_output(model.graph, node)
    quantize_graph(model, layers)
    IdentityEliminationPass()(model)
    return model


def _copy_output(graph: ir.Graph, node: ir.Node) -> None:
    """Let a placeholder's output leave the graph through an Identity, as an exporter's graph never has it leave."""
    output = node.outputs[0]
    if output.is_graph_output():
        copy = ir.Node("", "Identity", [output])
        copy.outputs[0].name, output.name = output.name, f"{output.name}_inner"
        copy.outputs[0].shape, copy.outputs[0].type = output.shape, output.type
        graph.outputs[graph.outputs.index(output)] = copy.outputs[0]
        graph.insert_after(node, copy)


def run(model: ir.Model, feeds: dict, outputs=None) -> list[np.ndarray]:
    """Run a model in stock onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    proto = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(proto, options, ["CPUExecutionProvider"]).run(outputs, feeds)


def op_types(model: ir.Model) -> list[str]:
    """Op types of the main graph in order, constants left out."""
    return [node.op_type for node in model.graph if node.op_type != "Constant"]


def activations(rng, tokens=5, k=64) -> np.ndarray:
    """[1, tokens, K]: Gaussian rows of many sizes, one with outliers, one of zeros, one tiny, one single element."""
    x = rng.standard_normal((1, tokens, k)) * np.exp(rng.uniform(-6, 6, (1, tokens, 1)))
    x[0, 0, :3] *= 1000
    x[0, 1] = 0
    x[0, 2] *= 1e-25 / np.abs(x[0, 2]).max()
    x[0, 3, 1:] = 0
    return x.astype(np.float32)
