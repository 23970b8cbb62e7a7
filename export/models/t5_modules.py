"""T5 encoders, mT5 and umT5 among them, in operations that export and that compute in the module's own type.

The modules of transformers stay, and with them every name of a weight, but three kinds are replaced. Their norm
computes its variance in float32 whatever the module's type is, so that a float64 reference would be none. Their bucket
of a distance is a logarithm in float32, whose last digit differs between runtimes, and with it the bucket; here it is a
table by distance, computed once by their own function. Their feed-forward looks at the weight of its last linear to
keep that one in float32 beside others in float16, in which its sums overflow; here all sums are at least float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from export.errors import ModelError
from export.models.text_modules import RootMeanSquareNorm, activation_of, attended, padding_bias

if TYPE_CHECKING:
    from transformers.models.t5.modeling_t5 import T5Attention, T5DenseActDense, T5DenseGatedActDense, T5EncoderModel


class FeedForward(nn.Module):
    """wo(activation(wi x))."""

    def __init__(self, of: T5DenseActDense, activation: str) -> None:
        super().__init__()
        self.wi, self.wo = of.wi, of.wo
        self.activation = activation_of(activation, "feed_forward_proj")

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.wo(self.activation(self.wi(x)))
        return result


class GatedFeedForward(nn.Module):
    """wo(activation(wi_0 x) * wi_1 x)."""

    def __init__(self, of: T5DenseGatedActDense, activation: str) -> None:
        super().__init__()
        self.wi_0, self.wi_1, self.wo, self.activation = (
            of.wi_0,
            of.wi_1,
            of.wo,
            activation_of(activation, "feed_forward_proj"),
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.wo(self.activation(self.wi_0(x)) * self.wi_1(x))
        return result


class RelativeAttention(nn.Module):
    """Self-attention without a scale, its scores moved by a bias [1 or B, heads, tokens, tokens] that all blocks share.

    Has the linears of transformers' own module, and where that has one its table of biases [buckets, heads]; then
    `buckets` [2 * reach + 1] int64 is the bucket of each distance from -reach to reach, beyond which nothing changes.
    """

    def __init__(self, of: T5Attention) -> None:
        super().__init__()
        self.heads = of.n_heads
        self.q, self.k, self.v, self.o = of.q, of.k, of.v, of.o
        self.reach = 0
        if of.has_relative_attention_bias:
            self.relative_attention_bias = of.relative_attention_bias
            self.reach = of.relative_attention_max_distance
            self.register_buffer("buckets", bucket_table(of), persistent=False)

    def position_bias(self, tokens: int, device: torch.device) -> Tensor:
        """[1, heads, tokens, tokens]: of a query (third axis) and a key (fourth)."""
        place = torch.arange(tokens, device=device)
        distance = (place[None, :] - place[:, None]).clamp(-self.reach, self.reach)
        bucket = self.get_buffer("buckets").index_select(0, (distance + self.reach).flatten())
        bias: Tensor = self.relative_attention_bias(bucket.reshape(tokens, tokens))
        return bias.permute(2, 0, 1)[None]

    def mixed(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [B, tokens, C] -> as x."""
        result: Tensor = self.o(attended(self.q(x), self.k(x), self.v(x), self.heads, bias, scale=1.0))
        return result

    def forward(self, x: Tensor, position_bias: Tensor, **unused: object) -> tuple[Tensor, Tensor, None]:
        """As transformers' blocks of T5 and mT5 ask for: the result, the bias, no weights."""
        return self.mixed(x, position_bias), position_bias, None


class OwnBiasAttention(RelativeAttention):
    """The same with a bias of its own in every block, as umT5 has it."""

    def forward(self, x: Tensor, attention_mask: Tensor, **unused: object) -> tuple[Tensor, None]:  # type: ignore[override]
        """attention_mask: what is added to the scores for padding."""
        return self.mixed(x, self.position_bias(x.shape[1], x.device) + attention_mask), None


def bucket_table(attention: T5Attention) -> Tensor:
    """The bucket of each distance (key - query) from -reach to reach, [2 * reach + 1] int64, by transformers' own
    function. Raises ModelError where buckets change beyond the reach, or there are none for so few."""
    reach, buckets = attention.relative_attention_max_distance, attention.relative_attention_num_buckets
    if buckets < 4 or reach <= buckets // 4:
        raise ModelError(
            f"relative_attention_num_buckets {buckets} and relative_attention_max_distance {reach}: half of the "
            "buckets of a side are for single distances, and the distance must reach beyond them; check config.json"
        )
    table_of = attention._relative_position_bucket
    with torch.device("cpu"):
        distances = torch.arange(-2 * reach, 2 * reach + 1)
        own = type(attention).__name__ == "UMT5Attention"  # it takes the other arguments from itself
        table: Tensor = table_of(distances) if own else table_of(distances, True, buckets, reach)
    if bool((table[:reach] != table[reach]).any() or (table[-reach:] != table[-reach - 1]).any()):
        raise ModelError(
            f"buckets of distances beyond relative_attention_max_distance {reach} differ; check config.json"
        )
    return table[reach:-reach].clone()


def exportable(module: T5EncoderModel) -> T5EncoderModel:
    """The same module, of T5, mT5 or umT5, with the three kinds of part replaced, and one table of tokens where it had
    two of one tensor.

    Raises ModelError for an activation function or buckets that are not known here.
    """
    activation, prefix = module.config.dense_act_fn, type(module).__name__.removesuffix("EncoderModel")
    replacements: dict[str, Callable[..., nn.Module]] = {
        f"{prefix}LayerNorm": lambda part: RootMeanSquareNorm(part.weight, part.variance_epsilon),
        f"{prefix}Attention": OwnBiasAttention if prefix == "UMT5" else RelativeAttention,
        f"{prefix}DenseActDense": partial(FeedForward, activation=activation),
        f"{prefix}DenseGatedActDense": partial(GatedFeedForward, activation=activation),
    }
    module.encoder.set_input_embeddings(None)
    for path, part in list(module.named_modules()):
        if replacement := replacements.get(type(part).__name__):
            module.set_submodule(path, replacement(part))
    return module


def encode(module: T5EncoderModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """input_ids, attention_mask [B, tokens] int64 -> the last hidden state [B, tokens, d_model].

    A token of mask 0 is read by no other one; where a prompt has no token at all, each reads all alike.
    """
    hidden: Tensor = module.shared(input_ids)
    first = module.encoder.block[0].layer[0].SelfAttention
    padding = padding_bias(attention_mask, hidden.dtype)
    if isinstance(first, OwnBiasAttention):
        for block in module.encoder.block:
            hidden = block(hidden, attention_mask=padding)
    else:
        bias = first.position_bias(input_ids.shape[1], input_ids.device) + padding
        for block in module.encoder.block:
            hidden = block(hidden, position_bias=bias)[0]
    result: Tensor = module.encoder.final_layer_norm(hidden)
    return result
