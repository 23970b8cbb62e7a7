"""The PyTorch reference against the codec, the ops' references and a model written out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from export.dialect.reference import ABSMAX_FLOOR, dequantize_activation, dequantize_weight, quantize_activation
from export.errors import ContractError
from export.formats.format import FORMATS, decode, encode, fold_negative_zero, get_format, pack
from export.formats.operands import exact_multipliers
from export.models import load as models
from pipeline.backends.reference import FakeQuantLinear, ReferenceEngine, fake_quant, fake_quantize, round_to_format
from tests.support import learned, tiny
from tests.support.portable import make_linear

DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


def codec(fmt, x):
    """The value of the nearest code within +-max_value."""
    lowest = -fmt.max_value if fmt.sign_bits else 0.0
    codes = encode(fmt, np.clip(x.astype(np.float64), lowest, fmt.max_value))
    return decode(fmt, fold_negative_zero(fmt, codes))


def interesting(fmt, dtype):
    """Every value, every midpoint, their neighbours in `dtype`, overflow and zeros."""
    values = np.unique(fmt.values[np.isfinite(fmt.values)])
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2]).astype(dtype)
    around = [np.nextafter(points, dtype(side)) for side in (-np.inf, np.inf)]
    far = np.array([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30, np.inf, -np.inf], dtype)
    return np.concatenate([points, *around, far])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_rounding_is_the_codec_at_every_value_midpoint_and_neighbour(name, dtype):
    fmt = get_format(name)
    x = interesting(fmt, DTYPES[dtype])
    rounded = round_to_format(fmt, torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(rounded, codec(fmt, x))
    assert not np.signbit(rounded[rounded == 0]).any()


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_is_the_codec_on_random_numbers(name):
    fmt, rng = get_format(name), np.random.default_rng(0)
    x = (rng.standard_normal(100_000) * fmt.max_value / 3).astype(np.float32)
    np.testing.assert_array_equal(round_to_format(fmt, torch.from_numpy(x)).numpy(), codec(fmt, x))


@pytest.mark.parametrize("name", ["E2M1", "E2M3", "E3M2", "E3M4", "E4M3", "INT4", "INT6", "INT8"])
def test_float32_fake_quantization_is_the_ops_bit_for_bit(name):
    x = np.random.default_rng(1).standard_normal((7, 5, 48)).astype(np.float32) * 3
    x[0, 0] = 0.0
    x[0, 1] = 1e-35
    x[0, 2, 0] = 1e35
    fake = fake_quantize(get_format(name), torch.from_numpy(x)).numpy()
    (expected,) = dequantize_activation(*quantize_activation(x, format=name), format=name)
    np.testing.assert_array_equal(fake, expected)


def test_a_token_of_zeros_stays_zero_and_nan_is_not_hidden():
    fmt = get_format("E2M3")
    assert (fake_quantize(fmt, torch.zeros(2, 8)) == 0).all()
    assert torch.isnan(fake_quantize(fmt, torch.tensor([[1.0, float("nan")]]))).all()
    smallest = fake_quantize(fmt, torch.full((1, 4), ABSMAX_FLOOR, dtype=torch.float64))
    np.testing.assert_allclose(smallest.numpy(), ABSMAX_FLOOR, rtol=1e-15)


def make_layer(name="layer", weight_format="E2M1", granularity="exact_group", n=6, k=16, group=8, bias=True):
    rng, fmt = np.random.default_rng(7), get_format(weight_format)
    codes = fold_negative_zero(fmt, encode(fmt, rng.standard_normal((n, k)) * fmt.max_value / 2))
    groups = k // group if granularity != "per_channel" else 1
    allowed = np.array(exact_multipliers(weight_format, ("INT8",)) or (1,), np.uint8)
    return make_linear(
        codes,
        weight_format=weight_format,
        name=name,
        kind="other",
        activation_format="E2M3",
        granularity=granularity,
        group_size=0 if granularity == "per_channel" else group,
        scales=rng.uniform(0.01, 0.1, (n, groups if granularity == "group" else 1)).astype(np.float32),
        multipliers=rng.choice(allowed, (n, groups)) if granularity == "exact_group" else None,
        bias=rng.standard_normal(n).astype(np.float32) if bias else None,
    )


CASES = [
    ("E2M1", "exact_group"),
    ("E2M1", "group"),
    ("E3M0", "per_channel"),
    ("E3M4", "group"),
    ("INT8", "per_channel"),
]


@pytest.mark.parametrize(("weight_format", "granularity"), CASES)
def test_weights_are_dequantized_as_the_checkpoint_and_the_op_say(weight_format, granularity):
    layer = make_layer(weight_format=weight_format, granularity=granularity)
    exact = FakeQuantLinear(layer, torch.float64).weight
    np.testing.assert_array_equal(exact.numpy(), layer.dequantized())
    table = exact_multipliers(weight_format, ("INT8",)) if granularity == "exact_group" else (1,)
    groups = layer.groups if layer.group_size else 1
    chosen = layer.multipliers if layer.multipliers is not None else np.ones((layer.out_features, groups), np.uint8)
    index = np.searchsorted(table, chosen).astype(np.uint8)
    (expected,) = dequantize_weight(
        layer.codes, layer.scales, pack(index, 4), format=weight_format, in_features=16,
        group_size=layer.group_size, multipliers=table,
    )  # fmt: skip
    np.testing.assert_array_equal(FakeQuantLinear(layer, torch.float32).weight.numpy(), expected.T)


def test_weights_are_held_as_one_byte_each():
    held = FakeQuantLinear(make_layer(), torch.float64)
    assert held.get_buffer("kept_integers").dtype == torch.int8
    assert not list(held.parameters())


def test_weights_that_are_unpacked_call_by_call_are_the_same():
    layer, x = make_layer(), torch.from_numpy(np.random.default_rng(3).standard_normal((2, 3, 16)))
    packed = FakeQuantLinear(layer, torch.float64, unpacked=False)
    assert not any(buffer.dtype == torch.int8 for buffer in packed.buffers())
    assert torch.equal(packed(x), FakeQuantLinear(layer, torch.float64)(x))


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_fake_quantization_times_dequantized_weight(bias):
    layer, x = make_layer(bias=bias), np.random.default_rng(3).standard_normal((2, 3, 16))
    y = FakeQuantLinear(layer, torch.float64)(torch.from_numpy(x)).numpy()
    scale = np.abs(x).max(-1, keepdims=True) / 7.5
    activation = codec(get_format("E2M3"), x / scale) * scale
    expected = activation @ layer.dequantized().T + (0 if layer.bias is None else layer.bias)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)  # 16 sums in float64


LEARNED = {
    "per_tensor": lambda one: learned.with_scaling(one, "per_tensor"),
    "zero": lambda one: learned.with_scaling(one, "zero"),
    "token_group": lambda one: learned.with_scaling(one, "token_group"),
    "balance": learned.with_balance,
    "multiplier": lambda one: learned.with_balance(one, offset=False),
    "branches": lambda one: learned.with_low_rank(one, learned.router()),
    "everything": lambda one: learned.with_low_rank(
        learned.with_balance(learned.with_scaling(one, "zero")), learned.router()
    ),
}
TIMES = np.array([3.0, 500.0, 997.0])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("what", LEARNED)
def test_what_methods_learn_is_computed_as_defined(what, bias):
    layer = LEARNED[what](make_layer(bias=bias))
    x = np.random.default_rng(4).standard_normal((3, 5, 16))
    linear = FakeQuantLinear(layer, torch.float64)
    if layer.router is not None:
        linear.routing.tell(torch.from_numpy(TIMES))
    y = linear(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(y, learned.expected_output(layer, x, TIMES), rtol=1e-11, atol=1e-11)
    single = FakeQuantLinear(layer, torch.float32, linear.routing)(torch.from_numpy(x[:, 0]).float())
    assert single.dtype == torch.float32 and single.shape == (3, 6)


def test_each_sample_uses_the_branch_of_its_own_timestep():
    layer = learned.with_low_rank(make_layer(), learned.router())
    chosen = layer.router.choose(np.arange(1000))
    times = torch.tensor([float(np.flatnonzero(chosen == h)[0]) for h in range(learned.BRANCHES)])
    linear, x = FakeQuantLinear(layer, torch.float64), torch.ones(1, 2, 16, dtype=torch.float64)
    linear.routing.tell(times)
    mixed = linear(x.expand(3, 2, 16))
    for h in range(3):
        linear.routing.tell(times[h : h + 1])
        torch.testing.assert_close(mixed[h], linear(x)[0], rtol=0, atol=0)
    assert not torch.allclose(mixed[0], mixed[1])


def test_a_branch_without_timesteps_or_batch_is_refused():
    linear = FakeQuantLinear(learned.with_low_rank(make_layer(), learned.router()), torch.float32)
    with pytest.raises(ContractError, match=r"layer: its low-rank branch depends on the timestep; call Routing.tell"):
        linear(torch.ones(2, 3, 16))
    linear.routing.tell(torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(ContractError, match=r"layer: its input begins with 2, the batch has 3 timesteps; .* \[batch"):
        linear(torch.ones(2, 3, 16))


@pytest.mark.torch
def test_the_whole_model_is_told_the_timestep(tmp_path):
    model, of = models.load(str(tiny.folder("pixart", tmp_path))), learned.router()
    layers = [learned.with_low_rank(layer, of, seed) for seed, layer in enumerate(tiny.quantized(model))]
    inputs = models.sample_inputs(model, 3, 0)
    run = ReferenceEngine(fake_quant(model, layers, torch.float32)).run
    chosen = of.choose(np.arange(1000))
    times = np.float32([np.flatnonzero(chosen == h)[0] for h in range(3)])
    mixed = run(inputs | {"timestep": times})["sample"]
    for h in range(3):
        alone = {name: value[h : h + 1] for name, value in inputs.items()} | {"timestep": times[h : h + 1]}
        np.testing.assert_allclose(run(alone)["sample"][0], mixed[h], rtol=1e-4, atol=1e-4)
        fixed = [
            replace(layer, router=replace(of, w2=0 * of.w2, b2=np.eye(3, dtype=np.float32)[h])) for layer in layers
        ]
        other = ReferenceEngine(fake_quant(model, fixed, torch.float32)).run(alone)["sample"]
        np.testing.assert_array_equal(other, run(alone)["sample"])


class Model:
    """What `fake_quant` needs of a loaded model, with a two-layer network in place of a transformer."""

    parameters = 130

    class family:
        name, outputs = "test", ("sample",)

        @staticmethod
        def call(module, inputs):
            return module(inputs["hidden_states"])

    class Row:
        name = "hidden_states"

    inputs = (Row(),)

    def __init__(self):
        torch.manual_seed(0)
        self.module = torch.nn.Sequential(torch.nn.Linear(16, 6), torch.nn.GELU(), torch.nn.Linear(6, 4))
        self.module.requires_grad_(False)


def test_the_model_keeps_its_own_modules_and_types():
    model, x = Model(), np.random.default_rng(5).standard_normal((3, 16)).astype(np.float32)
    before = model.module(torch.from_numpy(x)).numpy()
    quantized = {dtype: fake_quant(model, [make_layer("0")], dtype) for dtype in DTYPES}
    np.testing.assert_array_equal(model.module(torch.from_numpy(x)).numpy(), before)
    outputs = {
        dtype: ReferenceEngine(module, dtype).run({"hidden_states": x})["sample"] for dtype, module in quantized.items()
    }
    assert outputs[torch.float64].dtype == np.float64 and outputs[torch.float32].dtype == np.float32
    hidden = FakeQuantLinear(make_layer("0"), torch.float64)(torch.from_numpy(x).double())
    last = model.module[2]
    expected = torch.nn.functional.gelu(hidden) @ last.weight.double().T + last.bias.double()
    np.testing.assert_allclose(outputs[torch.float64], expected.numpy(), rtol=1e-12)


def test_kept_tensors_are_shared_where_the_type_is_equal():
    model = Model()
    module = fake_quant(model, [make_layer("0")], torch.float32)
    assert module.get_submodule("transformer.2").weight.data_ptr() == model.module[2].weight.data_ptr()


def test_a_model_without_quantized_layers_is_refused():
    with pytest.raises(ContractError, match="no quantized layer"):
        fake_quant(Model(), [], torch.float32)
