"""The kernel library's attention of codes against the op of the dialect, on each instruction set of this processor."""

import platform

import numpy as np
import onnx_ir as ir
import pytest

from export.dialect.graph import in_order, new_node, result_of
from export.dialect.ops import DOMAIN, OPS, attributes
from export.errors import ContractError
from export.formats.attention import AttentionFormats
from pipeline.backends.cpu.quantized_attention import OP, OPERANDS, U8, UseQuantizedAttention, attention_nodes
from pipeline.backends.cpu.token_chain import VERSION
from pipeline.backends.sizes import evaluated
from pipeline.verify.attention_oracle import AttentionNumbers, AttentionProbe, check_attention
from plugins.cpu import library
from tests.kernels.test_native_packed_gemm import VARIANTS, kernels, variant  # noqa: F401
from tests.support import native
from tests.support.attentions import FORMATS, Operands, operands

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
    assert len(results) > 1 or platform.machine() != "x86_64"
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
    with pytest.raises(Exception, match="AttentionOperands: no keys") as caught:
        attend(none, formats)
    assert type(caught.value).__module__.startswith("onnxruntime")


@pytest.mark.parametrize("op", [OPERANDS, OP])
@pytest.mark.parametrize("kmax", [0.0, 128.0, np.nan])
def test_a_format_that_is_no_byte_is_refused(op, kmax):
    first, second = nodes(AttentionFormats("INT8", "INT8"))
    node = first if op == OPERANDS else second
    node.attributes["pv_kmax"] = ir.AttrFloat32("pv_kmax", float(kmax))
    with pytest.raises(Exception, match="kmax must be 1 to 127"):
        native.session(of_node(node))


# --- bytes that are kept ---------------------------------------------------------------------------------------------


def nodes(formats, scale=0.125):
    """AttentionOperands and QuantizedAttention, each to stand in a graph of its own."""
    values = [ir.Value(name=port, type=FLOAT) for port in PORTS]
    first, second = attention_nodes(values, "a", choices(formats, scale), {})
    ir.convenience.replace_all_uses_with(result_of(first), ir.Value(name="operands", type=U8))
    second.outputs[0].name, second.outputs[0].type = "out", FLOAT
    return first, second


def of_node(node):
    imports = {"": 21, library.DOMAIN: VERSION}
    graph = ir.Graph(list(node.inputs), node.outputs, nodes=[node], opset_imports=imports, name="g")
    return ir.Model(graph, ir_version=10)


def kept(tensors, formats):
    return native.run(of_node(nodes(formats)[0]), {"k": tensors.k, "v": tensors.v})[0]


def attend_to(kept_bytes, tensors, formats):
    feeds = {"q": tensors.q, "operands": kept_bytes, "mask": tensors.mask}
    return native.run(of_node(nodes(formats)[1]), feeds)[0]


