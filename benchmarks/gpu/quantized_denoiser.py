"""The denoiser on our kernels: fused quantizers, GEMMs of 4-bit weights with their epilogues, attention by torch.

All kernels are called through `launch`, in whose place a test can put their NumPy references.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.gpu.denoiser import EPSILON, LINEARS, Denoiser, attention
from benchmarks.gpu.gemm import ACTIVATION, WEIGHT, Form
from benchmarks.gpu.weights import Packed, quantize_weight
from benchmarks.shapes import Granularity
from plugins.gpu import launch
from plugins.gpu.spec import FloatType, GemmSpec, QuantizeSpec

PACKED = Form("packed_gemm")


@dataclass(frozen=True)
class QuantizedLinear:
    """One linear: weights packed, or expanded u8 [N, K]; bias f32 [N]."""

    spec: GemmSpec
    packed: Packed
    bias: Tensor
    expanded: Tensor | None = None

    @property
    def size_bytes(self) -> int:
        """Of the weights as they are used, with their scales; and of the bias."""
        scales = self.packed.scales.numel() * 4
        weights = self.packed.size_bytes if self.expanded is None else self.expanded.numel() + scales
        return weights + 4 * self.bias.numel()

    def __call__(self, codes: tuple[Tensor, ...], tokens: int = 0, **epilogue: Tensor) -> Tensor:
        """y [M, N] of operand bytes u8 [M, K] and their scales f32 [M]."""
        (a, a_scale), packed = codes, self.packed
        named = {"a": a, "a_scale": a_scale, "w_scales": packed.scales, "bias": self.bias, **epilogue}
        if self.expanded is not None:
            return launch.expanded_gemm(self.spec, w=self.expanded, tokens=tokens, **named)
        named |= {"w": packed.codes, "multiplier_codes": packed.multiplier_codes}
        return launch.packed_gemm(self.spec, tokens=tokens, **named)


class QuantizedBlock:
    """A block on our kernels; x [B * T, C] stays in the type `dtype` between its linears."""

    def __init__(self, heads: int, linears: dict[str, QuantizedLinear], dtype: FloatType) -> None:
        self.heads, self.linears = heads, linears
        width = linears["qkv"].spec.in_features
        integers = linears["qkv"].spec.integers
        self.norm = QuantizeSpec(ACTIVATION, width, "norm_modulate", dtype, EPSILON, integers)
        self.plain = QuantizeSpec(ACTIVATION, width, "none", dtype, integers=integers)
        self.gelu = QuantizeSpec(ACTIVATION, 4 * width, "gelu", dtype, integers=integers)

    def __call__(self, x: Tensor, modulation: Tensor, words: tuple[Tensor, ...], one: Tensor) -> Tensor:
        """x [B * T, C], modulation [6, B, C], words: codes [B * L, C] and scales, one [B, C] of ones."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        of, batch, quantize = self.linears, len(one), launch.quantize
        tokens = len(x) // batch
        codes = quantize(self.norm, x, shift=shift1, scale=scale1, tokens=tokens)
        attended = self._attention(of["qkv"](codes).chunk(3, -1), batch)
        x = of["out"](quantize(self.plain, attended), gate=gate1, residual=x, tokens=tokens)
        query = of["cross_q"](quantize(self.plain, x))
        attended = self._attention((query, *of["cross_kv"](words).chunk(2, -1)), batch)
        x = of["cross_out"](quantize(self.plain, attended), gate=one, residual=x, tokens=tokens)
        codes = quantize(self.norm, x, shift=shift2, scale=scale2, tokens=tokens)
        codes = quantize(self.gelu, of["ff_in"](codes))
        return of["ff_out"](codes, gate=gate2, residual=x, tokens=tokens)

    def _attention(self, parts: tuple[Tensor, ...], batch: int) -> Tensor:
        q, k, v = (part.unflatten(0, (batch, -1)) for part in parts)
        return attention(q, k, v, self.heads).flatten(0, 1).contiguous()


class QuantizedDenoiser:
    """`base` with its blocks replaced; embeddings and the last layer stay as they are."""

    def __init__(self, base: Denoiser, blocks: list[QuantizedBlock]) -> None:
        self.base, self.blocks = base, blocks

    def __call__(self, latent: Tensor, timestep: Tensor, caption: Tensor) -> Tensor:
        x, modulations, words, embedded = self.base.begin(latent, timestep, caption)
        codes = launch.quantize(self.blocks[0].plain, words.flatten(0, 1))
        one, batch = torch.ones_like(modulations[0, 0]), len(x)
        x = x.flatten(0, 1).contiguous()
        for block, modulation in zip(self.blocks, modulations.contiguous(), strict=True):
            x = block(x, modulation, codes, one)
        return self.base.finish(x.unflatten(0, (batch, -1)), embedded)


def quantize_blocks(model: Denoiser, granularity: Granularity) -> list[dict[str, Packed]]:
    """All weights of the blocks' linears, packed."""
    return [
        {name: quantize_weight(linear.weight.detach(), WEIGHT, granularity) for name, linear in block.linears.items()}
        for block in model.blocks
    ]


def quantized(
    model: Denoiser,
    weights: list[dict[str, Packed]],
    dtype: FloatType = "bf16",
    form: Form = PACKED,
) -> QuantizedDenoiser:
    """`model` on our kernels, its linears by the kernel and on the operands of `form`."""
    blocks = []
    for block, packed in zip(model.blocks, weights, strict=True):
        linears = {name: _linear(block.linears[name], name, packed[name], dtype, form) for name in packed}
        blocks.append(QuantizedBlock(model.size.heads, linears, dtype))
    return QuantizedDenoiser(model, blocks)


def _linear(linear: nn.Module, name: str, packed: Packed, dtype: FloatType, form: Form) -> QuantizedLinear:
    n, half = packed.codes.shape
    epilogue, fields = LINEARS[name].epilogue, packed.granularity.spec_fields(WEIGHT)
    spec = GemmSpec(ACTIVATION, WEIGHT, 2 * half, n, epilogue=epilogue, output=dtype, integers=form.integers, **fields)
    expanded = None
    if form.kernel == "expanded_gemm":
        expanded = launch.expand(spec, packed.codes, multiplier_codes=packed.multiplier_codes)
    return QuantizedLinear(spec, packed, linear.bias.detach().float(), expanded)


def weight_bytes(model: Denoiser, blocks: list[QuantizedBlock]) -> int:
    """Bytes of all weights when the blocks' linears are these and the rest is bf16."""
    kept = sum(x.numel() for name, x in model.named_parameters() if ".linears." not in name)
    return 2 * kept + sum(linear.size_bytes for block in blocks for linear in block.linears.values())
