"""Torch modules around a model: named inputs, exportable attention, weights upcast at use."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from export.models.families import Config, Family

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention
    from diffusers.models.embeddings import Timesteps

MAX_PERIOD = 10_000  # of the slowest of the sines of a timestep


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

    Repeating it fixes the batch size in an exported graph. hidden_states: [B, S, C]; attention_mask: a bias
    [B, 1, L], or what the attention itself takes, [B, 1, S, L].
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
        mask = attention_mask
        if mask is not None and mask.ndim == 3:
            mask = mask[:, None]
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


class _Uninitialised(TorchFunctionMode):
    """Within, parameters are not filled."""

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        named = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else named["tensor"]
        return func(*args, **named)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Within, modules are made whose parameters have no memory, and whose buffers and other tensors have values."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    nn.Module.register_parameter = on_meta
    try:
        with _Uninitialised():
            yield
    finally:
        nn.Module.register_parameter = register


class TabledTimesteps(nn.Module):
    """Sines and cosines of timesteps [B] at frequencies from a table: [B, channels], as diffusers' Timesteps.

    Their frequencies are the same numbers wherever they run. Computed anew by another exponential they differ in the
    last bit, which a timestep of 10,000 makes an error of 6e-4 of the angle.
    """

    def __init__(self, of: Timesteps) -> None:
        super().__init__()
        half = of.num_channels // 2
        exponent = -math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32)
        table = torch.exp(exponent / (half - of.downscale_freq_shift))
        self.register_buffer("frequencies", table, persistent=False)
        self.cosine_first, self.scale, self.odd = of.flip_sin_to_cos, of.scale, of.num_channels % 2

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        angles = self.scale * (timesteps[:, None].float() * self.frequencies.float())
        waves = (angles.cos(), angles.sin()) if self.cosine_first else (angles.sin(), angles.cos())
        result = torch.cat(waves, dim=-1)
        return nn.functional.pad(result, (0, 1)) if self.odd else result


def use_tabled_timesteps(module: nn.Module) -> None:
    """Put the module above in the place of every Timesteps of `module`."""
    from diffusers.models.embeddings import Timesteps

    for path, part in list(module.named_modules()):
        if type(part) is Timesteps:
            module.set_submodule(path, TabledTimesteps(part))


def with_modules(module: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of the module tree with submodules replaced by path; all other tensors are shared, not copied."""
    memo: dict[int, torch.Tensor | nn.Module] = {
        id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())
    }
    memo |= {id(module.get_submodule(path)): replacement for path, replacement in replacements.items()}
    return copy.deepcopy(module, memo)


def set_resolution(module: nn.Module, height: int, width: int) -> None:
    """Recompute the position tables of all patch embeddings for latents of height x width, and note the size for what a
    recorded family gives the module beside its inputs.

    Diffusers would compute another size's table inside the graph; a model loaded without memory has none yet.
    """
    from diffusers import ModelMixin
    from diffusers.models.embeddings import PatchEmbed, get_2d_sincos_pos_embed

    for part in module.modules():
        if isinstance(part, ModelMixin):
            part.drawn_cells = (height, width)
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
