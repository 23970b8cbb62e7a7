"""The denoiser of the GPU benchmark: it is PixArt, and on our kernels' references it equals its plain arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import quantized_denoiser as gpu_quantized_denoiser
from benchmarks.gpu.denoiser import Denoiser, Size, fake_quantized, randomize, run_block, sample
from benchmarks.gpu.quantized_denoiser import quantize_blocks, quantized, weight_bytes
from benchmarks.gpu.weights import relative_error
from benchmarks.shapes import CHANNEL, EXACT_64, WORKLOADS, Granularity
from tests.support.reference_kernels import ReferenceKernels

pytestmark = pytest.mark.torch

SIZE, GRID = Size(width=64, heads=4, layers=2, caption=5, caption_channels=48), 4
GRANULARITIES = (CHANNEL, Granularity("exact groups of 16", 16), Granularity("real groups of 32", 32, True))


@pytest.fixture(autouse=True)
def no_grad(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """And no GPU."""
    monkeypatch.setattr(gpu_quantized_denoiser, "launch", ReferenceKernels())
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> Denoiser:
    return randomize(Denoiser(SIZE, GRID))


def test_the_default_size_is_pixart_xl() -> None:
    config = WORKLOADS["pixart"].config
    size = Size()
    assert size.width == WORKLOADS["pixart"].width and size.layers == config["num_layers"]
    assert size.heads == config["num_attention_heads"] and size.caption_channels == config["caption_channels"]
    assert size.caption == WORKLOADS["pixart"].caption and size.out_channels == config["out_channels"]


def copied(model: Denoiser, sample_size: int) -> torch.nn.Module:
    """diffusers' model with the weights of ours."""
    diffusers = pytest.importorskip("diffusers")
    size = model.size
    config = WORKLOADS["pixart"].config | {"num_layers": size.layers, "sample_size": sample_size}
    config |= {"num_attention_heads": size.heads, "attention_head_dim": size.width // size.heads}
    config |= {"cross_attention_dim": size.width, "caption_channels": size.caption_channels}
    copy = diffusers.PixArtTransformer2DModel(**config).eval()
    time, words = copy.adaln_single.emb.timestep_embedder, copy.caption_projection
    pairs = [(copy.pos_embed.proj, model.patches), (copy.proj_out, model.last)]
    pairs += [(copy.adaln_single.linear, model.modulation)]
    pairs += [(time.linear_1, model.time_in), (time.linear_2, model.time_out)]
    pairs += [(words.linear_1, model.caption_in), (words.linear_2, model.caption_out)]
    for theirs, ours, table in zip(copy.transformer_blocks, model.blocks, model.tables, strict=True):
        theirs.scale_shift_table.copy_(table)
        pairs += pairs_of_block(theirs, ours.linears)
    copy.scale_shift_table.copy_(model.last_table)
    for one, own in pairs:
        one.weight.copy_(own.weight)
        one.bias.copy_(own.bias)
    return copy


def pairs_of_block(theirs: Any, ours: Any) -> list[tuple[Any, Any]]:
    """(diffusers' linear, where its weight and bias are in ours)."""
    own, cross = theirs.attn1, theirs.attn2
    q, k, v = parts(ours["qkv"], 3)
    pairs = [(own.to_q, q), (own.to_k, k), (own.to_v, v), (own.to_out[0], ours["out"])]
    k, v = parts(ours["cross_kv"], 2)
    pairs += [(cross.to_q, ours["cross_q"]), (cross.to_k, k), (cross.to_v, v), (cross.to_out[0], ours["cross_out"])]
    return [*pairs, (theirs.ff.net[0].proj, ours["ff_in"]), (theirs.ff.net[2], ours["ff_out"])]


def parts(linear: Any, count: int) -> list[Any]:
    """The linears that one is merged from."""
    pieces = zip(linear.weight.chunk(count), linear.bias.chunk(count), strict=True)
    return [SimpleNamespace(weight=weight, bias=bias) for weight, bias in pieces]


@pytest.mark.parametrize("grid", [4, 64])  # 64: positions are scaled down, as for 1024 pixels
def test_it_computes_what_diffusers_does(grid: int) -> None:
    ours = randomize(Denoiser(Size(width=32, heads=4, layers=1, caption=5, caption_channels=48), grid))
    latent, timestep, caption = sample(ours, 2)
    theirs = copied(ours, 2 * grid)(latent, encoder_hidden_states=caption, timestep=timestep).sample
    assert relative_error(ours(latent, timestep, caption), theirs) < 1e-5  # float32, other orders of sums


def test_resizing_is_making_it_at_that_size(model: Denoiser) -> None:
    other = randomize(Denoiser(SIZE, 8))
    other.resize(GRID)
    inputs = sample(model, 1)
    assert torch.equal(other(*inputs), model(*inputs))


def test_signals_keep_their_size_over_the_layers() -> None:
    deep = randomize(Denoiser(Size(width=64, heads=4, layers=28, caption=5, caption_channels=48), GRID))
    output = deep(*sample(deep, 1))
    assert 0.2 < float(output.std()) < 5 and bool(torch.isfinite(output).all())


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda row: row.name)
def test_on_our_kernels_it_equals_dequantized_arithmetic(model: Denoiser, granularity: Granularity) -> None:
    weights, inputs = quantize_blocks(model, granularity), sample(model, 2)
    expected = fake_quantized(model, weights, "E2M3", torch.float32)(*inputs)
    output = quantized(model, weights, "fp32")(*inputs)
    # The same float32 numbers in other orders of sums: no code moves at this size. The float model is far off.
    assert relative_error(output, expected) < 1e-5
    assert relative_error(model(*inputs), expected) > 0.01


