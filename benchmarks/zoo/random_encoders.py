"""Small CLIP and BERT encoders with random weights, for measuring formats; outliers are planted where trained ones have
them, as in benchmarks/zoo/make_t5_xxl.py: in the stream between blocks (BERT's, which is normalised behind every block,
by the norm's weights), in the norms in front of linears, and in the feed-forward's inner channels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModel

from benchmarks.zoo.make_t5_xxl import GATED, NORM, SCORES, SMALL, STREAM, outliers

if TYPE_CHECKING:
    from torch import nn

# Linears that write to the stream, and those whose outputs are the feed-forward's inner channels.
TO_STREAM = ("out_proj", "fc2", "attention.output.dense", "output.dense")
INNER = ("fc1", "intermediate.dense")
QUERIES = ("q_proj", "query")


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


def _write(folder: Path, module: nn.Module, layers: int, planted: bool) -> None:
    stream, norm, inner = (STREAM, NORM, GATED) if planted else (1.0, 1.0, 1.0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(module.requires_grad_(False).named_parameters()):
        path, _, part = name.rpartition(".")
        values = torch.randn(parameter.shape, generator=generator)
        if part == "bias":
            values *= SMALL
        elif parameter.ndim == 1:
            values = 1 + SMALL * values
            if path != "final_layer_norm":
                values[outliers(len(values), 1)] *= norm
        elif "embedding" not in path:
            values /= math.sqrt(parameter.shape[1])
            if path.endswith(QUERIES):
                values *= SCORES * 2  # scores are divided by the root of a head's channels
            elif path.endswith(TO_STREAM):
                values /= math.sqrt(2 * layers)
                values[outliers(len(values), 0)] *= stream
            elif path.endswith(INNER):
                values[outliers(len(values), 2)] *= inner
        parameter.copy_(values)
    module.half().save_pretrained(folder)
