"""The prompts that a model with a small vocabulary understands: one object, or two in a relation, on a background.

Words in, words and token numbers out: it knows no file and no model, as conditioning.py does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from annotated_types import MinLen
from numpy.typing import NDArray
from typing_extensions import TypedDict

from export.errors import RecipeError

ARTICLES = ("a", "an", "the")
SYNONYMS = {"grey": "gray"}
# Relations that the vocabulary lacks: the same scene, told with the objects exchanged.
EXCHANGED = {"right of": "left of", "below": "above"}
FIRST, SECOND = ("colour", "shape"), ("second colour", "second shape")
ALONE, NONE = "alone", "none"
SLOT_NAMES = (*FIRST, "relation", *SECOND, "background")
GRAMMAR = "a COLOUR SHAPE [RELATION a COLOUR SHAPE] on BACKGROUND"


class Slot(TypedDict):
    """One word of a scene: its name in the grammar, and what it may be."""

    name: str
    words: Annotated[list[str], MinLen(1)]


Slots = Sequence[Slot]


class _Reader:
    """The words of one prompt, taken from the left."""

    def __init__(self, prompt: str, slots: Slots) -> None:
        self.prompt, self.slots = prompt, {slot["name"]: list(slot["words"]) for slot in slots}
        words = re.findall(r"[^\s,.]+", prompt.lower())
        self.words = [SYNONYMS.get(word, word) for word in words if word not in ARTICLES]

    def take(self, expected: str, choices: Sequence[str]) -> str:
        """Remove one of `choices` (they may have several words) from the front and return it."""
        for choice in choices:
            count = len(choice.split())
            if self.words[:count] == choice.split():
                del self.words[:count]
                return choice
        raise self.refusal(f"expected {expected} ({', '.join(choices)})")

    def refusal(self, expectation: str) -> RecipeError:
        here = f"found {self.words[0]!r}" if self.words else "found the end"
        return RecipeError(f'prompt {self.prompt!r}: {expectation}, {here}; write "{GRAMMAR}"')

    def choices(self, slot: str) -> list[str]:
        return [word for word in self.slots[slot] if word not in (ALONE, NONE)]


def parse(prompt: str, slots: Slots) -> dict[str, str]:
    """The word of every slot, for example {"colour": "red", "shape": "ring", "relation": "alone", ...}.

    Articles are optional, case does not matter. Raises RecipeError naming the first word that does not fit.
    """
    reader = _Reader(prompt, slots)
    chosen = {slot: reader.take(f"a {slot}", reader.choices(slot)) for slot in FIRST}
    chosen |= {"relation": ALONE, **dict.fromkeys(SECOND, NONE)}
    if reader.words[:1] != ["on"]:
        relations = [*reader.choices("relation"), *EXCHANGED]
        chosen["relation"] = reader.take("a relation or 'on'", relations)
        chosen |= {slot: reader.take(f"a {slot}", reader.choices(slot)) for slot in SECOND}
    reader.take("'on'", ["on"])
    chosen["background"] = reader.take("a background", reader.choices("background"))
    if reader.words:
        raise reader.refusal("expected the end")
    return _exchanged(chosen) if chosen["relation"] in EXCHANGED else chosen


def _exchanged(chosen: dict[str, str]) -> dict[str, str]:
    swapped = {a: chosen[b] for a, b in (*zip(FIRST, SECOND, strict=True), *zip(SECOND, FIRST, strict=True))}
    return chosen | swapped | {"relation": EXCHANGED[chosen["relation"]]}


def token_ids(prompt: str, slots: Slots) -> NDArray[np.int64]:
    """Token of every slot, [slots] int64: 0 is the empty prompt, then the words of slot 0, of slot 1 and so on."""
    chosen = parse(prompt, slots)
    for slot in slots:
        if chosen[slot["name"]] not in slot["words"]:
            raise RecipeError(f"prompt {prompt!r}: this model has no {slot['name']} {chosen[slot['name']]!r}")
    offsets = np.cumsum([1, *(len(slot["words"]) for slot in slots)])[:-1]
    return np.array(
        [offset + list(slot["words"]).index(chosen[slot["name"]]) for offset, slot in zip(offsets, slots, strict=True)]
    )
