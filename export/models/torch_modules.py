"""Torch modules around a model: named inputs, exportable attention, weights upcast at use."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from export.models.families import Config, Family

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention


class Denoiser(nn.Module):
    """A model called with the family's inputs, by name or in the order of its table.

    The wrapped module is `transformer`; the result is the output tensor, [B, C, H, W] of a denoiser, [B, tokens, C] of
    a text encoder, float32; or a tuple where the family has several.
    """

    def __init__(self, transformer: nn.Module, family: Family, names: tuple[str, ...]) -> None:
        super().__init__()
        self.transformer, self.family, self.names = transformer, family, names

    def forward(self, *args: torch.Tensor, **named: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        inputs = dict(zip(self.names, args, strict=False)) | named
        missing, unknown = set(self.names) - set(inputs), set(inputs) - set(self.names)
        if missing or unknown:
            raise TypeError(
                f"{self.family.name} takes {self.names}; missing {sorted(missing)}, unknown {sorted(unknown)}"
            )
        return self.family.call(self.transformer, {name: inputs[name] for name in self.names})

    def outputs(self, *args: torch.Tensor, **named: torch.Tensor) -> dict[str, torch.Tensor]:
        """The result by the names of the family's outputs."""
        result = self(*args, **named)
        tensors = result if isinstance(result, tuple) else (result,)
        return dict(zip(self.family.outputs, tensors, strict=True))


def first_output(result: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Of what a `Denoiser` returns."""
    return result[0] if isinstance(result, tuple) else result


def stated_config(module: nn.Module) -> Config:
    """The configuration of a module of diffusers, where it is a mapping, or of transformers."""
    config = module.config
    return config if isinstance(config, Mapping) else config.to_dict()


class UpcastLinear(nn.Linear):
    """A linear whose weight stays in the file's 16-bit type and is upcast to float32 at every call."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype), self.bias)


class UpcastEmbedding(nn.Embedding):
    """A table that stays in fp16; the rows that are looked up are upcast to float32."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).float()


def linear_like(linear: nn.Linear, weight: torch.Tensor, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    """A layer of class `kind` with `weight` [N, K], and sizes and bias of `linear`; nothing is copied."""
    with torch.device("meta"):
        layer = kind(linear.in_features, linear.out_features, bias=linear.bias is not None)
    layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), linear.bias
    return layer


class MaskedAttention:
    """Attention processor: diffusers' default one with the mask broadcast over heads instead of repeated.

    Repeating it fixes the batch size in an exported graph. hidden_states: [B, S, C]; attention_mask: [B, 1, L] bias.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **unused: object,
    ) -> torch.Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, source), (attn.to_v, source))
        )
        mask = None if attention_mask is None else attention_mask[:, None]
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))


def use_masked_attention(module: nn.Module) -> None:
    """Give every plain attention of `module` the processor above; other kinds of attention keep theirs."""
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    for part in module.modules():
        if isinstance(part, Attention) and isinstance(part.processor, AttnProcessor2_0) and _is_plain(part):
            part.set_processor(MaskedAttention())


def _is_plain(attention: Attention) -> bool:
    extras = (attention.spatial_norm, attention.group_norm, attention.norm_q, attention.norm_k, attention.norm_cross)
    return not any(extras) and not attention.residual_connection and attention.rescale_output_factor == 1.0


def with_modules(module: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of the module tree with submodules replaced by path; all other tensors are shared, not copied."""
    memo: dict[int, torch.Tensor | nn.Module] = {
        id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())
    }
    memo |= {id(module.get_submodule(path)): replacement for path, replacement in replacements.items()}
    return copy.deepcopy(module, memo)


def set_resolution(module: nn.Module, height: int, width: int) -> None:
    """Recompute the position tables of all patch embeddings for an input of [B, C, height, width].

    Diffusers would compute another size's table inside the graph; a model loaded without memory has none yet.
    """
    from diffusers.models.embeddings import PatchEmbed, get_2d_sincos_pos_embed

    for part in module.modules():
        if not isinstance(part, PatchEmbed) or part.pos_embed is None or part.pos_embed_max_size:
            continue
        part.height, part.width = height // part.patch_size, width // part.patch_size
        table = get_2d_sincos_pos_embed(
            embed_dim=part.pos_embed.shape[-1],
            grid_size=(part.height, part.width),
            base_size=part.base_size,
            interpolation_scale=part.interpolation_scale,
            output_type="pt",
        )
        part.register_buffer("pos_embed", table.float().unsqueeze(0), persistent=False)
