"""Scenes of 64 x 64 pixels: one to three items in an arrangement on a plain background, each item one to five equal
shapes, letters or digits, small or large.

The picture is a board of 4 x 4 squares. An arrangement gives each item some of them, and every copy of the item stands
in one, moved a little; so copies never touch, and what a picture shows can be read square by square (`reader.py`).

A label is 14 integers: arrangement, background, then count, size, colour and kind of each of three items. An item that
is not there has count 0 (and 0 in the rest).
"""

from __future__ import annotations

import torch
from torch.nn.functional import grid_sample

from benchmarks.zoo.pixart_scenes import font

COLOURS = {
    "red": (0.88, 0.10, 0.10),
    "green": (0.10, 0.60, 0.20),
    "blue": (0.10, 0.25, 0.90),
    "yellow": (0.97, 0.87, 0.10),
    "purple": (0.55, 0.15, 0.75),
    "orange": (0.98, 0.50, 0.05),
    "pink": (0.98, 0.55, 0.75),
    "brown": (0.45, 0.25, 0.10),
}
BACKGROUNDS = {
    "white": (1.0, 1.0, 1.0),
    "black": (0.03, 0.03, 0.03),
    "gray": (0.5, 0.5, 0.5),
    "sky": (0.55, 0.80, 0.98),
    "mint": (0.65, 0.95, 0.80),
}
SIZES = ("small", "large")
SHAPES = ("circle", "square", "triangle", "ring", "cross", "diamond")
KINDS = (*SHAPES, *font.GLYPHS)
# Which item (0 to 2) owns each square of the board, row by row.
ARRANGEMENTS = {
    "alone": "0000 0000 0000 0000",
    "left": "0011 0011 0011 0011",
    "above": "0000 0000 1111 1111",
    "left, above a third": "0011 0011 2222 2222",
    "above, left of a third": "0022 0022 1122 1122",
}
ARRANGEMENTS_OF = {1: (0,), 2: (1, 2), 3: (3, 4)}  # by number of items
SHARES = (0.3, 0.4, 0.3)  # of scenes with one, two and three items
SINGLE, SHAPE = 0.36, 0.6  # share of items of one copy; of shapes, the rest are letters and digits
MOST_COPIES = 5
BOARD, SQUARE = 4, 16
RESOLUTION = BOARD * SQUARE
ITEMS = 3
FIRST, FIELDS = 2, 4  # column of the first item's count; columns of an item
COLUMNS = FIRST + ITEMS * FIELDS
# By size, in pixels: from the middle to the edge, and how far a copy is moved from the middle of its square.
RADII, MOVES = torch.tensor([4.4, 6.9]), torch.tensor([2.8, 0.7])
VARIATION = 0.14  # of radius and brightness, from the least to the most


def owners() -> torch.Tensor:
    """The item of each square, [arrangements, 16] int64."""
    return torch.tensor([[int(square) for square in rows.replace(" ", "")] for rows in ARRANGEMENTS.values()])


def item(labels: torch.Tensor, index: int) -> torch.Tensor:
    """Count, size, colour and kind of one item, [count, 4]."""
    return labels[:, FIRST + FIELDS * index : FIRST + FIELDS * (index + 1)]


def sample_labels(count: int, generator: torch.Generator) -> torch.Tensor:
    """Random labels, [count, 14] int64."""

    def uniform() -> torch.Tensor:
        return torch.rand(count, generator=generator)

    def among(choices: int | torch.Tensor) -> torch.Tensor:
        return (uniform() * choices).long()

    labels = torch.zeros(count, COLUMNS, dtype=torch.int64)
    items = 1 + (uniform()[:, None] >= torch.tensor(SHARES).cumsum(0)[:-1]).sum(1)
    labels[:, 0] = torch.where(items == 1, 0, 2 * items - 3 + among(2))
    labels[:, 1] = among(len(BACKGROUNDS))
    of_square = owners()[labels[:, 0]]
    for index in range(ITEMS):
        most = (of_square == index).sum(1).clamp(max=MOST_COPIES)
        copies = torch.where(uniform() < SINGLE, 1, 2 + among(most - 1))
        kind = torch.where(uniform() < SHAPE, among(len(SHAPES)), len(SHAPES) + among(len(font.GLYPHS)))
        fields = torch.stack([copies, among(len(SIZES)), among(len(COLOURS)), kind], 1)
        item(labels, index)[:] = torch.where((index < items)[:, None], fields, 0)
    return labels


def is_held_out(labels: torch.Tensor) -> torch.Tensor:
    """Scenes never trained on (about one in nine), [count] bool: a fixed linear hash of the label."""
    return (labels * torch.tensor([7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59])).sum(1) % 9 == 0


