"""A PackedGemm that quantizes its own rows gives the bits of a TokenChain behind it, whatever the threads do when."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest

from export.dialect.graph import GraphBuilder
from pipeline.backends.cpu import token_chain
from pipeline.backends.cpu.finish_with_chain import QuantizeInGemm
from pipeline.backends.cpu.native_ports import connect, ports_out
from pipeline.backends.cpu.packed_gemm import Out, packed_gemm
from pipeline.backends.cpu.token_chain import VERSION, Activation, chain_node, drop_unread_outputs
from plugins.cpu.library import DOMAIN
from tests.kernels.test_native_packed_gemm import LAYERS, feeds_of, linear, operands, variant
from tests.support import native

pytestmark = pytest.mark.kernels
__all__ = ["variant"]
FLOAT = ir.TensorType(ir.DataType.FLOAT)


@dataclass(frozen=True)
class Rows:
    """Samples of tokens of n channels that one PackedGemm makes. residual, norm: whether they have one. fmt, limbs: of
    the quantizer. read: outputs that others read, too. k: input channels; many make tasks of two panels."""

    n: int
    samples: int
    tokens: int
    activation: Activation = Activation.NONE
    residual: bool = False
    norm: bool = False
    fmt: str = "E2M3"
    limbs: int = 1
    read: tuple[str, ...] = ()
    k: int = 64

    def inputs(self) -> dict[str, np.ndarray]:
        """Arrays by port; one token's scale is NaN, another's residual infinite."""
        rng, whole = np.random.default_rng(self.n + self.tokens), (self.samples, self.tokens, self.n)
        shapes = {"TOKEN_SCALE": (*whole[:2], 1), "BIAS": whole[2:]}
        if self.residual:
            shapes["RESIDUAL"] = whole
        if self.norm:
            shapes |= {"NORM_SCALE": (self.samples, 1, self.n), "NORM_SHIFT": (self.samples, 1, self.n)}
        arrays = {port: rng.standard_normal(shape).astype(np.float32) for port, shape in shapes.items()}
        if self.tokens > 2:
            arrays["TOKEN_SCALE"][-1, 1] = np.nan
            if self.residual:
                arrays["RESIDUAL"][0, 2, ::3] = np.inf
        return arrays


def chained(gemm, operand, rows):
    """A graph of a GEMM, and of a TokenChain that quantizes its rows; what is read is an output."""
    given = {name: ir.Value(name=name, type=FLOAT) for name in rows.inputs()}
    inputs = [*operand.codes, *([] if operand.scale is None else [operand.scale]), *given.values()]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": 21, DOMAIN: VERSION}, name="g")
    end = ir.Node("", "Identity", [operand.x], name="end")
    graph.append(end)
    build = GraphBuilder(graph, end, "a")
    _, made = packed_gemm(build, gemm, operand)
    node = made.producer()
    connect(node, {port: value for port, value in given.items() if "NORM" not in port}, {"activation": rows.activation})
    if rows.activation or rows.residual:
        made = node.outputs[Out.Y]
        made.name, made.type = "y", FLOAT
    norm = {token_chain.In[port]: value for port, value in given.items() if "NORM" in port}
    numbers = native.quantizer(rows.fmt, rows.limbs) | ({"epsilon": 1e-6} if norm else {})
    chain = chain_node(build, {token_chain.In.X: made} | norm, "chain", **numbers)
    wanted = ["CODES", "SCALE", *(["LOW_CODES"] if rows.limbs == 2 else []), *rows.read]
    for name in wanted:
        if name != "Y":
            value = chain.outputs[token_chain.Out[name]]
            value.name, value.type = name, ir.TensorType(native.ELEMENT_TYPES.get(name, ir.DataType.FLOAT))
    graph.remove(end)
    graph.outputs.extend(made if name == "Y" else ports_out(chain)[name] for name in wanted)
    return ir.Model(graph, ir_version=10)


def compare(layer, rows, threads=2, runs=1):
    """Outputs of the op that quantizes, checked against those of two ops."""
    count = rows.samples * rows.tokens
    gemm = linear(*layer, rows.n, rows.k)
    operand, codes, scales = operands(gemm, max(1, count))
    codes = [code[:count].reshape(rows.samples, rows.tokens, rows.k) for code in codes]
    feeds = feeds_of(codes, None if scales is None else scales[:count]) | rows.inputs()
    model = chained(gemm, operand, rows)
    fused = model.clone()
    rewrite = QuantizeInGemm()
    rewrite(fused)
    assert rewrite.fired == 1 and not any(node.op_type == token_chain.OP for node in fused.graph)
    for each in (model, fused):
        drop_unread_outputs(each)
    expected = native.run(model, feeds)
    session = native.session(fused, threads=threads)
    for _ in range(runs):
        results = session.run(None, feeds)
        for result, of_two in zip(results, expected, strict=True):
            np.testing.assert_array_equal(result, of_two)
    return results


# Rows of no block, of one, and of more than are there at once; channels beyond a panel.
CASES = [
    Rows(33, 1, 0),
    Rows(33, 1, 1, activation=Activation.GELU),
    Rows(16, 2, 65, activation=Activation.GELU),
    Rows(100, 3, 86, residual=True, norm=True),
    Rows(48, 1, 256, activation=Activation.GELU, limbs=2, fmt="E3M4"),
    Rows(40, 1, 257, norm=True, read=("QUANTIZED",)),
    Rows(17, 5, 260, activation=Activation.SILU, fmt="INT8"),
    Rows(24, 2, 600, residual=True, read=("Y",)),
    Rows(416, 3, 250, activation=Activation.GELU, k=1152),  # 13 tasks for each of 3 blocks
    Rows(20, 1, 1100, residual=True, norm=True, limbs=2, fmt="E3M2", read=("QUANTIZED", "Y")),
]
KINDS = [LAYERS[place] for place in (1, 6, 8, 12, 18)]
PAIRS = [(KINDS[place % len(KINDS)], rows) for place, rows in enumerate(CASES)]


@pytest.mark.parametrize("layer, rows", PAIRS, ids=str)
def test_codes_are_those_of_the_chain(variant, layer, rows):
    compare(layer, rows)


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_no_order_of_threads_changes_those_of_the_chain(threads):
    compare(LAYERS[1], Rows(400, 2, 700, activation=Activation.GELU, k=1152), threads, runs=20)


def test_only_a_token_that_is_not_finite_becomes_so():
    _, scale = compare(LAYERS[1], CASES[3])
    expected = np.ones(scale.shape[:2], bool)
    expected[-1, 1] = expected[0, 2] = False
    np.testing.assert_array_equal(np.isfinite(scale[..., 0]), expected)


WRONG = {
    "a norm needs both": {"NORM_SHIFT": None},
    "norm_scale must be": {"NORM_SCALE": (3, 1, 16), "NORM_SHIFT": (3, 1, 16)},
    "norm_shift must have the shape": {"NORM_SHIFT": (16,)},
}


@pytest.mark.parametrize("message", WRONG)
def test_norms_that_do_not_fit_are_an_error(message):
    gemm, rows = linear(*LAYERS[1], 16, 64), Rows(16, 2, 5, norm=True)
    operand, codes, _ = operands(gemm, 10)
    model = chained(gemm, operand, rows)
    QuantizeInGemm()(model)
    drop_unread_outputs(model)
    (node,) = model.graph
    feeds = {"h": codes[0].reshape(2, 5, 64)} | rows.inputs()
    for port, shape in WRONG[message].items():
        if shape is None:
            connect(node, {port: None}, {})
        else:
            feeds[port] = np.ones(shape, np.float32)
    with pytest.raises(Exception, match=message):
        native.run(model, feeds)


def test_rows_in_heads_are_not_quantized():
    gemm, rows = linear(*LAYERS[1], 16, 64), Rows(16, 2, 5)
    operand, codes, _ = operands(gemm, 10)
    model = chained(gemm, operand, rows)
    QuantizeInGemm()(model)
    (node,) = model.graph
    connect(node, {}, {"heads_out": 2})
    with pytest.raises(Exception, match="rows in heads are not quantized"):
        native.run(model, {"h": codes[0].reshape(2, 5, 64)} | rows.inputs())
