"""The kernel library's GEMM with float16 weights against float64: every number of rows and channels, every float16."""

import numpy as np
import onnx_ir as ir
import pytest

from pipeline.backends.cpu.half_gemm import OP, PANEL, half_panels
from pipeline.backends.cpu.token_chain import VERSION
from plugins.cpu.library import DOMAIN
from tests.support import native

pytestmark = pytest.mark.kernels
FLOAT, HALF = ir.TensorType(ir.DataType.FLOAT), ir.TensorType(ir.DataType.FLOAT16)
# (rows, k, n): one, a few, tiles of 6, 2 and 1 rows, more than one block of rows, no multiple of anything.
SHAPES = [(1, 1, 1), (2, 7, 16), (6, 64, 33), (9, 128, 48), (97, 40, 17), (200, 65, 100)]


def session(channels, bias=True):
    values = [ir.Value(name="x", type=FLOAT), ir.Value(name="w", type=HALF), ir.Value(name="b", type=FLOAT)]
    values = values if bias else values[:2]
    node = ir.Node(DOMAIN, OP, values, [ir.AttrInt64("channels", channels)], name="half")
    node.outputs[0].name, node.outputs[0].type = "y", FLOAT
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": 21, DOMAIN: VERSION}, name="g")
    return native.session(ir.Model(graph, ir_version=10))


def product(x, weight, bias=None):
    """x [.., K], weight [N, K] float16 -> [.., N]."""
    panels = half_panels(ir.tensor(weight, name="w"), by_output=True)
    feeds = {"x": x, "w": panels} | ({} if bias is None else {"b": bias})
    return session(len(weight), bias is not None).run(None, feeds)[0]


def tensors(rows, k, n, seed=0):
    rng = np.random.default_rng(seed)
    x, bias = rng.standard_normal((rows, k)).astype(np.float32), rng.standard_normal(n).astype(np.float32)
    return x, rng.standard_normal((n, k)).astype(np.float16), bias


def reference(x, weight, bias):
    """(x w' + bias in float64, bound of the float32 error): a product and a sum for each k and the bias are at most
    k + 2 roundings, each relative to the sum of magnitudes."""
    wide = weight.astype(np.float64)
    sizes = np.abs(x) @ np.abs(wide.T) + np.abs(bias)
    return x @ wide.T + bias, (x.shape[1] + 2) * 2.0**-24 * sizes


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_within_float32_roundings_of_float64(shape):
    x, weight, bias = tensors(*shape)
    expected, bound = reference(x, weight, bias)
    assert (np.abs(product(x, weight, bias) - expected) <= bound).all()


def test_a_row_does_not_depend_on_those_beside_it():
    x, weight, bias = tensors(100, 96, 40)
    whole = product(x.reshape(4, 25, 96), weight, bias)
    assert whole.shape == (4, 25, 40)
    for count in (1, 2, 7):
        np.testing.assert_array_equal(product(x[:count], weight, bias), whole.reshape(100, 40)[:count])


def test_every_float16_is_read_as_what_it_is():
    """Denormals, infinities and NaN with them: one row of K = 1 multiplies each number by 1."""
    weight = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(-1, 1)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(product(np.ones((1, 1), np.float32), weight)[0], weight[:, 0].astype(np.float32))


def test_a_damaged_row_stays_alone():
    x, weight, bias = tensors(9, 64, 20)
    clean = product(x, weight, bias)
    x[4, 3] = np.nan
    damaged = product(x, weight, bias)
    assert np.isnan(damaged[4]).all()
    np.testing.assert_array_equal(np.delete(damaged, 4, 0), np.delete(clean, 4, 0))


@pytest.mark.parametrize("damage", [(np.inf,), (-np.inf,), (np.inf, -np.inf)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_infinity_is_what_float64_makes_of_it(damage, rows):
    """Of either sign by the weight's, NaN where both meet, and in its row alone."""
    x, weight, bias = tensors(rows, 64, 20)
    x[rows // 2, [3, 40][: len(damage)]] = damage
    with np.errstate(invalid="ignore"):
        expected, bound = reference(x, weight, bias)
    result, finite = product(x, weight, bias), np.isfinite(expected)
    assert finite.all(axis=1).sum() == rows - 1
    np.testing.assert_array_equal(result[~finite], expected[~finite])
    assert (np.abs(result[finite] - expected[finite]) <= bound[finite]).all()


@pytest.mark.parametrize(
    ("feeds", "reason"),
    [
        ({"x": np.zeros((2, 9), np.float32)}, "weight must be"),
        ({"b": np.zeros(3, np.float32)}, "one number a channel"),
        ({"x": np.zeros((2, 0), np.float32)}, "must have channels"),
    ],
)
def test_what_does_not_fit_is_refused(feeds, reason):
    fitting = {
        "x": np.zeros((2, 8), np.float32),
        "w": np.zeros((2, 8, PANEL), np.float16),
        "b": np.zeros(20, np.float32),
    }
    assert session(20).run(None, fitting)[0].shape == (2, 20)
    with pytest.raises(Exception, match=reason):
        session(20).run(None, fitting | feeds)


def test_no_rows_are_no_error():
    x, weight, bias = tensors(0, 8, 20)
    assert product(x, weight, bias).shape == (0, 20)
