"""The kernel library's attention against float64, block by block, masks and damage included."""

import numpy as np
import onnx_ir as ir
import pytest

from pipeline.backends.cpu.token_chain import VERSION
from plugins.cpu.library import DOMAIN
from tests.support import native

pytestmark = pytest.mark.kernels
FLOAT = ir.TensorType(ir.DataType.FLOAT)
# (samples, heads, queries, keys, size): within one block, at its edges, over several, no multiple of anything.
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 7, 5, 72),
    (1, 2, 288, 128, 64),
    (2, 1, 289, 129, 40),
    (1, 1, 49, 131, 15),
    (1, 1, 35, 17, 130),
    (1, 2, 300, 520, 72),
    (1, 1, 6, 16, 33),
]


def attend(q, k, v, mask=None, scale=0.125):
    names = ["q", "k", "v", *([] if mask is None else ["mask"])]
    feeds = dict(zip(names, (q, k, v, mask), strict=False))
    values = [ir.Value(name=name, type=FLOAT) for name in names]
    node = ir.Node(DOMAIN, "Attention", values, [ir.AttrFloat32("scale", scale)], name="attention")
    node.outputs[0].name, node.outputs[0].type = "y", FLOAT
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": 21, DOMAIN: VERSION}, name="g")
    return native.run(ir.Model(graph, ir_version=10), feeds)[0]


def reference(q, k, v, mask=None, scale=0.125):
    """(softmax(scale q k' + mask) v in float64, bound of the float32 error).

    With u = 2^-24: scores are sums of `size` products of a scaled q, so they are off by (size + 2) u scale |q| |k|,
    the largest of their row being taken off adds 2 u of its magnitude; a weight is off by as much, relatively, and by
    2^-22 of exp. The mean of v, weighted by these, is off by twice that (numerator and denominator) and by the
    roundings of a sum over the keys, which is done block by block: (keys + 2) u, each relative to the mean of |v|.
    """
    u = 2.0**-24
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scale = float(np.float32(scale))
    size = q.shape[3]
    scores, sizes = scale * q @ k.swapaxes(2, 3), scale * np.abs(q) @ np.abs(k).swapaxes(2, 3)
    if mask is not None:
        scores, sizes = scores + mask, sizes + np.abs(mask)
    with np.errstate(invalid="ignore"):
        scores = scores - scores.max(axis=3, keepdims=True)
    weights = np.exp(scores)
    weights /= weights.sum(axis=3, keepdims=True)
    live = weights > 1e-12
    off = ((size + 2) * u * sizes + 2 * u * np.abs(scores)).max(axis=3, keepdims=True, where=live, initial=0) + 2.0**-22
    return weights @ v, (2 * off + (k.shape[2] + 2) * u) * (weights @ np.abs(v)) + 1e-30


def tensors(shape, seed=0, spread=2.0):
    samples, heads, queries, keys, size = shape
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((samples, heads, n, size)).astype(np.float32) * spread for n in (queries, keys, keys)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_within_float32_roundings_of_float64(shape):
    q, k, v = tensors(shape)
    expected, bound = reference(q, k, v)
    assert (np.abs(attend(q, k, v) - expected) <= bound).all()


@pytest.mark.parametrize("axes", [(3,), (0, 3), (0, 1, 3), (0, 1, 2, 3), (2, 3), ()], ids=str)
@pytest.mark.parametrize("hidden", [-10000.0, -np.inf])
def test_masks_of_every_form(axes, hidden):
    shape = (2, 3, 20, 150, 16)
    q, k, v = tensors(shape)
    rng = np.random.default_rng(1)
    mask = np.where(rng.random([(2, 3, 20, 150)[axis] if axis in axes else 1 for axis in range(4)]) < 0.4, hidden, 0.5)
    if 3 in axes:
        mask[..., 0] = 0  # each query has a key
    else:
        mask[...] = 0.5
    mask = mask.astype(np.float32)
    expected, bound = reference(q, k, v, mask)
    assert (np.abs(attend(q, k, v, mask) - expected) <= bound).all()


@pytest.mark.parametrize("hidden", [float(np.finfo(np.float32).min), -2.5e38, -(2.0**100), -1e4])
def test_a_query_whose_keys_are_all_hidden_by_numbers_gets_their_mean(hidden):
    """As in PyTorch: a sum with so large a number is that number; with -10000 a score still counts."""
    q, k, v = tensors((1, 2, 20, 150, 16))
    mask = np.full((1, 1, 20, 150), np.float32(hidden))
    mask[0, 0, 7:, :100] = 0
    expected, bound = reference(q, k, v, mask) if hidden == -1e4 else reference(*(q * (mask[..., :1] == 0), k, v), mask)
    assert (np.abs(attend(q, k, v, mask) - expected) <= bound).all()


@pytest.mark.parametrize("axes", [(2,), (2, 3)], ids=str)
def test_a_mask_by_query_over_several_panels_of_queries_and_blocks_of_keys(axes):
    q, k, v = tensors((1, 2, 301, 290, 24))
    rng = np.random.default_rng(2)
    mask = rng.standard_normal([(1, 1, 301, 290)[axis] if axis in axes else 1 for axis in range(4)]).astype(np.float32)
    expected, bound = reference(q, k, v, mask)
    assert (np.abs(attend(q, k, v, mask) - expected) <= bound).all()


