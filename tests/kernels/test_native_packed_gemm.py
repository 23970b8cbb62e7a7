"""PackedGemm gives the integer sums of 64-bit arithmetic, on every instruction set that this processor has."""

import ctypes
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from export.dialect.graph import GraphBuilder
from export.formats.format import get_format, pack
from export.formats.operands import largest_code, limb_base, zero_point
from pipeline.backends.cpu.packed_gemm import packed_gemm
from pipeline.backends.cpu.quantizers import Operand
from pipeline.backends.cpu.token_chain import VERSION, drop_unread_outputs
from pipeline.passes import run_shared
from pipeline.passes.quantized_gemm import read_gemm
from plugins.cpu import library
from plugins.cpu.library import DOMAIN
from tests.support import native
from tests.support.portable import portable, random_linear

pytestmark = pytest.mark.kernels

VARIANTS = ("amx_int8", "avx512_vnni", "avx_vnni", "avx2", "i8mm", "dotprod", "plain")
# Rows beyond a tile, channels beyond a panel, input channels beyond an octet, a run, a group and a block.
SHAPES = [(1, 16, 64), (9, 33, 96), (5, 7, 36), (13, 100, 2080), (4, 16, 8), (521, 17, 64)]
# Formats, how the weight is scaled, its group, and the activation's (0: a scale for each token).
LAYERS = [
    ("E2M1", "E2M3", "per_channel", 0, 0),
    ("E2M1", "E2M3", "exact_group", 16, 0),
    ("E2M1", "INT8", "exact_group", 32, 0),
    ("E1M2", "E2M3", "exact_group", 8, 0),
    ("E3M0", "INT8", "per_channel", 0, 0),
    ("INT4", "E3M2", "exact_group", 16, 0),
    ("E2M1", "E3M4", "exact_group", 32, 0),
    ("E3M0", "E3M4", "per_channel", 0, 0),
    ("E2M1", "E2M3", "group", 16, 0),
    ("INT4", "E3M4", "group", 8, 0),
    ("INT8", "INT8", "per_channel", 0, 0),
    ("INT8", "E2M3", "per_channel", 0, 0),
    ("INT8", "E3M4", "group", 32, 0),
    ("INT6", "INT8", "per_channel", 0, 0),
    ("E2M3", "E2M3", "per_channel", 0, 0),
    ("INT6", "E3M2", "group", 16, 0),
    ("INT4", "INT8", "per_channel", 0, 32),
    ("E2M1", "E2M3", "exact_group", 16, 32),
    ("E2M1", "E3M4", "group", 32, 16),
    ("INT8", "INT8", "group", 16, 8),
]


def kernels(flags=()):
    return ctypes.CDLL(str(native.folder(flags) / library.NAME))


@pytest.fixture(params=VARIANTS)
def variant(request):
    """The name of a variant that makes all products during the test."""
    force = kernels().packed_gemm_force
    if not force(request.param.encode()):
        pytest.skip(f"this processor has no {request.param}: test_kernel_driver.py runs it emulated")
    yield request.param
    force(None)


def linear(weight, activation, granularity, group, by, n, k):
    """The packed linear of the lowering's own graph, before it is lowered."""
    granularity, group = ("per_channel", 0) if group and k % group else (granularity, group)
    layer = random_linear(n=n, k=k, weight=weight, activation=activation, granularity=granularity, group=group)
    model = portable('y = fpq.QuantizedLinear <layer="a"> (x)', [layer], f"float[B,S,{k}] x", f"float[B,S,{n}] y")
    run_shared(model)
    gemm = read_gemm(next(node for node in model.graph if node.op_type == "PackedGemm"))
    return replace(gemm, activation_group=by if by and k % by == 0 else 0)


def operands(gemm, rows):
    """(how codes stand for integers, random codes of each limb [rows, K], scales of tokens by group [rows, groups, 1]
    or None), the largest sums there can be among them."""
    limbs = 1 if gemm.activation.kmax < 128 else 2
    base = limb_base(gemm.activation.kmax, limbs)
    zero = zero_point(gemm.activation.kmax if limbs == 1 else round(gemm.activation.kmax / base))
    largest = largest_code(gemm.activation, limbs)
    rng = np.random.default_rng(rows + gemm.in_features)
    codes = [rng.integers(0, largest + 1, (rows, gemm.in_features)).astype(np.uint8) for _ in range(limbs)]
    for code in codes:  # of one sign and of both
        code[0] = largest
        code[-1, ::2] = 0
    values = tuple(ir.Value(name=name, type=ir.TensorType(ir.DataType.UINT8)) for name in "hl"[:limbs])
    scale = ir.Value(name="s", type=ir.TensorType(ir.DataType.FLOAT)) if gemm.activation_group else None
    scales = rng.uniform(0.1, 2, (rows, gemm.activation_groups, 1)).astype(np.float32)
    operand = Operand(values[0], values, (1,) if limbs == 1 else (base, 1), zero, scale)
    return operand, codes, scales if gemm.activation_group else None


