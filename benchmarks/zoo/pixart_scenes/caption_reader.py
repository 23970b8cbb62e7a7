"""What the text encoder learns before the denoiser does: to say, of each item of a caption, what it is.

A denoiser alone does not teach it in thousands of steps which of several colours belongs to which shape: what it had
learned by then told all colours of a scene, and not whose they are. Large encoders come trained as well.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy
from transformers import T5EncoderModel, T5Tokenizer

from benchmarks.zoo.pixart_scenes import board, parts
from benchmarks.zoo.pixart_scenes.captions import captions

HEADS = 4
OF_SCENE = (len(board.ARRANGEMENTS), len(board.BACKGROUNDS))
OF_ITEM = (board.MOST_COPIES + 1, len(board.SIZES), len(board.COLOURS), len(board.KINDS))


class CaptionReader(torch.nn.Module):
    """A text encoder, and four learned questions to what it makes of a caption: of the scene, and of each item."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        width = parts.TEXT_WIDTH
        self.text_encoder: T5EncoderModel = parts.text_encoder(vocabulary)
        self.questions = torch.nn.Parameter(0.1 * torch.randn(1 + board.ITEMS, width))
        self.attention = torch.nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.scene, self.item = torch.nn.Linear(width, sum(OF_SCENE)), torch.nn.Linear(width, sum(OF_ITEM))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], ...]:
        """Logits of the scene's fields, each [count, choices], and of the items' fields, [count, 3, choices]."""
        hidden = self.text_encoder(ids, attention_mask=mask).last_hidden_state
        asked = self.questions.expand(len(ids), -1, -1)
        answers = self.attention(asked, hidden, hidden, key_padding_mask=mask == 0, need_weights=False)[0]
        return self.scene(answers[:, 0]).split(OF_SCENE, 1), self.item(answers[:, 1:]).split(OF_ITEM, 2)


def answers(
    reader: torch.nn.Module, tokenizer: T5Tokenizer, labels: torch.Tensor, way: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each field: logits [answers, choices], and what is true [answers]; `labels` told in the way of a seed."""
    tokens = tokenizer(captions(labels, way), padding="longest", return_tensors="pt")
    scene, item = reader(tokens.input_ids, tokens.attention_mask)
    fields = labels[:, board.FIRST :].view(len(labels), board.ITEMS, board.FIELDS)
    there = fields[:, :, 0] > 0
    of_scene = zip(scene, labels[:, : board.FIRST].unbind(1), strict=True)
    return [*of_scene, *((logits[there], true[there]) for logits, true in zip(item, fields.unbind(2), strict=True))]


def loss_at(
    reader: torch.nn.Module, tokenizer: T5Tokenizer, batch_size: int, generator: torch.Generator
) -> torch.Tensor:
    """On captions of training scenes, told at random."""
    labels = board.sample_split(batch_size, generator)
    way = int(torch.randint(2**31, (1,), generator=generator))
    return torch.stack([cross_entropy(*pair) for pair in answers(reader, tokenizer, labels, way)]).sum()


@torch.inference_mode()
def accuracy(reader: torch.nn.Module, tokenizer: T5Tokenizer, count: int, seed: int) -> dict[str, float]:
    """Share of what is read rightly of `count` held-out scenes' captions, by field."""
    labels = board.sample_split(count, torch.Generator().manual_seed(seed), held_out=True)
    names = ("arrangement", "background", "count", "size", "colour", "kind")
    pairs = answers(reader, tokenizer, labels, seed)
    return {
        name: (logits.argmax(1) == true).double().mean().item()
        for name, (logits, true) in zip(names, pairs, strict=True)
    }
