"""What the modules of text encoders share: masks as numbers that are added to scores, activation functions, a norm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from export.errors import ModelError

# What a masked token adds to a score: so far below any that nothing of the score is left beside it, and its weight is
# zero to the bit. Not the lowest number of a type, which the next rounding may take beyond it.
HOLE = -(2.0**100)


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), which CLIP has for GELU."""
    return x * torch.sigmoid(1.702 * x)


# By transformers' name; gelu_new and gelu_pytorch_tanh are the form with tanh.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.functional.gelu,
    "gelu_new": partial(nn.functional.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(nn.functional.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu": nn.functional.relu,
    "silu": nn.functional.silu,
}


def activation_of(name: str, key: str) -> Callable[[Tensor], Tensor]:
    """The function that a configuration's `key` names. Raises ModelError for one that is not in the table."""
    if name not in ACTIVATIONS:
        raise ModelError(f"{key} asks for {name}, which is none of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class RootMeanSquareNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis, in the type of x."""

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = weight, epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon))


def padding_bias(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """attention_mask [B, tokens] -> [B, 1, 1, tokens]: HOLE where it is 0, for every query."""
    return (1 - attention_mask[:, None, None, :].to(dtype)) * HOLE


def causal_bias(tokens: int, like: Tensor, window: int | None = None) -> Tensor:
    """[1, 1, tokens, tokens] of the type of `like`: HOLE for keys (last axis) behind the query, and for those that lie
    `window` tokens or more in front of it."""
    place = torch.arange(tokens, device=like.device)
    hidden = place[None, :] > place[:, None]
    if window is not None:
        hidden = hidden | (place[None, :] <= place[:, None] - window)
    return hidden.to(like.dtype)[None, None] * HOLE


def attended(query: Tensor, key: Tensor, value: Tensor, heads: int, bias: Tensor, scale: float | None = None) -> Tensor:
    """Attention of projections [B, tokens, heads * channels] with a bias that broadcasts to [B, heads, tokens, tokens];
    scale None: 1 / sqrt(channels)."""
    parts = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    mixed = nn.functional.scaled_dot_product_attention(*parts, attn_mask=bias, scale=scale)
    return mixed.transpose(1, 2).flatten(2)
