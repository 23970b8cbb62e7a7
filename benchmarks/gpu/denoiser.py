"""PixArt in a few lines of torch, and the same with its linears on our kernels: the whole-model part of the benchmark.

The plain one computes what diffusers' PixArtTransformer2DModel does, with q, k and v in one linear, no attention mask
and no resolution conditions. It has random weights, scaled so that signals neither die nor grow over the layers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.gpu.weights import Packed, dequantized, fake_quantize
from plugins.gpu.spec import Epilogue

EPSILON, TIME_CHANNELS, SMALL = 1e-6, 256, 0.02


@dataclass(frozen=True)
class Size:
    """PixArt-XL/2 unless told otherwise. caption: its tokens."""

    width: int = 1152
    heads: int = 16
    layers: int = 28
    caption: int = 120
    caption_channels: int = 4096
    channels: int = 4
    patch: int = 2

    @property
    def out_channels(self) -> int:
        return 2 * self.channels


@dataclass(frozen=True)
class Linear:
    """One quantized linear of a block: outputs and inputs in widths, and what its GEMM does before it writes."""

    outputs: int
    inputs: int
    epilogue: Epilogue = "none"


LINEARS = {
    "qkv": Linear(3, 1),
    "out": Linear(1, 1, "gate_residual"),
    "cross_q": Linear(1, 1),
    "cross_kv": Linear(2, 1),
    "cross_out": Linear(1, 1, "gate_residual"),
    "ff_in": Linear(4, 1),
    "ff_out": Linear(1, 4, "gate_residual"),
}


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """q [B, T, C], k and v [B, S, C] -> [B, T, C]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift."""
    return functional.layer_norm(x, x.shape[-1:], eps=EPSILON) * (1 + scale) + shift


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward with adaLN modulation."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        rows = {name: (row.inputs * size.width, row.outputs * size.width) for name, row in LINEARS.items()}
        self.linears = nn.ModuleDict({name: nn.Linear(*row) for name, row in rows.items()})

    def forward(self, x: Tensor, modulation: Tensor, caption: Tensor) -> Tensor:
        """x [B, T, C], modulation [6, B, C], caption [B, L, C] -> [B, T, C]."""
        of, heads = self.linears, self.heads
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation[:, :, None]
        q, k, v = of["qkv"](modulate(x, shift1, scale1)).chunk(3, -1)
        x = x + gate1 * of["out"](attention(q, k, v, heads))
        k, v = of["cross_kv"](caption).chunk(2, -1)
        x = x + of["cross_out"](attention(of["cross_q"](x), k, v, heads))
        hidden = functional.gelu(of["ff_in"](modulate(x, shift2, scale2)), approximate="tanh")
        return x + gate2 * of["ff_out"](hidden)


def positions(grid: int, width: int, base: int, scale: float) -> Tensor:
    """Sines and cosines of the column, then of the row, f32 [grid^2, width], positions in units of base / grid."""
    place = torch.arange(grid, dtype=torch.float32) / (grid / base) / scale
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    row, column = torch.meshgrid(place, place, indexing="ij")
    angles = [torch.outer(where.reshape(-1).double(), frequency) for where in (column, row)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1).float()


def time_embedding(timestep: Tensor) -> Tensor:
    """timestep [B] -> cosines and sines f32 [B, TIME_CHANNELS]."""
    half = TIME_CHANNELS // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, device=timestep.device) / half)
    angle = timestep[:, None].float() * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


Run = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def run_block(block: nn.Module, x: Tensor, modulation: Tensor, caption: Tensor) -> Tensor:
    """A block as it is; what torch.compile is given."""
    y: Tensor = block(x, modulation, caption)
    return y


class Denoiser(nn.Module):
    """latent [B, 4, H, W], timestep [B], caption [B, L, 4096] -> [B, 8, H, W]."""

    position: Tensor

    def __init__(self, size: Size, grid: int) -> None:
        super().__init__()
        c, self.size = size.width, size
        self.patches = nn.Conv2d(size.channels, c, size.patch, size.patch)
        self.caption_in, self.caption_out = nn.Linear(size.caption_channels, c), nn.Linear(c, c)
        self.time_in, self.time_out = nn.Linear(TIME_CHANNELS, c), nn.Linear(c, c)
        self.modulation = nn.Linear(c, 6 * c)
        self.tables = nn.Parameter(torch.zeros(size.layers, 6, c))
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.last_table = nn.Parameter(torch.zeros(2, c))
        self.last = nn.Linear(c, size.patch**2 * size.out_channels)
        self.register_buffer("position", torch.empty(0), persistent=False)
        self.resize(grid)

    def resize(self, grid: int) -> None:
        """Take latents of grid x grid patches."""
        position = positions(grid, self.size.width, grid, max(grid * self.size.patch // 64, 1))
        self.position = position.to(self.last_table.device, self.last_table.dtype)
        self.grid = grid

    def forward(self, latent: Tensor, timestep: Tensor, caption: Tensor, run: Run = run_block) -> Tensor:
        x, modulations, words, embedded = self.begin(latent, timestep, caption)
        for block, modulation in zip(self.blocks, modulations, strict=True):
            x = run(block, x, modulation, words)
        return self.finish(x, embedded)

    def begin(self, latent: Tensor, timestep: Tensor, caption: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the blocks get: x [B, T, C], modulations [layers, 6, B, C], caption [B, L, C], timestep [B, C]."""
        x = functional.linear(self.cells(latent), self.patches.weight.flatten(1), self.patches.bias) + self.position
        embedded = self.time_out(functional.silu(self.time_in(time_embedding(timestep).to(x.dtype))))
        shared = self.modulation(functional.silu(embedded)).unflatten(-1, (6, -1)).transpose(0, 1)
        words = self.caption_out(functional.gelu(self.caption_in(caption), approximate="tanh"))
        return x, self.tables[:, :, None] + shared, words, embedded

    def cells(self, latent: Tensor) -> Tensor:
        """latent [B, 4, H, W] -> what each patch is made of, [B, T, 16]: the convolution as a linear, without TF32."""
        patch = self.size.patch
        parts = latent.unflatten(3, (self.grid, patch)).unflatten(2, (self.grid, patch))
        return parts.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def finish(self, x: Tensor, embedded: Tensor) -> Tensor:
        """x [B, T, C] -> the picture [B, 8, H, W]."""
        shift, scale = (self.last_table[:, None] + embedded)[:, :, None]
        patches = self.last(modulate(x, shift, scale))
        side, size = self.grid, self.size
        cells = patches.reshape(-1, side, side, size.patch, size.patch, size.out_channels)
        edge = side * size.patch
        return cells.permute(0, 5, 1, 3, 2, 4).reshape(-1, size.out_channels, edge, edge)


