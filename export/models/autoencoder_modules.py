"""One half of a diffusers AutoencoderKL, in operations that export for any batch and any size of the picture.

The modules of diffusers stay, and with them every name of a weight, but three kinds are replaced: their upsampling asks
how many numbers a tensor has, which fixes the sizes of an exported graph; their attention is written for one that may
have masks, and their blocks divide by a factor of 1, a pass over every number of the largest tensors.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from torch import Tensor, nn

from export.errors import ModelError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D


class Upsampling(nn.Module):
    """x [B, C, H, W] -> conv of x [B, C, 2 H, 2 W], every number four times."""

    def __init__(self, of: Upsample2D) -> None:
        super().__init__()
        if not of.use_conv or of.use_conv_transpose or of.norm is not None or not of.interpolate:
            raise ModelError("an upsampling other than nearest neighbours and a convolution is not compiled")
        self.conv = of.conv

    def forward(self, x: Tensor, output_size: None = None) -> Tensor:
        result: Tensor = self.conv(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        return result


class ResidualBlock(nn.Module):
    """x + conv2(act(norm2(conv1(act(norm1(x)))))) for x [B, C, H, W], x through a convolution where channels change."""

    def __init__(self, of: ResnetBlock2D) -> None:
        super().__init__()
        others = (of.time_emb_proj, of.upsample, of.downsample)
        if any(part is not None for part in others) or of.output_scale_factor != 1:
            raise ModelError("a residual block with a timestep, another size or a factor is not compiled")
        self.norm1, self.conv1, self.norm2, self.conv2 = of.norm1, of.conv1, of.norm2, of.conv2
        self.conv_shortcut, self.nonlinearity = of.conv_shortcut, of.nonlinearity

    def forward(self, x: Tensor, temb: None = None) -> Tensor:
        hidden = self.conv1(self.nonlinearity(self.norm1(x)))
        hidden = self.conv2(self.nonlinearity(self.norm2(hidden)))
        result: Tensor = (x if self.conv_shortcut is None else self.conv_shortcut(x)) + hidden
        return result


class SpatialAttention(nn.Module):
    """x + attention among all places of norm(x) for x [B, C, H, W]; the tokens are the H W places."""

    def __init__(self, of: Attention) -> None:
        super().__init__()
        if of.rescale_output_factor != 1 or not of.residual_connection or of.spatial_norm is not None:
            raise ModelError("an attention with a factor, without a residual or with a spatial norm is not compiled")
        self.group_norm, self.heads = of.group_norm, of.heads
        self.to_q, self.to_k, self.to_v, self.to_out = of.to_q, of.to_k, of.to_v, of.to_out

    def forward(self, x: Tensor, temb: None = None) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, H W, C]
        query, key, value = (
            layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        result: Tensor = self.to_out[0](mixed.transpose(1, 2).flatten(2))
        return x + result.transpose(1, 2).unflatten(2, x.shape[2:])


REPLACEMENTS: dict[str, type[Upsampling] | type[ResidualBlock] | type[SpatialAttention]] = {
    "Upsample2D": Upsampling,
    "ResnetBlock2D": ResidualBlock,
    "Attention": SpatialAttention,
}


def stretch_ends(module: nn.Module) -> dict[str, nn.Module]:
    """Parts of an exportable half whose result is all that goes on to the next, by their paths in `module`."""
    ends = tuple(REPLACEMENTS.values())
    return {path: part for path, part in module.named_modules() if isinstance(part, ends)}


def exportable_half(module: AutoencoderKL, absent: Collection[str]) -> AutoencoderKL:
    """The same module with `absent`, its attributes of the other half, gone, and three kinds of part replaced.

    Raises ModelError for a kind of part that is not known here.
    """
    for name in absent:
        setattr(module, name, None)
    for path, part in list(module.named_modules()):
        if replacement := REPLACEMENTS.get(type(part).__name__):
            module.set_submodule(path, replacement(part))
    return module


def decode(module: AutoencoderKL, latents: Tensor) -> Tensor:
    """latents [B, C, h, w] -> picture [B, 3, H, W], as AutoencoderKL.decode without tiles."""
    hidden = latents if module.post_quant_conv is None else module.post_quant_conv(latents)
    result: Tensor = module.decoder(hidden)
    return result


def encode(module: AutoencoderKL, picture: Tensor) -> Tensor:
    """picture [B, 3, H, W] -> mean and logarithm of the variance [B, 2 C, h, w], as AutoencoderKL.encode has them."""
    hidden: Tensor = module.encoder(picture)
    result: Tensor = hidden if module.quant_conv is None else module.quant_conv(hidden)
    return result