def feeds_of(codes, scales):
    return dict(zip("hl", codes, strict=False)) | ({} if scales is None else {"s": scales})


def product_model(gemm, operand, sums=False):
    """A graph of one PackedGemm: h (, l) (, s) -> product (, the sums of its groups)."""
    inputs = [*operand.codes, *([] if operand.scale is None else [operand.scale])]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": 21, DOMAIN: VERSION}, name="g")
    end = ir.Node("", "Identity", [operand.x], name="end")
    graph.append(end)
    product, _ = packed_gemm(GraphBuilder(graph, end, "a"), gemm, operand)
    graph.remove(end)
    graph.outputs.extend([product.value, product.probed] if sums else [product.value])
    model = ir.Model(graph, ir_version=10)
    drop_unread_outputs(model)
    return model


def expected_sums(gemm, operand, codes):
    """[sums, M, N] int64."""
    integers = sum(w * (c.astype(np.int64) - operand.zero) for w, c in zip(operand.weights, codes, strict=True))
    parts = (np.split(array, gemm.sum_groups, axis=1) for array in (integers, gemm.integers(np.int64)))
    sums = np.stack([part @ weight.T for part, weight in zip(*parts, strict=True)])
    assert np.abs(sums).max() < 2**31
    return sums


def expected(gemm, operand, codes, token_scales):
    """The integer sums, of each group by itself, scaled and added up in float32 in the order of the groups."""
    scales, total = np.atleast_2d(gemm.unit_scales()), None
    for s, sums in enumerate(expected_sums(gemm, operand, codes)):
        scaled = sums.astype(np.int32).astype(np.float32) * scales[s * len(scales) // gemm.sum_groups]
        if token_scales is not None:
            scaled = scaled * token_scales[:, s * gemm.activation_groups // gemm.sum_groups]
        total = scaled if total is None else total + scaled
    return total


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_sum_is_exact(variant, layer, shape):
    m, n, k = shape
    gemm = linear(*layer, n, k)
    operand, codes, scales = operands(gemm, m)
    result = native.run(product_model(gemm, operand), feeds_of(codes, scales))[0]
    np.testing.assert_array_equal(result, expected(gemm, operand, codes, scales))


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer[2] == "group" or layer[4]], ids=str)
def test_sums_of_groups_are_an_output_for_the_gates(layer):
    gemm = linear(*layer, 33, 96)
    operand, codes, scales = operands(gemm, 9)
    product, sums = native.run(product_model(gemm, operand, sums=True), feeds_of(codes, scales))
    np.testing.assert_array_equal(sums, expected_sums(gemm, operand, codes))
    np.testing.assert_array_equal(product, expected(gemm, operand, codes, scales))


def test_the_fastest_variant_is_chosen_and_an_unknown_one_refused():
    library_ = kernels()
    library_.packed_gemm_variant.restype = ctypes.c_char_p
    assert library_.packed_gemm_variant().decode() in VARIANTS
    assert not library_.packed_gemm_force(b"mmx")
    assert library_.packed_gemm_force(None)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"largest_code": 256}, "largest_code must be that of a byte"),
        ({"largest_code": 2**32 + 5}, "must fit 32 bits"),
        ({"zero": 2**40}, "must fit 32 bits"),
        ({"limb_weight": -(2**31) - 1}, "must fit 32 bits"),
        ({"group_size": 12}, "group_size must be a multiple of 8"),
        ({"group_size": 24}, "group_size must be a multiple of 8"),
        ({"group_size": 8}, "multipliers must be"),
        ({"largest_code": -1}, "largest_code must be that of a byte"),
    ],
)
def test_what_would_not_be_exact_is_refused(change, message):
    gemm = linear("E2M1", "E2M3", "exact_group", 16, 0, 16, 64)
    model = product_model(gemm, operands(gemm, 2)[0])
    node = next(node for node in model.graph if node.domain == DOMAIN)
    node.attributes.update({name: ir.AttrInt64(name, value) for name, value in change.items()})
    with pytest.raises(Exception, match=message):
        native.run(model, {"h": np.zeros((2, 64), np.uint8)})


