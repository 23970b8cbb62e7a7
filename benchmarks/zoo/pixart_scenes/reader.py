"""The judge: a small network that reads what stands in each square of a picture, and what of a caption is right.

Every square's neighbourhood of some 33 pixels is read by itself, so pictures that no caption describes are read as
well as those that one does.
"""

from __future__ import annotations

from itertools import permutations

import torch
from torch.nn.functional import cross_entropy

from benchmarks.zoo.pixart_scenes import board

NOISE = 0.1
FEATURES = 128
EMPTY = len(board.KINDS)  # the kind of a square where nothing stands
# What of a caption is judged. "glyph": the kind, where it is a letter or a digit.
SLOTS = ("count", "size", "colour", "shape", "glyph", "relation", "background")
HEADS = {
    "kind": EMPTY + 1,
    "size": len(board.SIZES),
    "colour": len(board.COLOURS),
    "background": len(board.BACKGROUNDS),
}


class Reader(torch.nn.Module):
    """Five convolutions, of which four halve the picture: one place is left for each square."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 32, 64, 96, FEATURES)
        strides = (1, 2, 2, 2, 2)
        self.body = torch.nn.Sequential(*(_block(*row) for row in zip(widths, widths[1:], strides, strict=False)))
        self.heads = torch.nn.ModuleDict({name: torch.nn.Conv2d(FEATURES, size, 1) for name, size in HEADS.items()})

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits of every head, [count, choices, 16], of pictures [count, 3, 64, 64]."""
        places = self.body(pictures)
        return {name: head(places).flatten(2) for name, head in self.heads.items()}

    @torch.inference_mode()
    def read(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """What stands in each square, [count, 16] int64 by head; of the whole picture, [count], for the background."""
        logits = self(pictures.clamp(-1, 1))
        squares = {name: logits[name].argmax(1) for name in HEADS if name != "background"}
        return squares | {"background": logits["background"].mean(2).argmax(1)}

    @torch.inference_mode()
    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """For Frechet distances, [count, 128]: means over the squares."""
        return self.body(pictures.clamp(-1, 1)).mean((2, 3))


def _block(inputs: int, outputs: int, stride: int) -> torch.nn.Module:
    convolution = torch.nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return torch.nn.Sequential(convolution, torch.nn.BatchNorm2d(outputs), torch.nn.ReLU())


def truth(labels: torch.Tensor, standing: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a perfect reader reads of pictures with these labels and copies (see `board.place`); size and colour of an
    empty square are -100, which cross_entropy leaves out."""
    fields = labels[:, board.FIRST :].view(len(labels), board.ITEMS, board.FIELDS)
    own = fields.gather(1, standing.clamp(min=0)[:, :, None].expand(-1, -1, board.FIELDS))
    empty = standing < 0
    return {
        "kind": torch.where(empty, EMPTY, own[:, :, 3]),
        "size": torch.where(empty, -100, own[:, :, 1]),
        "colour": torch.where(empty, -100, own[:, :, 2]),
        "background": labels[:, 1:2].expand(-1, board.BOARD**2),
    }


def loss_at(reader: torch.nn.Module, batch_size: int, generator: torch.Generator) -> torch.Tensor:
    """On pictures of training scenes, made noisy at random."""
    labels = board.sample_split(batch_size, generator)
    standing = board.place(labels, generator)
    pictures = board.paint(labels, standing, generator)
    strength = NOISE * torch.rand(batch_size, 1, 1, 1, generator=generator)
    logits = reader(pictures + strength * torch.randn(pictures.shape, generator=generator))
    expected = truth(labels, standing)
    return torch.stack([cross_entropy(logits[name], expected[name]) for name in HEADS]).sum()


# --- what of a caption is right ---------------------------------------------------------------------------------------


def _majority(values: torch.Tensor, among: torch.Tensor, choices: int) -> torch.Tensor:
    """The commonest of `values` [count, 16] where `among` is set, [count]; -1 where it is set nowhere."""
    votes = torch.zeros(len(values), choices).scatter_add_(1, values.clamp(max=choices - 1), among.float())
    return torch.where(among.any(1), votes.argmax(1), -1)


def regions(read: dict[str, torch.Tensor], arrangement: int) -> torch.Tensor:
    """What each item's squares show in an arrangement: count, size, colour, kind, [count, 3, 4]; -1 of no copies."""
    occupied = read["kind"] != EMPTY
    rows = []
    for index in range(board.ITEMS):
        own = occupied & (board.owners()[arrangement] == index)
        heads = (("size", HEADS["size"]), ("colour", HEADS["colour"]), ("kind", EMPTY))
        rows.append(torch.stack([own.sum(1), *(_majority(read[name], own, size) for name, size in heads)], 1))
    return torch.stack(rows, 1)


def right(labels: torch.Tensor, read: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What of each caption its picture shows: (right, asked), bool [count, slots in the order of `SLOTS`].

    A slot is right if it is so of all items. asked: whether the caption says anything of it (glyphs, and relations
    where there are several items). A relation is right if each item's squares show its colour or its kind, and the
    picture does not fit better with the items exchanged or in the other arrangement of as many.
    """
    fields = labels[:, board.FIRST :].view(len(labels), board.ITEMS, board.FIELDS)
    shown = torch.stack([regions(read, arrangement) for arrangement in range(len(board.ARRANGEMENTS))], 1)
    own = shown[torch.arange(len(labels)), labels[:, 0]]
    there, is_glyph = fields[:, :, 0] > 0, fields[:, :, 3] >= len(board.SHAPES)
    equal = (own == fields) | ~there[:, :, None]
    count, size, colour, kind = equal.unbind(2)
    is_right = [
        count.all(1), size.all(1), colour.all(1), (kind | is_glyph).all(1), (kind | ~is_glyph).all(1),
        _relation(labels[:, 0], fields, shown), read["background"] == labels[:, 1],
    ]  # fmt: skip
    always, items = torch.ones(len(labels), dtype=torch.bool), there.sum(1)
    has_glyph, has_shape = (there & is_glyph).any(1), (there & ~is_glyph).any(1)
    asked = [always, always, always, has_shape, has_glyph, items > 1, always]
    return torch.stack(is_right, 1), torch.stack(asked, 1)


def _relation(arrangement: torch.Tensor, fields: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    fits = torch.ones(len(fields), dtype=torch.bool)
    for items in (2, 3):
        rows = ((fields[:, :, 0] > 0).sum(1) == items).nonzero()[:, 0]
        # By arrangement and order of the items: how many colours and kinds of each fit, [rows, items].
        scores = {
            (place, order): (shown[rows, place, :items, 2:] == fields[rows][:, list(order), 2:]).sum(2)
            for place in board.ARRANGEMENTS_OF[items]
            for order in permutations(range(items))
        }
        best = torch.stack([score.sum(1) for score in scores.values()]).amax(0)
        as_told = tuple(range(items))
        asked = torch.stack([scores[place, as_told] for place in board.ARRANGEMENTS_OF[items]], 1)
        chosen = arrangement[rows] - board.ARRANGEMENTS_OF[items][0]
        own = asked[torch.arange(len(rows)), chosen]
        fits[rows] = (own > 0).all(1) & (own.sum(1) == best)
    return fits


def accuracy(labels: torch.Tensor, read: dict[str, torch.Tensor]) -> dict[str, float]:
    """Share of pictures that are right, by slot, among those whose captions ask for it; the mean of these; and the
    share of pictures that are right in everything."""
    is_right, asked = right(labels, read)
    shares = {
        slot: (is_right[:, column] & asked[:, column]).sum().item() / max(1, asked[:, column].sum().item())
        for column, slot in enumerate(SLOTS)
    }
    mean = sum(shares.values()) / len(shares)
    return shares | {"mean": mean, "everything": (is_right | ~asked).all(1).double().mean().item()}
