"""The kernel library's attention of codes against the op of the dialect, on each instruction set of this processor."""

import numpy as np
import onnx_ir as ir
import pytest

from export.dialect.graph import in_order, new_node
from export.dialect.ops import DOMAIN, OPS, attributes
from export.errors import ContractError
from export.formats.attention import AttentionFormats
from pipeline.backends.cpu.finish_with_chain import UseQuantizedAttention
from pipeline.backends.cpu.token_chain import VERSION
from pipeline.verify.attention_oracle import AttentionNumbers, AttentionProbe, check_attention
from plugins.cpu import library
from tests.kernels.test_native_packed_gemm import VARIANTS, kernels, variant  # noqa: F401
from tests.support import native
from tests.support.attentions import FORMATS, operands

pytestmark = pytest.mark.kernels
FLOAT = ir.TensorType(ir.DataType.FLOAT)
PORTS = ("q", "k", "v", "mask")
# (batch, heads, queries, keys, channels): no multiple of anything, one of each, beyond a block of keys and of rows.
SHAPES = [(1, 1, 1, 1, 1), (2, 3, 7, 5, 72), (1, 2, 257, 33, 40), (1, 1, 30, 1100, 33), (3, 1, 9, 120, 64)]


def choices(formats, scale=0.125):
    return attributes(
        "QuantizedAttention", layer="a", qk_format=formats.qk, pv_format=formats.pv, scale=float(np.float32(scale))
    )


def attend(tensors, formats, scale=0.125):
    """By the kernel: the node of the dialect, lowered."""
    values = {port: ir.Value(name=port, type=FLOAT) for port in PORTS}
    node = new_node(DOMAIN, "QuantizedAttention", in_order(values, PORTS, "a"), "a", choices(formats, scale), 1, {})
    node.outputs[0].name, node.outputs[0].type = "out", FLOAT
    imports = {"": 21, library.DOMAIN: VERSION}
    graph = ir.Graph(list(values.values()), node.outputs, nodes=[node], opset_imports=imports, name="g")
    model = ir.Model(graph, ir_version=10)
    UseQuantizedAttention()(model)
    return native.run(model, dict(zip(PORTS, tensors, strict=True)))[0]


def reference(tensors, formats, scale=0.125):
    return OPS["QuantizedAttention"].numpy(*tensors, **choices(formats, scale))[0]


def off(tensors, formats, scale=0.125):
    """The kernel's largest error over what roundings, flipped codes included, may do."""
    probe = AttentionProbe(*tensors, attend(tensors, formats, scale))
    return check_attention(probe, AttentionNumbers(formats.qk, formats.pv, scale)).output_error


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_it_is_the_op_of_the_dialect_on_every_variant(shape, formats, variant):  # noqa: F811
    assert off(operands(*shape), formats) <= 1


@pytest.mark.parametrize("mask", ["penalty", "infinite", "partial"])
def test_masks(mask):
    assert off(operands(2, 2, 50, 130, 24, mask), AttentionFormats("E2M3", "INT8")) <= 1


# Panels of one to three vectors of queries, the last one not full; keys that end within each part of a panel; channels
# below and beyond a vector.
@pytest.mark.parametrize("shape", [(1, 2, 113, 702, 40), (2, 1, 300, 61, 72), (1, 1, 17, 9, 130), (1, 3, 49, 532, 7)])
@pytest.mark.parametrize("axes", [(), (3,), (2,), (2, 3), (0, 1, 2, 3)], ids=str)
def test_every_instruction_set_gives_the_same_bits(shape, axes):
    tensors, rng = operands(*shape), np.random.default_rng(7)
    sizes = [shape[axis] if axis in axes else 1 for axis in range(4)]
    mask = np.where(rng.random(sizes) < 0.2, -np.inf, rng.standard_normal(sizes)).astype(np.float32)
    tensors = tensors._replace(mask=mask)
    tensors.q[0, 0, 3, 2], tensors.q[-1, -1, -1, 0] = np.inf, np.nan
    force, results = kernels().packed_gemm_force, []
    try:
        for name in VARIANTS:
            if force(name.encode()):
                results.append(attend(tensors, AttentionFormats("E2M3", "INT8")))
    finally:
        force(None)
    assert results
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("pv", ["INT8", "E2M3", "INT6"])
@pytest.mark.parametrize("visible", [1, 2, 3, 16])
def test_weights_and_values_that_are_all_the_largest(variant, visible, pv):  # noqa: F811
    """In pairs of 16 bits: as many weights of 255 in each 16 keys as one run takes (128 * 255 < 2^15), or more."""
    tensors, formats = operands(1, 1, 9, 1100, 24), AttentionFormats("INT8", pv)
    mask = np.where(np.arange(1100) % 16 < visible, 0, -10000).astype(np.float32)
    mask[400:460], mask[1090:] = 0, 0  # heavy ones and light ones by turns
    tensors.q[...] = 0
    tensors.v[...] = np.where(np.arange(24) % 3 == 1, -3, 3)
    tensors.v[:, :, :, 2] *= np.where(np.arange(1100) % 4 < 2, 1, -1)
    tensors = tensors._replace(mask=mask[None, None, None])
    assert off(tensors, formats) <= 1
    light = attend(tensors._replace(q=tensors.q[:, :, :3]), formats)  # rows one by one
    np.testing.assert_array_equal(light, attend(tensors, formats)[:, :, :3])