def test_a_product_that_nobody_reads_is_not_made():
    gemm = linear("E2M1", "E2M3", "exact_group", 16, 0, 16, 64)
    model = product_model(gemm, operands(gemm, 2)[0])
    node = next(node for node in model.graph if node.domain == DOMAIN)
    node.outputs[0].name = ""
    copy = ir.Node("", "Identity", [model.graph.inputs[0]], name="copy")
    copy.outputs[0].name, copy.outputs[0].type = "y", model.graph.inputs[0].type
    model.graph.append(copy)
    model.graph.outputs[:] = copy.outputs
    codes = np.ones((2, 64), np.uint8)
    assert np.array_equal(native.run(model, {"h": codes})[0], codes)


def test_tables_whose_pairs_leave_16_bits_are_refused():
    gemm = linear("E2M1", "INT8", "per_channel", 0, 0, 16, 64)
    model = product_model(gemm, operands(gemm, 2)[0])
    node = next(node for node in model.graph if node.domain == DOMAIN)
    table = next(value for value in node.inputs if value is not None and "int8" in value.name)
    array = np.array(get_format("E2M1").integers, np.int8)
    array[7] = 127
    table.const_value = ir.tensor(array, name=table.name)
    with pytest.raises(Exception, match="a pair of products can leave 16 bits"):
        native.run(model, {"h": np.zeros((2, 64), np.uint8)})


EDGES = [("E2M1", "E2M3", 16), ("INT4", "INT8", 16), ("E2M1", "INT8", 8), ("E2M3", "E2M3", 4), ("INT8", "E2M3", 2)]


@pytest.mark.parametrize("beyond", [0, 1])
@pytest.mark.parametrize("weight, activation, run", EDGES)
def test_runs_that_are_longer_by_the_weights_end_at_16_bits(variant, weight, activation, run, beyond):
    """In pairs of 16 bits, sums over `run` quads are as large as 2^15 - 1 lets them be, or larger by one weight."""
    gemm, m = linear(weight, activation, "per_channel", 0, 0, 17, 1152), 37
    operand, codes, _ = operands(gemm, m)
    largest, kmax = largest_code(gemm.activation, 1), int(gemm.weight.kmax)
    integers = sorted({abs(int(i)) for i in gemm.weight.integers if abs(i) <= kmax}, reverse=True)
    left, lane = (2**15 - 1) // largest + beyond, []
    for place in range(2 * run):  # a lane adds two products of each quad
        integer = next(i for i in integers if i <= left and left - i <= (2 * run - place - 1) * kmax)
        lane.append(integer)
        left -= integer
    row = np.zeros((288 // run, run, 2, 2), np.int64)  # runs, their quads, lanes, products
    row[...] = np.reshape(lane, (1, run, 1, 2))  # of one sign: two sums that wrap to both sides would make up for it
    assert row.sum(axis=(1, 3)).max() * largest - beyond * largest <= 2**15 - 1
    signs = np.where(np.arange(17) % 3 == 1, -1, 1)[:, None]
    stored = gemm.stored
    array = np.array([np.flatnonzero(gemm.weight.integers == i)[0] for i in (signs * row.reshape(1, -1)).ravel()])
    packed = pack(array.reshape(17, 1152).astype(np.uint8), gemm.weight.bits)
    gemm = replace(gemm, stored=replace(stored, codes=ir.Tensor(packed, name="codes")))
    codes[0][1:9] = largest
    result = native.run(product_model(gemm, operand), feeds_of(codes, None))[0]
    np.testing.assert_array_equal(result, expected(gemm, operand, codes, None))


def test_blocks_of_a_group_with_runs_of_their_own(variant):
    """Of AVX2: long runs in the first block, whose weights are small; short ones in the rest, whose are the largest."""
    gemm, m = linear("E2M1", "E2M3", "group", 1280, 0, 17, 2560), 37
    operand, codes, _ = operands(gemm, m)
    small, large = (int(np.flatnonzero(gemm.weight.integers == i)[0]) for i in (1, gemm.weight.kmax))
    row = np.where(np.arange(2560) < 1152, small, large).astype(np.uint8)
    packed = pack(np.tile(row, (17, 1)), gemm.weight.bits)
    gemm = replace(gemm, stored=replace(gemm.stored, codes=ir.Tensor(packed, name="codes")))
    result = native.run(product_model(gemm, operand), feeds_of(codes, None))[0]
    np.testing.assert_array_equal(result, expected(gemm, operand, codes, None))
