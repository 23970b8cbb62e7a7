"""Captions of scenes: the same scene is told in several ways, from the left or from the right."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from benchmarks.zoo.pixart_scenes import board

NUMBERS = ("no", "one", "two", "three", "four", "five")
PLURALS = {"cross": "crosses"}
Pick: TypeAlias = Callable[[Sequence[str]], str]


def first(ways: Sequence[str]) -> str:
    """The way that a scene is told in where none is picked at random."""
    return ways[0]


def item_text(fields: list[int], article: str = "a") -> str:
    """One item by its count, size, colour and kind: "three small red letters k"."""
    copies, size, colour, kind = fields
    name = board.KINDS[kind]
    described = f"{board.SIZES[size]} {list(board.COLOURS)[colour]}"
    number = article if copies == 1 else NUMBERS[copies]
    if name in board.SHAPES:
        return f"{number} {described} {name if copies == 1 else PLURALS.get(name, name + 's')}"
    what = "digit" if name.isdigit() else "letter"
    return f"{number} {described} {what if copies == 1 else what + 's'} {name}"


def caption(label: torch.Tensor, pick: Pick = first) -> str:
    """The sentence of one label, [14] int64. pick: chooses among the ways to tell it.

    >>> caption(torch.tensor([2, 0, 1, 1, 0, 0, 3, 0, 2, 10, 0, 0, 0, 0]))
    'a large red circle above three small blue letters k on white'
    """
    rows = [board.item(label[None], index)[0].tolist() for index in range(board.ITEMS)]
    a, b, c = (item_text(row, pick(("a", "one"))) if row[0] else "" for row in rows)
    ground = list(board.BACKGROUNDS)[int(label[1])]
    end = pick((f"on {ground}", f"on a {ground} background"))
    beside = pick((f"{a} left of {b}", f"{a} to the left of {b}", f"{b} right of {a}"))
    below = pick((f"{a} above {b}", f"{b} below {a}"))
    told = (a, beside, below, f"{beside}, both above {c},", f"{below}, both left of {c},")[int(label[0])]
    return f"{told} {end}"


def captions(labels: torch.Tensor, seed: int | None = None) -> list[str]:
    """Of labels [count, 14]; each told in a way that `seed` picks, or in the first one."""
    pick = first if seed is None else random.Random(seed).choice
    return [caption(label, pick) for label in labels]