def test_what_is_hidden_counts_for_nothing():
    formats = AttentionFormats("INT8", "INT8")
    tensors = operands(1, 1, 20, 70, 16, "infinite")
    hidden = np.isinf(tensors.mask[0, 0, 0])
    other = tensors._replace(v=np.where(hidden[:, None], -tensors.v, tensors.v))
    np.testing.assert_array_equal(attend(tensors, formats), attend(other, formats))


def test_queries_that_are_not_finite_or_have_no_key_are_nan_and_the_others_whole():
    tensors, formats = operands(1, 2, 8, 40, 16), AttentionFormats("INT8", "E2M3")
    tensors.q[0, 0, 3, 5], tensors.q[0, 1, 4, 0] = np.nan, np.inf
    mask = np.zeros((1, 1, 8, 40), np.float32)
    mask[0, 0, 6] = -np.inf
    tensors = tensors._replace(mask=mask)
    sick = np.zeros((1, 2, 8), bool)
    sick[0, 0, 3] = sick[0, 1, 4] = sick[0, :, 6] = True
    result, expected = attend(tensors, formats), reference(tensors, formats)
    assert np.isnan(result[sick]).all() and np.isfinite(result[~sick]).all()
    np.testing.assert_array_equal(np.isnan(result), np.isnan(expected))


@pytest.mark.parametrize("port", ["k", "v"])
@pytest.mark.parametrize("damage", [np.nan, np.inf])
def test_keys_and_values_that_are_not_finite_spoil_what_they_reach_and_no_other_head(port, damage):
    tensors, formats = operands(1, 2, 8, 40, 16), AttentionFormats("INT8", "INT8")
    getattr(tensors, port)[0, 1, 7, 2] = damage
    result, expected = attend(tensors, formats), reference(tensors, formats)
    assert np.isfinite(result[0, 0]).all()
    np.testing.assert_array_equal(np.isnan(result), np.isnan(expected))


def test_a_row_of_zeros_and_equal_scores():
    tensors, formats = operands(1, 1, 6, 30, 8), AttentionFormats("INT8", "INT8")
    tensors.q[0, 0, 2] = 0
    assert off(tensors, formats) <= 1


def test_an_attention_without_keys_is_refused_as_the_dialect_does():
    tensors, formats = operands(1, 2, 3, 4, 8), AttentionFormats("INT8", "INT8")
    none = tensors._replace(k=tensors.k[:, :, :0], v=tensors.v[:, :, :0], mask=np.zeros((1, 1, 1, 1), np.float32))
    with pytest.raises(ContractError, match="over 0 keys"):
        reference(none, formats)
    with pytest.raises(Exception, match="QuantizedAttention: no keys") as caught:
        attend(none, formats)
    assert type(caught.value).__module__.startswith("onnxruntime")


@pytest.mark.parametrize("kmax", [0.0, 128.0, np.nan])
def test_a_format_that_is_no_byte_is_refused(kmax):
    values = [ir.Value(name=port, type=FLOAT) for port in PORTS]
    grid = {f"{part}_{key}": 1.0 for part in ("qk", "pv") for key in ("max_value", "kmax", "rounding_factor")}
    options = grid | {"scale": 1.0, "absmax_floor": 1e-30, "pv_kmax": float(kmax)}
    node = new_node(library.DOMAIN, "QuantizedAttention", values, "a", options, 1, {})
    node.outputs[0].name, node.outputs[0].type = "out", FLOAT
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": 21, library.DOMAIN: VERSION}, name="g")
    tensors = operands(1, 1, 2, 3, 4)
    with pytest.raises(Exception, match="kmax must be 1 to 127"):
        native.run(ir.Model(graph, ir_version=10), dict(zip(PORTS, tensors, strict=True)))
