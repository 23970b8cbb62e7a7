"""CLIP's text encoders, with and without projection, in operations that export and compute in the module's own type.

Pipelines of diffusers call them without a mask, which is a mask of ones: padding is read by itself and by what stands
behind it, and Stable Diffusion reads the rows of all tokens. A mask from the tokenizer changes the rows of padding
alone: attention is causal, so that a prompt's tokens never see what stands behind them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from export.models.end_token import LEGACY_END, end_token
from export.models.text_modules import activation_of, attended, causal_bias, padding_bias

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection
    from transformers.models.clip.modeling_clip import CLIPAttention


class BiasedAttention(nn.Module):
    """CLIP's self-attention with a bias of the scores that the caller makes once for all layers."""

    def __init__(self, of: CLIPAttention) -> None:
        super().__init__()
        self.heads = of.num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = of.q_proj, of.k_proj, of.v_proj, of.out_proj

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [B, tokens, C] -> as x."""
        mixed = attended(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, bias)
        result: Tensor = self.out_proj(mixed)
        return result


def text_model_of(module: nn.Module) -> CLIPTextModel:
    """The encoder itself, which the class with a projection holds as a part."""
    part: CLIPTextModel = getattr(module, "text_model", module)
    return part


def exportable(module: nn.Module) -> nn.Module:
    """The same module with its attentions replaced, and without buffers that are made where they are used.

    Raises ModelError for an activation function or an end token that is not known.
    """
    text = text_model_of(module)
    activation_of(text.config.hidden_act, "hidden_act")
    end_token(text.config.to_dict())
    del text.embeddings.position_ids
    for layer in text.encoder.layers:
        layer.self_attn = BiasedAttention(layer.self_attn)
    return module


def encode(
    module: CLIPTextModel | CLIPTextModelWithProjection, input_ids: Tensor, attention_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask [B, tokens] int64 -> the last hidden state [B, tokens, C], normalised; that of the
    prompt's end, projected where the class does so, [B, P]; the hidden state before the last layer, [B, tokens, C]."""
    text = text_model_of(module)
    tokens, embeddings = input_ids.shape[1], text.embeddings
    hidden = embeddings.token_embedding(input_ids)
    hidden = hidden + embeddings.position_embedding(torch.arange(tokens, device=input_ids.device))
    bias = causal_bias(tokens, hidden) + padding_bias(attention_mask, hidden.dtype)
    activation = activation_of(text.config.hidden_act, "hidden_act")
    penultimate = hidden
    for layer in text.encoder.layers:
        penultimate = hidden
        hidden = hidden + layer.self_attn(layer.layer_norm1(hidden), bias)
        hidden = hidden + layer.mlp.fc2(activation(layer.mlp.fc1(layer.layer_norm2(hidden))))
    last: Tensor = text.final_layer_norm(hidden)
    pooled = last.flatten(0, 1).index_select(0, end_rows(input_ids, text.config.eos_token_id))
    return last, module.text_projection(pooled) if hasattr(module, "text_projection") else pooled, penultimate


def end_rows(input_ids: Tensor, eos_token_id: int) -> Tensor:
    """[B]: the row of each prompt's first end token among all tokens of a batch; by the legacy rule, of the largest id;
    a prompt without one has its first."""
    ids = input_ids.to(torch.int32)  # onnxruntime finds the largest of these, not of int64
    marks = ids if eos_token_id == LEGACY_END else (ids == eos_token_id).to(torch.int32)
    batch, tokens = input_ids.shape
    return marks.argmax(-1) + torch.arange(batch, device=input_ids.device) * tokens
