"""What the text encoder learns before the denoiser does: to say of each square of the board what stands there.

A denoiser's loss asks for that by the way alone: items cover a small part of a picture, and whose a colour is changes
little of it. Large encoders come trained as well. It is asked by square, as the denoiser asks, so that words carry the
place of what they tell of.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy
from transformers import T5EncoderModel, T5Tokenizer

from benchmarks.zoo.pixart_scenes import board, parts
from benchmarks.zoo.pixart_scenes.captions import captions

HEADS = 4
OF_SCENE = (len(board.ARRANGEMENTS), len(board.BACKGROUNDS))
OF_SQUARE = (board.MOST_COPIES + 1, len(board.SIZES), len(board.COLOURS), len(board.KINDS))


class CaptionReader(torch.nn.Module):
    """A text encoder, and learned questions to what it makes of a caption: of the scene, and of each square's item."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        width = parts.TEXT_WIDTH
        self.text_encoder: T5EncoderModel = parts.text_encoder(vocabulary)
        self.questions = torch.nn.Parameter(0.1 * torch.randn(1 + board.BOARD**2, width))
        self.attention = torch.nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.scene, self.square = torch.nn.Linear(width, sum(OF_SCENE)), torch.nn.Linear(width, sum(OF_SQUARE))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], ...]:
        """Logits of the scene's fields, each [count, choices], and of the squares' items, [count, 16, choices]."""
        hidden = self.text_encoder(ids, attention_mask=mask).last_hidden_state
        asked = self.questions.expand(len(ids), -1, -1)
        answers = self.attention(asked, hidden, hidden, key_padding_mask=mask == 0, need_weights=False)[0]
        return self.scene(answers[:, 0]).split(OF_SCENE, 1), self.square(answers[:, 1:]).split(OF_SQUARE, 2)


def answers(
    reader: torch.nn.Module, tokenizer: T5Tokenizer, labels: torch.Tensor, way: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each field: logits [answers, choices], and what is true [answers]; `labels` told in the way of a seed."""
    tokens = tokenizer(captions(labels, way), padding="longest", return_tensors="pt")
    scene, square = reader(tokens.input_ids, tokens.attention_mask)
    items = labels[:, board.FIRST :].view(len(labels), board.ITEMS, board.FIELDS)
    owners = board.owners()[labels[:, 0]]
    fields = items.gather(1, owners[:, :, None].expand(-1, -1, board.FIELDS))
    of_scene = zip(scene, labels[:, : board.FIRST].unbind(1), strict=True)
    of_square = zip(square, fields.unbind(2), strict=True)
    return [*of_scene, *((logits.flatten(0, 1), true.flatten()) for logits, true in of_square)]


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
