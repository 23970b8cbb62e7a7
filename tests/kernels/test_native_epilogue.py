"""The epilogue of PackedGemm gives the bits of a TokenChain behind its product, on every instruction set."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest

from export.dialect.graph import GraphBuilder
from pipeline.backends.cpu import token_chain
from pipeline.backends.cpu.native_ports import connect, ports_out
from pipeline.backends.cpu.packed_gemm import Out, packed_gemm
from pipeline.backends.cpu.token_chain import VERSION, Activation, chain_node, drop_unread_outputs
from plugins.cpu.library import DOMAIN
from tests.kernels.test_native_packed_gemm import LAYERS, feeds_of, linear, operands, variant
from tests.support import native

pytestmark = pytest.mark.kernels
__all__ = ["variant"]
GELU, SILU = Activation.GELU, Activation.SILU


@dataclass(frozen=True)
class Stages:
    """What follows a linear of n channels, for samples of tokens. ports: inputs of its stages; heads: 0 for none.
    row_gates: has every row a gate of its own?"""

    n: int
    samples: int
    tokens: int
    ports: str
    activation: Activation = Activation.NONE
    heads: int = 0
    row_gates: bool = False

    def inputs(self) -> dict[str, np.ndarray]:
        """Arrays by port; one token's scale is NaN, another's residual infinite."""
        rng, whole = np.random.default_rng(self.n), (self.samples, self.tokens, self.n)
        gates = whole if self.row_gates else (self.samples, 1, self.n)
        shapes = {"TOKEN_SCALE": (*whole[:2], 1), "BIAS": whole[2:], "GATE": gates, "RESIDUAL": whole}
        arrays = {port: rng.standard_normal(shapes[port]).astype(np.float32) for port in self.ports.split("+")}
        if "TOKEN_SCALE" in arrays and self.tokens > 2:
            arrays["TOKEN_SCALE"][-1, 1] = np.nan
        if "RESIDUAL" in arrays and self.tokens > 2:
            arrays["RESIDUAL"][0, 2, ::3] = np.inf
        return arrays


# Rows beyond those that are finished together, channels beyond a panel, heads that a panel straddles or holds.
EPILOGUES = [
    Stages(33, 1, 70, "TOKEN_SCALE+BIAS"),
    Stages(16, 2, 65, "TOKEN_SCALE+BIAS", activation=GELU),
    Stages(7, 3, 5, "TOKEN_SCALE+BIAS+GATE+RESIDUAL", activation=GELU),
    Stages(100, 2, 67, "TOKEN_SCALE+BIAS+GATE+RESIDUAL"),
    Stages(144, 2, 66, "TOKEN_SCALE+BIAS", heads=2),
    Stages(60, 3, 3, "TOKEN_SCALE+BIAS", heads=20),
    Stages(35, 1, 1, "TOKEN_SCALE+BIAS+GATE+RESIDUAL", activation=GELU, heads=35),
    Stages(40, 2, 65, "TOKEN_SCALE+BIAS", activation=SILU),
    Stages(33, 2, 66, "TOKEN_SCALE+BIAS+GATE+RESIDUAL", activation=SILU, row_gates=True),
]
OTHERS = [
    Stages(48, 2, 9, "TOKEN_SCALE"),
    Stages(17, 2, 9, "BIAS"),
    Stages(17, 2, 9, "GATE"),
    Stages(17, 2, 9, "GATE", activation=SILU, row_gates=True),
    Stages(32, 3, 7, "GATE", activation=GELU, row_gates=True),
    Stages(32, 1, 130, "RESIDUAL", activation=GELU),
    Stages(18, 1, 0, "TOKEN_SCALE+BIAS+GATE+RESIDUAL", activation=GELU),
    Stages(18, 2, 0, "TOKEN_SCALE+BIAS", heads=3),
]


def both(gemm, operand, stages):
    """A graph of a GEMM with these stages, and of a TokenChain that reads its product: LINEAR and Y of both."""
    given = {name: ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT)) for name in stages.inputs()}
    inputs = [*operand.codes, *([] if operand.scale is None else [operand.scale]), *given.values()]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": 21, DOMAIN: VERSION}, name="g")
    end = ir.Node("", "Identity", [operand.x], name="end")
    graph.append(end)
    build = GraphBuilder(graph, end, "a")
    product, fused = packed_gemm(build, gemm, operand)
    node = fused.producer()
    numbers = {"activation": stages.activation, "heads_out": stages.heads}
    connect(node, given, numbers)
    node.outputs[Out.Y].name = "y"
    ports = {token_chain.In[name]: value for name, value in given.items()} | {token_chain.In.X: product.value}
    chain = chain_node(build, ports, "chain", **numbers)
    for port in (token_chain.Out.LINEAR, token_chain.Out.Y):
        chain.outputs[port].name, chain.outputs[port].type = f"chain/{port.name}", fused.type
    graph.remove(end)
    graph.outputs.extend([fused, node.outputs[Out.Y], *(ports_out(chain)[name] for name in ("LINEAR", "Y"))])
    model = ir.Model(graph, ir_version=10)
    drop_unread_outputs(model)
    return model


def compare(layer, stages):
    gemm = linear(*layer, stages.n, 64)
    operand, codes, scales = operands(gemm, max(1, stages.samples * stages.tokens))
    rows = stages.samples * stages.tokens
    codes = [code[:rows].reshape(stages.samples, stages.tokens, 64) for code in codes]
    given = feeds_of(codes, None if scales is None else scales[:rows]) | stages.inputs()
    linear_, y, chain_linear, chain_y = native.run(both(gemm, operand, stages), given)
    assert linear_.shape == (stages.samples, stages.tokens, stages.n)
    np.testing.assert_array_equal(linear_, chain_linear)
    np.testing.assert_array_equal(y, chain_y)
    return linear_, y


# One limb and two, 4 bits and bytes, groups of the weight and of tokens: two with each list of stages.
KINDS = [LAYERS[place] for place in (1, 6, 8, 12, 18)]
PAIRS = [(KINDS[(place + step) % len(KINDS)], stages) for place, stages in enumerate(EPILOGUES) for step in (0, 2)]


@pytest.mark.parametrize("layer, stages", PAIRS, ids=str)
def test_every_stage_has_the_bits_of_the_chain(variant, layer, stages):
    compare(layer, stages)


@pytest.mark.parametrize("stages", OTHERS, ids=str)
def test_stages_may_be_left_out_and_rows_be_none(stages):
    compare(LAYERS[1], stages)


def test_only_a_token_that_is_not_finite_becomes_so():
    linear_, y = compare(LAYERS[1], EPILOGUES[3])
    expected = np.ones(linear_.shape[:2], bool)
    expected[-1, 1] = False
    np.testing.assert_array_equal(np.isfinite(linear_).all(-1), expected)
    expected[0, 2] = False
    np.testing.assert_array_equal(np.isfinite(y).all(-1), expected)


WRONG = {
    "token_scale must have one number a row": {"TOKEN_SCALE": (2, 4)},
    "bias must have one number a channel": {"BIAS": (17,)},
    "residual must have the shape": {"RESIDUAL": (2, 1, 16)},
    "gate must be": {"GATE": (3, 1, 16)},
}


@pytest.mark.parametrize("message", WRONG)
def test_shapes_that_do_not_fit_are_an_error(message):
    ((port, shape),) = WRONG[message].items()
    gemm, stages = linear(*LAYERS[1], 16, 64), Stages(16, 2, 5, port)
    operand, codes, _ = operands(gemm, 10)
    with pytest.raises(Exception, match=message) as caught:
        native.run(both(gemm, operand, stages), {"h": codes[0].reshape(2, 5, -1), port: np.ones(shape, np.float32)})
    assert type(caught.value).__module__.startswith("onnxruntime")


def test_heads_that_do_not_divide_the_channels_are_an_error():
    gemm = linear(*LAYERS[1], 16, 64)
    operand, codes, _ = operands(gemm, 10)
    stages = Stages(16, 2, 5, "BIAS", heads=3)
    with pytest.raises(Exception, match="heads_out must divide"):
        native.run(both(gemm, operand, stages), {"h": codes[0].reshape(2, 5, -1)} | stages.inputs())