@torch.no_grad()
def randomize(model: Denoiser) -> Denoiser:
    """Draw all weights: linears that keep a signal's size, those that add to the stream smaller, gates about a half."""
    generator = torch.Generator(device=model.last_table.device).manual_seed(0)
    quiet = 1 / math.sqrt(2 * model.size.layers)
    for name, value in model.named_parameters():
        value.normal_(generator=generator)
        adds = name.endswith(("out.weight", "ff_out.weight")) and name.startswith("blocks")
        by_size = (quiet if adds else 1) / math.sqrt(value[0].numel())
        value.mul_(SMALL if value.dim() == 1 or "table" in name else by_size)
    model.modulation.weight *= SMALL
    model.tables[:, (2, 5)] += 0.5
    return model


def sample(model: Denoiser, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """latent, timestep and caption for `batch` pictures."""
    like, size = model.last_table, model.size
    generator = torch.Generator(device=like.device).manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=like.device).to(like.dtype)

    edge = model.grid * size.patch
    timestep = torch.full((batch,), 500.0, device=like.device)
    return draw(batch, size.channels, edge, edge), timestep, draw(batch, size.caption, size.caption_channels)


# --- in plain arithmetic on dequantized numbers -----------------------------------------------------------------------


class FakeQuantLinear(nn.Module):
    """A linear on dequantized weights that rounds its input to `activation`'s grid, each token under its own scale."""

    def __init__(self, weight: Tensor, bias: Tensor, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(fake_quantize(x, self.activation).to(x.dtype), self.weight, self.bias)


def fake_quantized(model: Denoiser, weights: list[dict[str, Packed]], activation: str, dtype: torch.dtype) -> Denoiser:
    """`model` in `dtype` with its quantized linears replaced: what the kernels' model is compared with."""
    quantized = copy.deepcopy(model).to(dtype)
    for block, packed in zip(quantized.blocks, weights, strict=True):
        for name, weight in packed.items():
            bias = block.linears[name].bias.detach().to(dtype)
            block.linears[name] = FakeQuantLinear(dequantized(weight).to(dtype), bias, activation)
    return quantized
