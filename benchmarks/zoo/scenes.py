"""Procedural captioned scenes: one object, or two in a relation, on a plain background.

A label is six integers, one for each caption slot of `SLOTS`; index 0 of the second colour and shape is
"none" and goes with the relation "alone". The drawing is anti-aliased from signed distances; position, size and
brightness vary a little, so a caption has many pictures.
"""

from __future__ import annotations

import torch

COLOURS = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.70, 0.20),
    "blue": (0.10, 0.25, 0.90),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.60, 0.15, 0.75),
    "orange": (0.98, 0.50, 0.05),
}
SHAPES = ("circle", "square", "triangle", "ring", "cross")
RELATIONS = ("alone", "left of", "above")
BACKGROUNDS = {"white": (1.0, 1.0, 1.0), "black": (0.03, 0.03, 0.03), "gray": (0.5, 0.5, 0.5), "sky": (0.55, 0.8, 0.98)}
SLOTS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "relation": RELATIONS,
    "second colour": ("none", *COLOURS),
    "second shape": ("none", *SHAPES),
    "background": tuple(BACKGROUNDS),
}
SECOND = (3, 4)  # slots that are "none" when the object is alone
RESOLUTION = 32
SINGLE_SHARE = 0.2
# Object centres (first, second) by relation, in the square [-1, 1] x [-1, 1] with y downwards.
CENTRES = torch.tensor([[[0.0, 0.0], [9.0, 9.0]], [[-0.47, 0.0], [0.47, 0.0]], [[0.0, -0.47], [0.0, 0.47]]])
RADII = torch.tensor([0.55, 0.36, 0.36])


def sample_labels(count: int, generator: torch.Generator) -> torch.Tensor:
    """Random labels, [count, 6] int64."""
    columns = [torch.randint(len(words), (count,), generator=generator) for words in SLOTS.values()]
    labels = torch.stack(columns, 1)
    alone = torch.rand(count, generator=generator) < SINGLE_SHARE
    labels[:, 2] = torch.where(alone, 0, 1 + torch.randint(2, (count,), generator=generator))
    for slot in SECOND:
        upper = len(list(SLOTS.values())[slot]) - 1
        drawn = 1 + torch.randint(upper, (count,), generator=generator)
        labels[:, slot] = torch.where(alone, 0, drawn)
    return labels


def caption(label: torch.Tensor) -> str:
    """The sentence of one label, [6] int64."""
    words = [slot[int(i)] for slot, i in zip(SLOTS.values(), label, strict=True)]
    first, second = f"a {words[0]} {words[1]}", f"{words[2]} a {words[3]} {words[4]}"
    return f"{first} on {words[5]}" if words[2] == "alone" else f"{first} {second} on {words[5]}"


def tokens(labels: torch.Tensor) -> torch.Tensor:
    """Token ids, [count, 6]: id 0 is the empty caption, then the words of slot 0, slot 1 and so on."""
    sizes = [len(words) for words in SLOTS.values()]
    offsets = torch.tensor([1 + sum(sizes[:slot]) for slot in range(len(sizes))])
    return labels + offsets


def vocabulary_size() -> int:
    return 1 + sum(len(words) for words in SLOTS.values())


def _distances(dx: torch.Tensor, dy: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Signed distance to each shape of `SHAPES`, [count, 5, H, W], for offsets [count, H, W]."""
    length = (dx**2 + dy**2).sqrt()
    circle = length - radius
    square = torch.maximum(dx.abs(), dy.abs()) - radius * 0.86
    sides = torch.maximum(0.866 * dx - 0.5 * dy, -0.866 * dx - 0.5 * dy) - radius * 0.55
    triangle = torch.maximum(sides, dy - radius * 0.75)
    ring = (length - radius * 0.76).abs() - radius * 0.24
    thin, long = radius * 0.3, radius
    cross = torch.minimum(
        torch.maximum(dx.abs() - thin, dy.abs() - long), torch.maximum(dy.abs() - thin, dx.abs() - long)
    )
    return torch.stack([circle, square, triangle, ring, cross], 1)


def draw(labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures in [-1, 1], [count, 3, 32, 32] float32, of labels [count, 6]."""
    count = len(labels)
    axis = (torch.arange(RESOLUTION) + 0.5) / RESOLUTION * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    palette, grounds = torch.tensor(list(COLOURS.values())), torch.tensor(list(BACKGROUNDS.values()))
    picture = grounds[labels[:, 5]][:, :, None, None].expand(count, 3, RESOLUTION, RESOLUTION)
    shape_of = (labels[:, 1], (labels[:, 4] - 1).clamp(min=0))
    colour_of = (labels[:, 0], (labels[:, 3] - 1).clamp(min=0))
    for item in range(2):
        jitter = (torch.rand(count, 2, generator=generator) - 0.5) * 0.1
        centre = CENTRES[labels[:, 2], item] + jitter
        radius = RADII[labels[:, 2]] * (1 + (torch.rand(count, generator=generator) - 0.5) * 0.16)
        shade = 1 + (torch.rand(count, 1, generator=generator) - 0.5) * 0.16
        dx, dy = x[None] - centre[:, 0, None, None], y[None] - centre[:, 1, None, None]
        distance = _distances(dx, dy, radius[:, None, None])[torch.arange(count), shape_of[item]]
        cover = torch.sigmoid(-distance * RESOLUTION * 1.2)[:, None]
        colour = (palette[colour_of[item]] * shade).clamp(0, 1)[:, :, None, None]
        picture = cover * colour + (1 - cover) * picture
    return picture * 2 - 1


def is_held_out(labels: torch.Tensor) -> torch.Tensor:
    """Captions never trained on (about one in nine), [count] bool: a fixed linear hash of the label."""
    return (labels * torch.tensor([7, 11, 13, 17, 19, 23])).sum(1) % 9 == 0


def sample_split(count: int, generator: torch.Generator, held_out: bool) -> torch.Tensor:
    """`count` random labels of the training captions, or of the held-out ones."""
    parts: list[torch.Tensor] = []
    while sum(map(len, parts)) < count:
        labels = sample_labels(2 * count, generator)
        parts.append(labels[is_held_out(labels) == held_out])
    return torch.cat(parts)[:count]