def test_a_first_block_without_any_key_does_not_count():
    q, k, v = tensors((1, 1, 9, 300, 24))
    mask = np.zeros((1, 1, 1, 300), np.float32)
    mask[..., :200] = -np.inf
    expected, bound = reference(q, k, v, mask)
    assert (np.abs(attend(q, k, v, mask) - expected) <= bound).all()


def test_larger_scores_in_later_blocks_take_over():
    q, k, v = tensors((1, 1, 5, 400, 8))
    k *= np.linspace(0.1, 20, 400, dtype=np.float32)[:, None]
    expected, bound = reference(q, k, v)
    assert (np.abs(attend(q, k, v) - expected) <= bound).all()


def test_queries_that_meet_nan_or_no_key_are_nan_and_the_others_whole():
    q, k, v = tensors((1, 1, 8, 140, 16))
    q[0, 0, 3, 5] = np.nan
    mask = np.zeros((1, 1, 8, 140), np.float32)
    mask[0, 0, 6] = -np.inf
    expected, bound = reference(q, k, v, mask)
    result = attend(q, k, v, mask)
    sick = np.isin(np.arange(8), (3, 6))
    assert np.isnan(result[0, 0, sick]).all()
    assert (np.abs(result - expected) <= bound)[0, 0, ~sick].all()


@pytest.mark.parametrize("place", [0, 20, 39])
@pytest.mark.parametrize("bits", [0x7FC00001, 0xFFFFFFFF, 0x7FFFFFFF, 0x7F800001], ids=hex)
@pytest.mark.parametrize("port", ["q", "k", "mask"])
def test_every_kind_of_nan_stays_one(port, bits, place):
    """Those whose lowest bits are not 0 too, which a sum with an exponent would make numbers of."""
    q, k, v = tensors((1, 1, 5, 40, 16))
    given = {"q": q, "k": k, "mask": np.zeros((1, 1, 5, 40), np.float32)}
    damaged = given[port].view(np.uint32)
    damaged[(0, 0, 2, place % 16) if port == "q" else (0, 0, 2, place) if port == "mask" else (0, 0, place, 3)] = bits
    sick = np.arange(5) == 2 if port != "k" else np.ones(5, bool)
    result = attend(q, k, v, given["mask"])
    assert np.isnan(result[:, :, sick]).all() and np.isfinite(result[:, :, ~sick]).all()


@pytest.mark.parametrize("port", ["q", "k", "v"])
@pytest.mark.parametrize("damage", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_goes_where_it_goes_in_float64(port, damage):
    """A key's score of -Inf hides it, +Inf makes a query NaN; in v it stays in its channel; other heads are whole."""
    tensors_of = dict(zip("qkv", tensors((1, 2, 8, 140, 16)), strict=True))
    tensors_of[port][0, 1, 3, 5] = damage
    with np.errstate(invalid="ignore"):
        expected, bound = reference(**tensors_of)
    result, finite = attend(**tensors_of), np.isfinite(expected)
    assert finite[0, 0].all() and not finite[0, 1].all()
    np.testing.assert_array_equal(result[~finite], expected[~finite])
    assert (np.abs(result[finite] - expected[finite]) <= bound[finite]).all()


def test_nothing_denormal_is_left_of_masked_scores():
    """A weight is 0 where its score is more than 87 below the largest: there exp is denormal."""
    q, k = np.ones((1, 1, 1, 1), np.float32), np.array([0.0, -86.9, -88.0], np.float32).reshape(1, 1, 3, 1)
    for i, weight in enumerate((1.0, np.exp(np.float32(-86.9)), 0.0)):
        v = np.eye(3, dtype=np.float32)[i].reshape(1, 1, 3, 1)
        assert attend(q, k, v, scale=1.0).item() == pytest.approx(weight, rel=1e-6, abs=0)


def test_no_keys_give_zero_and_a_mask_of_one_number_counts():
    q, k, v = tensors((1, 2, 3, 0, 8))
    assert np.array_equal(attend(q, k, v), np.zeros_like(q))
    q, k, v = tensors((1, 2, 3, 4, 8))
    assert np.isnan(attend(q, k, v, np.array(np.nan, np.float32))).all()


def test_a_result_that_nobody_reads_is_not_written():
    names = ("q", "k", "v")
    values = [ir.Value(name=name, type=FLOAT) for name in names]
    node = ir.Node(DOMAIN, "Attention", values, [ir.AttrFloat32("scale", 0.5)], name="attention")
    node.outputs[0].name, node.outputs[0].type = "", FLOAT
    other = ir.Node("", "Neg", [values[0]], name="other")
    other.outputs[0].name, other.outputs[0].type = "y", FLOAT
    imports = {"": 21, DOMAIN: VERSION}
    graph = ir.Graph(values, other.outputs, nodes=[node, other], opset_imports=imports, name="g")
    feeds = dict(zip(names, tensors((1, 1, 3, 4, 8)), strict=True))
    assert np.array_equal(native.run(ir.Model(graph, ir_version=10), feeds)[0], -feeds["q"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": (1, 1, 5, 8)}, "k and v must have the same shape"),
        ({"q": (1, 2, 4, 8)}, "q and k must have the same"),
        ({"q": (4, 8)}, "must be \\[samples, heads, tokens, size\\]"),
        ({"mask": (1, 1, 3, 6)}, "mask does not fit"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(change, message):
    shapes = {"q": (1, 1, 4, 8), "k": (1, 1, 6, 8), "v": (1, 1, 6, 8), "mask": (1, 1, 4, 6)} | change
    with pytest.raises(Exception, match=message):
        attend(*(np.zeros(shape, np.float32) for shape in shapes.values()))
