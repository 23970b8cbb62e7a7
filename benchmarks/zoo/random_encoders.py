"""Small CLIP, BERT, Gemma 2 and Qwen 3 encoders with random weights, for measuring formats.

Outliers are planted where trained ones have them, as in benchmarks/zoo/make_t5_xxl.py: in the stream between blocks
(BERT's and what Gemma's blocks add to it, which are normalised, by the norms' weights), in the norms in front of
linears, and in the feed-forward's inner channels.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    Gemma2Config,
    Gemma2Model,
    Qwen3Config,
    Qwen3Model,
)

from benchmarks.zoo.make_t5_xxl import GATED, NORM, SCORES, SMALL, STREAM, outliers

if TYPE_CHECKING:
    from torch import nn

# Linears that write to the stream, and those whose outputs are the feed-forward's inner channels.
TO_STREAM = ("out_proj", "fc2", "attention.output.dense", "output.dense", "o_proj", "down_proj")
INNER = ("fc1", "intermediate.dense", "gate_proj", "up_proj")
QUERIES = ("q_proj", "query")
# Norms behind the last layer, whose channels are the output's, and those of queries and keys, by head.
NORMS_WITHOUT = ("final_layer_norm", "norm", "q_norm", "k_norm")
# Gemma's norms of what a block adds to the stream.
NORMS_TO_STREAM = ("post_attention_layernorm", "post_feedforward_layernorm")


def write_clip(folder: Path, layers: int, width: int, ff: int, heads: int, vocabulary: int, planted: bool) -> None:
    """A transformers folder in fp16, the same for the same arguments."""
    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=ff, num_hidden_layers=layers,
        num_attention_heads=heads, bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1,
    )  # fmt: skip
    _write(folder, CLIPTextModel(config), layers, planted)


def write_bert(folder: Path, layers: int, width: int, ff: int, heads: int, vocabulary: int, planted: bool) -> None:
    """As `write_clip`."""
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=ff, num_hidden_layers=layers,
        num_attention_heads=heads,
    )  # fmt: skip
    _write(folder, BertModel(config), layers, planted)


def write_gemma2(folder: Path, layers: int, width: int, ff: int, heads: int, vocabulary: int, planted: bool) -> None:
    """As `write_clip`. Two heads of queries share one of keys."""
    config = Gemma2Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=ff, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 2, head_dim=width // heads,
        query_pre_attn_scalar=width // heads,
    )  # fmt: skip
    _write(folder, Gemma2Model(config), layers, planted)


def write_qwen3(folder: Path, layers: int, width: int, ff: int, heads: int, vocabulary: int, planted: bool) -> None:
    """As `write_gemma2`."""
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=ff, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 2, head_dim=width // heads,
    )  # fmt: skip
    _write(folder, Qwen3Model(config), layers, planted)


def _write(folder: Path, module: nn.Module, layers: int, planted: bool) -> None:
    inner, generator = GATED if planted else 1.0, torch.Generator().manual_seed(0)
    gemma = isinstance(module, Gemma2Model)
    for name, parameter in sorted(module.requires_grad_(False).named_parameters()):
        path, _, part = name.rpartition(".")
        values = torch.randn(parameter.shape, generator=generator)
        if part == "bias":
            values *= SMALL
        elif parameter.ndim == 1:
            values = 1 + SMALL * values
            kind = path.rpartition(".")[2]
            if gemma and kind in NORMS_TO_STREAM:
                _write_to_stream(values, layers, planted)
            elif kind not in NORMS_WITHOUT:
                values[outliers(len(values), 1)] *= NORM if planted else 1.0
            values -= 1.0 if gemma else 0.0  # its norms multiply by 1 + weight
        elif "embed" not in path:
            values /= math.sqrt(parameter.shape[1])
            if path.endswith(QUERIES):
                values *= SCORES * 2  # scores are divided by the root of a head's channels
            elif path.endswith(TO_STREAM):
                _write_to_stream(values, layers, planted and not gemma)  # whose norms behind have them
            elif path.endswith(INNER):
                values[outliers(len(values), 2)] *= inner
        elif gemma:  # which multiplies rows of its table by this
            values /= math.sqrt(parameter.shape[1])
        parameter.copy_(values)
    module.half().save_pretrained(folder)


def _write_to_stream(values: torch.Tensor, layers: int, planted: bool) -> None:
    """In place, of weights [channels of the stream, ...]: all layers together add about as much as the first had."""
    values /= math.sqrt(2 * layers)
    values[outliers(len(values), 0)] *= STREAM if planted else 1.0
