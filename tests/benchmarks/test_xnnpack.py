"""XNNPACK's linears, where ai-edge-litert is installed, compute the product that their operands say."""

import numpy as np
import pytest

from benchmarks import xnnpack
from pipeline.distance import sqnr_db


def test_names_say_what_differs():
    names = [linear.name for linear in xnnpack.LINEARS]
    assert len(set(names)) == len(names) and "XNNPACK INT4 by groups of 64 x INT8, dynamic" in names


@pytest.mark.skipif(not xnnpack.is_installed(), reason="ai-edge-litert is not installed")
@pytest.mark.parametrize("linear", xnnpack.LINEARS, ids=lambda linear: linear.name)
def test_a_linear_is_within_eight_bits_of_the_product(linear):
    rng = np.random.default_rng(0)
    x, weight = rng.integers(-20, 21, (5, 128)).astype(np.int8), rng.integers(-7, 8, (32, 128)).astype(np.int8)
    interpreter = xnnpack.opened(linear, x if linear.static else x.astype(np.float32), weight, threads=1)
    interpreter.invoke()
    output = interpreter.get_output_details()[0]
    y = interpreter.get_tensor(output["index"]) * (np.float32(xnnpack.SCALE * 128) if linear.static else 1)
    least_db = 20 if linear.static else 35  # the results use a small part of 8 bits, or the activations all of them
    assert sqnr_db(x @ weight.T.astype(np.float32) * np.float32(xnnpack.SCALE), y) >= least_db