def beginning_at(place, shape, dtype):
    """An array so many bytes behind a line of the cache."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(count + 128, np.uint8)
    start = -memory.ctypes.data % 64 + place
    return memory[start : start + count].view(dtype).reshape(shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_that_are_kept_give_the_same_numbers_wherever_they_begin_with_odd_shapes(shape, variant):  # noqa: F811
    tensors, formats = operands(*shape, mask="penalty"), AttentionFormats("E2M3", "INT8")
    expected, given = attend(tensors, formats), kept(tensors, formats)
    np.testing.assert_array_equal(attend_to(given, tensors, formats), expected)
    for place in (0, 1, 4):
        elsewhere = beginning_at(place, given.shape, np.uint8)
        elsewhere[...] = given
        np.testing.assert_array_equal(attend_to(elsewhere, tensors, formats), expected)


@pytest.mark.parametrize("place", [0, 1, 4])
def test_bytes_are_written_wherever_a_caller_has_room_and_one_set_of_them_has_odd_shapes(place):
    tensors, formats = operands(2, 3, 7, 5, 72), AttentionFormats("E2M3", "INT8")
    expected = kept(tensors, formats)
    session, room = native.session(of_node(nodes(formats)[0])), beginning_at(place, expected.shape, np.uint8)
    binding = session.io_binding()
    for name in ("k", "v"):
        binding.bind_cpu_input(name, getattr(tensors, name))
    binding.bind_output("a/operands", "cpu", 0, np.uint8, room.shape, room.ctypes.data)
    session.run_with_iobinding(binding)
    np.testing.assert_array_equal(room, expected)


@pytest.mark.parametrize("size", [1, 8, 33, 72])
@pytest.mark.parametrize("keys", [1, 7, 16, 17, 120])
def test_the_graph_says_how_many_bytes_there_are(keys, size):
    tensors = operands(1, 2, 3, keys, size)
    for declared, sizes in (("tokens", {"tokens": keys}), (keys, {})):
        k = ir.Value(name="k", type=FLOAT, shape=ir.Shape(["batch", 2, declared, size]))
        v = ir.Value(name="v", type=FLOAT)
        first, _ = attention_nodes([None, k, v, None], "a", choices(AttentionFormats("INT8", "INT8")), {})
        batch, heads, head = first.outputs[0].shape
        assert (batch, heads) == ("batch", 2)
        assert kept(tensors, AttentionFormats("INT8", "INT8")).shape[2] == evaluated(str(head), sizes)


@pytest.mark.parametrize("shape", [None, ["batch", 2, None, 8], ["batch", 2, "tokens", "size"], ["batch", 2, "a b", 8]])
def test_sizes_that_nobody_knows_are_not_made_up(shape):
    k = ir.Value(name="k", type=FLOAT, shape=None if shape is None else ir.Shape(shape))
    first, _ = attention_nodes([None, k, k, None], "a", choices(AttentionFormats("INT8", "INT8")), {})
    made = first.outputs[0].shape
    assert made is None if shape is None else list(made)[:2] == ["batch", 2] and getattr(made[2], "value", 0) is None


def test_bytes_are_fewer_than_the_numbers_that_they_are_made_of():
    tensors = operands(2, 16, 1, 120, 72)
    ratio = kept(tensors, AttentionFormats("E2M3", "E2M3")).nbytes / (tensors.k.nbytes + tensors.v.nbytes)
    assert 1 / 4 < ratio < 0.3


def place(array, at, value, dtype):
    """`value` in the label of the last head."""
    array[-1, -1, at : at + np.dtype(dtype).itemsize] = np.array([value], dtype).view(np.uint8)


DAMAGES = {
    "name": (lambda x: x.__setitem__((0, 0, 0), 0), "do not begin with FPQHEAD1"),
    "version": (lambda x: x.__setitem__((0, 0, 7), ord("2")), "do not begin with FPQHEAD1"),
    "no keys": (lambda x: x[:1, :1].__setitem__((0, 0, slice(8, 16)), 0), "operands of 0 keys are damaged"),
    "many keys": (lambda x: x.__setitem__((0, 0, 15), 127), "keys are damaged: 1 to 65793"),
    "other keys": (lambda x: x.__setitem__((0, 0, 8), 30), "bytes a head, of 30 keys there are"),
    "channels": (lambda x: x.__setitem__((0, 0, 16), 17), "operands of 17 channels for queries of 16"),
    "format of keys": (lambda x: x.__setitem__((0, 0, 30), 0), "another format, with qk_kmax"),
    "format of values": (lambda x: x.__setitem__((0, 0, 42), 0), "another format, with pv_kmax"),
    "last head's": (lambda x: place(x, 8, 39, np.int64), "head 1 of 2 is damaged"),
    "rest of a label": (lambda x: place(x, 63, 1, np.uint8), "head 1 of 2 is damaged"),
}


def test_no_samples_give_no_result_whatever_the_mask():
    tensors, formats = operands(1, 2, 3, 5, 16), AttentionFormats("INT8", "INT8")
    none = tensors._replace(q=tensors.q[:0], mask=np.zeros((1, 1, 1, 5), np.float32))
    assert attend_to(kept(tensors, formats)[:0], none, formats).shape == (0, 2, 3, 16)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_bytes_are_refused(damage):
    tensors, formats = operands(1, 2, 5, 40, 16), AttentionFormats("INT8", "INT8")
    given, (plant, said) = kept(tensors, formats), DAMAGES[damage]
    plant(given)
    with pytest.raises(Exception, match=said):
        attend_to(given, tensors, formats)


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        (lambda x: x[:, :, :-64], "bytes a head, of 40 keys there are"),
        (lambda x: x[:, :, :40], "operands of 40 bytes a head, fewer than the 64"),
        (lambda x: x[:, :, :0], "operands of 0 bytes a head"),
        (lambda x: x[:, :1], r"operands must be \[samples, heads, bytes\]"),
        (lambda x: x[0], r"operands must be \[samples, heads, bytes\]"),
    ],
)
def test_damaged_bytes_of_another_shape_are_refused(cut, said):
    tensors, formats = operands(1, 2, 5, 40, 16), AttentionFormats("INT8", "INT8")
    with pytest.raises(Exception, match=said):
        attend_to(np.ascontiguousarray(cut(kept(tensors, formats))), tensors, formats)


def test_bytes_of_another_format_that_do_not_fit_are_refused_by_name():
    tensors = operands(1, 2, 5, 40, 16)
    given = kept(tensors, AttentionFormats("E2M3", "INT8"))
    with pytest.raises(Exception, match=r"another format, with qk_max_value 7\.5 where this attention has 127"):
        attend_to(given, tensors, AttentionFormats("INT8", "INT8"))


@pytest.mark.parametrize("op", [OPERANDS, OP])
def test_a_result_that_nobody_reads_is_left_out(op):
    tensors, formats = operands(1, 2, 5, 40, 16), AttentionFormats("INT8", "INT8")
    first, second = nodes(formats)
    node = first if op == OPERANDS else second
    model, read = of_node(node), node.inputs[-1]
    node.outputs[0].name = ""
    other = ir.Node("", "Neg", [read], name="other")
    other.outputs[0].name, other.outputs[0].type = "y", FLOAT
    model.graph.append(other)
    model.graph.outputs[:] = other.outputs
    feeds = tensors._asdict() | {"operands": kept(tensors, formats)}
    (y,) = native.run(model, {value.name: feeds[value.name] for value in model.graph.inputs})
    np.testing.assert_array_equal(y, -feeds[read.name])


def test_no_samples_and_no_queries_do_not_need_any_bytes():
    tensors, formats = operands(1, 2, 5, 40, 16), AttentionFormats("INT8", "INT8")
    none = Operands(tensors.q[:0], tensors.k[:0], tensors.v[:0], np.zeros((1, 1, 1, 1), np.float32))
    given = kept(none, formats)
    assert given.shape == (0, 2, kept(tensors, formats).shape[2])
    assert attend_to(given, none, formats).shape == (0, 2, 5, 16)
    assert attend_to(kept(tensors, formats), tensors._replace(q=tensors.q[:, :, :0]), formats).shape == (1, 2, 0, 16)


@pytest.mark.parametrize(
    ("k", "v", "said"),
    [
        ((1, 2, 3, 4), (1, 2, 4, 4), "k and v must have the same shape"),
        ((2, 3, 4), (2, 3, 4), "k and v must be"),
        ((1, 2, 3, 0), (1, 2, 3, 0), "k has no channels"),
    ],
)
def test_keys_and_values_that_do_not_fit(k, v, said):
    model = of_node(nodes(AttentionFormats("INT8", "INT8"))[0])
    with pytest.raises(Exception, match=said):
        native.run(model, {"k": np.zeros(k, np.float32), "v": np.zeros(v, np.float32)})
