"""Causal language models as text encoders: Gemma 2, Qwen 2, 2.5 VL and 3, in operations that export and that compute in
the module's own type.

Pipelines of diffusers read two of their hidden states: the last one, normalised, and the one before the last layer. The
linears of transformers' modules stay, and with them every name of a weight. Positions are counted from the first token
of a row, masked or not, as transformers counts them where it is given no places; nothing is kept between calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from export.documents import shown
from export.errors import ModelError
from export.models.prompt_length import longest_prompt
from export.models.text_modules import RootMeanSquareNorm, activation_of, causal_bias, padding_bias

if TYPE_CHECKING:
    from transformers import Gemma2Model, Qwen2_5_VLTextModel, Qwen2Model, Qwen3Model

    CausalModel: TypeAlias = Gemma2Model | Qwen2Model | Qwen2_5_VLTextModel | Qwen3Model

SLIDING, FULL = "sliding_attention", "full_attention"
# What a configuration says of rotary positions without asking for another form of them, beside the two keys that are
# read of text alone: the wavelength, and which channels turn by which of three positions, which are one then.
PLAIN_ROPE = {"rope_type": ("default",), "type": ("default", "mrope"), "partial_rotary_factor": (1.0,)}
READ_ROPE = ("rope_theta", "mrope_section")


class OffsetNorm(RootMeanSquareNorm):
    """The same with 1 + weight for its factor, as Gemma has it."""

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.weight) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon))


class RotaryTables(nn.Module):
    """Cosines and sines [places, channels / 2] of rotary positions (arXiv 2104.09864), by place.

    Computed in float64 and rounded once; transformers computes them in float32, and is as far from these as its
    roundings.
    """

    def __init__(self, places: int, channels: int, base: float) -> None:
        super().__init__()
        with torch.device("cpu"):
            rates = base ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
            angles = torch.arange(places, dtype=torch.float64)[:, None] * rates
        self.register_buffer("cosines", angles.cos().float(), persistent=False)
        self.register_buffer("sines", angles.sin().float(), persistent=False)

    def forward(self, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """[tokens, channels / 2] each, of the first places."""
        places = torch.arange(tokens, device=device)
        return self.get_buffer("cosines").index_select(0, places), self.get_buffer("sines").index_select(0, places)


def turned(heads: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """heads [B, H, tokens, D], each pair of channels (i, i + D / 2) turned by the angle of its place."""
    cosines, sines = rotary
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)


class GroupedAttention(nn.Module):
    """Self-attention with rotary positions, in which several heads of queries share one of keys and values.

    cap: scores s become cap * tanh(s / cap), as Gemma 2 caps them; None: they stay as they are. Queries and keys go
    through norms of their own where the module of transformers has them.
    """

    def __init__(self, of: Any, cap: float | None) -> None:
        super().__init__()
        self.channels, self.scale, self.cap = of.head_dim, of.scaling, cap
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = of.q_proj, of.k_proj, of.v_proj, of.o_proj
        self.q_norm, self.k_norm = getattr(of, "q_norm", nn.Identity()), getattr(of, "k_norm", nn.Identity())
        heads = of.q_proj.out_features // of.head_dim
        with torch.device("cpu"):
            owners = torch.arange(heads) // of.num_key_value_groups
        self.register_buffer("owners", owners, persistent=False)  # of each head of queries its head of keys

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], bias: Tensor) -> Tensor:
        """x [B, tokens, C] -> as x. bias: what is added to the scores [B, heads, tokens, tokens]."""
        query = turned(self.q_norm(self._heads(self.q_proj(x))).transpose(1, 2), rotary)
        key = turned(self.k_norm(self._heads(self.k_proj(x))).transpose(1, 2), rotary)
        value = self._heads(self.v_proj(x)).transpose(1, 2)
        owners = self.get_buffer("owners")
        key, value = key.index_select(1, owners), value.index_select(1, owners)
        result: Tensor = self.o_proj(self._mixed(query, key, value, bias).transpose(1, 2).flatten(2))
        return result

    def _heads(self, x: Tensor) -> Tensor:
        """[B, tokens, H * D] -> [B, tokens, H, D]."""
        return x.unflatten(-1, (-1, self.channels))

    def _mixed(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        if self.cap is None:
            return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=self.scale)
        scores = torch.tanh((query * (self.scale / self.cap)) @ key.transpose(2, 3)) * self.cap
        return torch.softmax(scores + bias, dim=-1) @ value


def exportable(module: CausalModel) -> CausalModel:
    """The same module with its norms, attentions and rotary positions replaced, and a plain table of tokens.

    Raises ModelError for an activation function, a form of rotary positions or a kind of attention that is not known.
    """
    config = module.config
    activation_of(*activation(config))
    base = rotary_base(config.rope_parameters)
    if unknown := sorted(set(config.layer_types) - {SLIDING, FULL}):
        raise ModelError(f"layer_types asks for {', '.join(unknown)}, which is none of {SLIDING}, {FULL}")
    if SLIDING in config.layer_types and config.sliding_window is None:
        raise ModelError(f"layer_types asks for {SLIDING} without a sliding_window; state its tokens")
    refuse_numbers(config)
    if getattr(config, "use_bidirectional_attention", None):
        raise ModelError("use_bidirectional_attention is true; a causal model alone is compiled, give one")
    for path, part in list(module.named_modules()):
        kind = type(part).__name__
        if kind == "Gemma2RMSNorm":
            module.set_submodule(path, OffsetNorm(part.weight, part.eps))
        elif kind.endswith("RMSNorm"):
            module.set_submodule(path, RootMeanSquareNorm(part.weight, part.variance_epsilon))
    for layer in module.layers:
        layer.self_attn = GroupedAttention(layer.self_attn, getattr(config, "attn_logit_softcapping", None))
    places = longest_prompt(config.to_dict())
    module.rotary_emb = RotaryTables(places, module.layers[0].self_attn.channels, base)
    table = nn.Embedding(config.vocab_size, config.hidden_size, device="meta")
    table.weight = module.embed_tokens.weight
    module.embed_tokens = table  # Gemma's multiplies by a buffer that is made in float32
    return module


def activation(config: Any) -> tuple[str, str]:
    """The name of the activation function, and the key that says it."""
    key = "hidden_activation" if hasattr(config, "hidden_activation") else "hidden_act"
    return getattr(config, key), key


def refuse_numbers(config: Any) -> None:
    """Raise ModelError for numbers that no attention, norm or rotary position can be computed with."""
    channels = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cap, norm = getattr(config, "attn_logit_softcapping", None), config.rms_norm_eps
    rules = (
        ("channels of a head", channels, channels > 0 and channels % 2 == 0, "an even number above 0"),
        ("attn_logit_softcapping", cap, cap is None or cap > 0, "above 0, or null"),
        ("max_position_embeddings", config.max_position_embeddings, config.max_position_embeddings > 0, "above 0"),
        ("rms_norm_eps", norm, norm >= 0, "0 or above"),
        ("rope_theta", config.rope_parameters["rope_theta"], config.rope_parameters["rope_theta"] > 0, "above 0"),
    )
    for name, value, fits, rule in rules:
        if not fits:
            raise ModelError(f"{name} is {shown(value)}, which must be {rule}; correct config.json")


def rotary_base(parameters: Mapping[str, Any]) -> float:
    """Wavelength of the slowest pair of channels, by 2 pi. Raises ModelError for rotary positions of another form."""
    for key, value in parameters.items():
        if key not in READ_ROPE and value not in PLAIN_ROPE.get(key, ()):
            raise ModelError(
                f"rope_parameters asks for {key} {shown(value)}; rotary positions are compiled with rope_type default "
                "alone"
            )
    return float(parameters["rope_theta"])


def encode(module: CausalModel, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """input_ids, attention_mask [B, tokens] int64 -> the last hidden state, normalised, and the one before the last
    layer, as it is; [B, tokens, C] each.

    A token reads itself and those in front of it whose mask is 1, in layers of sliding attention the nearest of them
    alone. Of a prompt without any token each row reads all up to its own alike.
    """
    config, tokens = module.config, input_ids.shape[1]
    hidden = module.embed_tokens(input_ids).to(module.norm.weight.dtype)
    if isinstance(module.norm, OffsetNorm):
        hidden = hidden * config.hidden_size**0.5
    padding = padding_bias(attention_mask, hidden.dtype)
    biases = {window: causal_bias(tokens, hidden, window) + padding for window in dict.fromkeys(windows(config))}
    rotary = module.rotary_emb(tokens, input_ids.device)
    penultimate = hidden
    for layer, window in zip(module.layers, windows(config), strict=True):
        penultimate = hidden
        hidden = _layer(layer, hidden, rotary, biases[window], config)
    last: Tensor = module.norm(hidden)
    return last, penultimate


def windows(config: Any) -> list[int | None]:
    """Of each layer, how many tokens it reads at most; None: all in front, of any prompt that is taken."""
    limits = config.sliding_window is not None and config.sliding_window < longest_prompt(config.to_dict())
    return [config.sliding_window if limits and kind == SLIDING else None for kind in config.layer_types]


def _layer(layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor], bias: Tensor, config: Any) -> Tensor:
    """Gemma's layers have a norm behind attention and feed-forward, too."""
    mixed = layer.self_attn(layer.input_layernorm(hidden), rotary, bias)
    if not hasattr(layer, "pre_feedforward_layernorm"):
        hidden = hidden + mixed
        return hidden + _fed_forward(layer.mlp, layer.post_attention_layernorm(hidden), config)
    hidden = hidden + layer.post_attention_layernorm(mixed)
    fed = _fed_forward(layer.mlp, layer.pre_feedforward_layernorm(hidden), config)
    return hidden + layer.post_feedforward_layernorm(fed)


def _fed_forward(mlp: Any, x: Tensor, config: Any) -> Tensor:
    result: Tensor = mlp.down_proj(activation_of(*activation(config))(mlp.gate_proj(x)) * mlp.up_proj(x))
    return result