def test_in_bf16_it_is_as_good_as_plain_bf16_arithmetic(model: Denoiser) -> None:
    weights, inputs = quantize_blocks(model, CHANNEL), sample(model, 2)
    expected = fake_quantized(model, weights, "E2M3", torch.float32)(*inputs)
    half = randomize(Denoiser(SIZE, GRID)).to(torch.bfloat16)
    half_inputs: list[Tensor] = [x.to(torch.bfloat16) for x in inputs]
    plain = relative_error(fake_quantized(half, weights, "E2M3", torch.bfloat16)(*half_inputs), expected)
    assert relative_error(quantized(half, weights, "bf16")(*half_inputs), expected) <= 2 * plain


def test_bytes_are_counted_from_the_tensors(model: Denoiser) -> None:
    denoiser = quantized(model, quantize_blocks(model, GRANULARITIES[1]))
    linears = [linear for block in denoiser.blocks for linear in block.linears.values()]
    n, k = linears[0].packed.codes.shape
    assert linears[0].size_bytes == n * k + 4 * n + n * 2 + 4 * n  # codes, scales, 4 groups' nibbles, bias
    every = sum(x.numel() for x in model.parameters())
    quantized_ones = sum(2 * linear.packed.codes.numel() + linear.bias.numel() for linear in linears)
    assert weight_bytes(model, denoiser.blocks) == 2 * (every - quantized_ones) + sum(row.size_bytes for row in linears)


def test_packed_weights_of_the_true_size_meet_their_target() -> None:
    with torch.device("meta"):
        whole = Denoiser(Size(), 64)
    every = sum(x.numel() for x in whole.parameters())
    assert round(every / 1e6) == 611  # of PixArt-XL/2 without resolution conditions
    weights = [linear.weight for block in whole.blocks for linear in block.linears.values()]
    count, rows = sum(w.numel() for w in weights), sum(len(w) for w in weights)
    packed = count / 2 + count / EXACT_64.group_size / 2 + 8 * rows + 2 * (every - count - rows)
    assert packed / (2 * every) <= 0.29


def test_torch_compile_takes_every_block_with_one_graph(model: Denoiser) -> None:
    from torch._dynamo.utils import counters

    inputs = sample(model, 1)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(run_block, dynamic=False, fullgraph=True, backend="eager")
    assert torch.equal(model(*inputs, run=compiled), model(*inputs))
    assert counters["stats"]["unique_graphs"] == 1
