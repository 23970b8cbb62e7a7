"""BERT's encoder, in operations that export and that compute in the module's own type. Its pooler is left out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from export.models.text_modules import activation_of, attended, padding_bias

if TYPE_CHECKING:
    from transformers import BertModel
    from transformers.models.bert.modeling_bert import BertSelfAttention


class BiasedAttention(nn.Module):
    """BERT's self-attention without its last linear, with a bias of the scores that the caller makes once."""

    def __init__(self, of: BertSelfAttention) -> None:
        super().__init__()
        self.heads = of.num_attention_heads
        self.query, self.key, self.value = of.query, of.key, of.value

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [B, tokens, C] -> as x."""
        return attended(self.query(x), self.key(x), self.value(x), self.heads, bias)


def exportable(module: BertModel) -> BertModel:
    """The same module with its attentions replaced, without its pooler, which no pipeline reads, and without buffers
    that are made where they are used. Raises ModelError for an activation function that is not known."""
    activation_of(module.config.hidden_act, "hidden_act")
    module.pooler = None
    del module.embeddings.position_ids, module.embeddings.token_type_ids
    for layer in module.encoder.layer:
        setattr(layer.attention, "self", BiasedAttention(layer.attention.self))  # noqa: B010 - a name for mypy
    return module


def encode(module: BertModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """input_ids, attention_mask [B, tokens] int64 -> the last hidden state [B, tokens, C]. All tokens are of the first
    type. A token of mask 0 is read by no other one; where a prompt has no token at all, each reads all alike."""
    embeddings, device = module.embeddings, input_ids.device
    places, first = torch.arange(input_ids.shape[1], device=device), torch.zeros(1, 1, dtype=torch.int64, device=device)
    hidden = embeddings.word_embeddings(input_ids) + embeddings.token_type_embeddings(first)
    hidden = embeddings.LayerNorm(hidden + embeddings.position_embeddings(places))
    bias = padding_bias(attention_mask, hidden.dtype)
    activation = activation_of(module.config.hidden_act, "hidden_act")
    for layer in module.encoder.layer:
        mixed = layer.attention.output.dense(layer.attention.self(hidden, bias))
        hidden = layer.attention.output.LayerNorm(mixed + hidden)
        inner = activation(layer.intermediate.dense(hidden))
        hidden = layer.output.LayerNorm(layer.output.dense(inner) + hidden)
    result: Tensor = hidden
    return result