def sample_split(count: int, generator: torch.Generator, held_out: bool = False) -> torch.Tensor:
    """`count` random labels of the scenes to train on, or of the held-out ones."""
    parts: list[torch.Tensor] = []
    while sum(map(len, parts)) < count:
        labels = sample_labels(2 * count, generator)
        parts.append(labels[is_held_out(labels) == held_out])
    return torch.cat(parts)[:count]


def place(labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Which item stands in each square, [count, 16] int64; -1 where none does."""
    of_square = owners()[labels[:, 0]]
    order = torch.rand(of_square.shape, generator=generator)
    standing = torch.full_like(of_square, -1)
    for index in range(ITEMS):
        own = of_square == index
        rank = torch.where(own, order, 2.0).argsort(1).argsort(1)
        standing[own & (rank < item(labels, index)[:, :1])] = index
    return standing


def _distance(kind: int, dx: torch.Tensor, dy: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Signed distance in pixels to a shape of `SHAPES`, for offsets from its middle (y downwards) and radii."""
    length = (dx**2 + dy**2).sqrt()
    if SHAPES[kind] == "circle":
        return length - radius * 0.95
    if SHAPES[kind] == "square":
        return torch.maximum(dx.abs(), dy.abs()) - radius * 0.84
    if SHAPES[kind] == "triangle":
        sides = torch.maximum(0.866 * dx - 0.5 * dy, -0.866 * dx - 0.5 * dy) - radius * 0.55
        return torch.maximum(sides, dy - radius * 0.75)
    if SHAPES[kind] == "ring":
        return (length - radius * 0.74).abs() - radius * 0.22
    if SHAPES[kind] == "cross":
        thin, long = radius * 0.28, radius
        upright = torch.maximum(dx.abs() - thin, dy.abs() - long)
        return torch.minimum(upright, torch.maximum(dy.abs() - thin, dx.abs() - long))
    return (dx.abs() * 1.25 + dy.abs()) * 0.62 - radius * 0.62  # diamond


def _cover(kinds: torch.Tensor, dx: torch.Tensor, dy: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """How much of each pixel a copy covers, [copies, 16, 16]; dx, dy: [copies, 16, 16], radius: [copies, 1, 1]."""
    cover = torch.empty_like(dx)
    for kind in range(len(SHAPES)):
        rows = kinds == kind
        cover[rows] = torch.sigmoid(-2.5 * _distance(kind, dx[rows], dy[rows], radius[rows]))
    rows = kinds >= len(SHAPES)
    drawn = font.bitmaps()[kinds[rows] - len(SHAPES)][:, None]
    # A glyph is as high as a circle is wide; grid_sample takes places in [-1, 1] of the bitmap.
    places = torch.stack([dx[rows] / (radius[rows] * font.WIDTH / font.HEIGHT), dy[rows] / radius[rows]], -1)
    cover[rows] = ((grid_sample(drawn, places, align_corners=False)[:, 0] - 0.5) * 2 + 0.5).clamp(0, 1)
    return cover


def draw(labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures in [-1, 1], [count, 3, 64, 64] float32, of labels [count, 14]."""
    return paint(labels, place(labels, generator), generator)


def paint(labels: torch.Tensor, standing: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """`draw`, with the copies in given squares (see `place`)."""
    count = len(labels)
    palette, grounds = torch.tensor(list(COLOURS.values())), torch.tensor(list(BACKGROUNDS.values()))
    squares = grounds[labels[:, 1]][:, None, :, None, None].repeat(1, BOARD * BOARD, 1, SQUARE, SQUARE)
    move, vary = (torch.rand(count, BOARD * BOARD, 2, generator=generator) * 2 - 1 for _ in range(2))
    picture, square = (standing >= 0).nonzero(as_tuple=True)
    fields = labels[:, FIRST:].view(count, ITEMS, FIELDS)[picture, standing[picture, square]]
    _, sizes, colours, kinds = fields.unbind(1)
    middle = move[picture, square] * MOVES[sizes][:, None]
    radius, shade = 1 + vary[picture, square].unbind(1)[0] * VARIATION / 2, 1 + vary[:, :1, 1] * VARIATION / 2
    axis = torch.arange(SQUARE) + 0.5 - SQUARE / 2
    dy, dx = (axis - middle[:, 1, None])[:, :, None], (axis - middle[:, 0, None])[:, None, :]
    dx, dy = (part.expand(-1, SQUARE, SQUARE) for part in (dx, dy))
    cover = _cover(kinds, dx, dy, (RADII[sizes] * radius)[:, None, None])[:, None]
    colour = (palette[colours] * shade[picture]).clamp(0, 1)[:, :, None, None]
    squares[picture, square] = cover * colour + (1 - cover) * squares[picture, square]
    rows = squares.view(count, BOARD, BOARD, 3, SQUARE, SQUARE).permute(0, 3, 1, 4, 2, 5)
    return rows.reshape(count, 3, RESOLUTION, RESOLUTION) * 2 - 1
