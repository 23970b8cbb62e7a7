"""Damage to documents: of their structure, of their values, of their bytes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

Place = tuple[Any, Any]  # a dict or list, and the key or index of one of its values

STRINGS = (
    "", " ", "\0", "\n", "\x1b[31m", "\ud800", "é" * 3, "a" * 5000, "../../payload", "/etc/passwd", "C:\\x", "a\\..\\b",
    "..", ".", "NaN", "manifest.json", "cpu/model.onnx", "-1", "{}", "E2M1", "zoo:pixart_mini", "nobody/nothing",
)  # fmt: skip
NUMBERS = (0, -1, 1, 2, 3, 64, 10**7, 2**31, 2**63, 2**64, 10**30, 10**400, 0.0, -0.5, 1e-300, 1e300, 0.1)
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], {"a": {}}, [1, "a"], {"": 0})


def places(document: Any) -> Iterator[Place]:
    """Every value of a document, by what holds it."""
    keys = list(document) if isinstance(document, dict) else range(len(document) if isinstance(document, list) else 0)
    for key in keys:
        yield document, key
        yield from places(document[key])


def drop(holder: Any, key: Any, rng: Random) -> None:
    del holder[key]


def retype(holder: Any, key: Any, rng: Random) -> None:
    holder[key] = copy.deepcopy(rng.choice((*STRINGS, *NUMBERS, *OTHERS)))


def number(holder: Any, key: Any, rng: Random) -> None:
    holder[key] = rng.choice(NUMBERS)


def text(holder: Any, key: Any, rng: Random) -> None:
    holder[key] = rng.choice(STRINGS)


def nest(holder: Any, key: Any, rng: Random) -> None:
    for _ in range(rng.choice((1, 2, 90))):
        holder[key] = [holder[key]] if rng.random() < 0.5 else {str(key): holder[key]}


def rename(holder: Any, key: Any, rng: Random) -> None:
    if isinstance(holder, dict):
        holder[rng.choice(STRINGS)] = holder.pop(key)


def double(holder: Any, key: Any, rng: Random) -> None:
    if isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))


def swap(holder: Any, key: Any, rng: Random) -> None:
    """Exchange two values of one holder."""
    other = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    holder[key], holder[other] = holder[other], holder[key]


STRUCTURAL: tuple[Callable[[Any, Any, Random], None], ...] = (drop, retype, number, text, nest, rename, double, swap)


def structure(document: Any, rng: Random) -> Any:
    """The document with one to three of its values damaged."""
    changed = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 2, 3))):
        known = list(places(changed))
        if known:
            holder, key = rng.choice(known)
            rng.choice(STRUCTURAL)(holder, key, rng)
    return changed


# What no JSON library writes: text that replaces the document, made from it.
TEXTS: tuple[Callable[[str], str], ...] = (
    lambda text: "[" * 100_000,
    lambda text: '{"a":' * 5000 + "1" + "}" * 5000,
    lambda text: text.replace("1", "NaN", 1),
    lambda text: text.replace("1", "1e999", 1),
    lambda text: text.replace("1", "9" * 5000, 1),
    lambda text: text[: len(text) // 2],
    lambda text: text + text,
    lambda text: text.replace("{", '{"schema_version": 1, "schema_version": 2, ', 1),
    lambda text: "null",
    lambda text: '"text"',
    lambda text: "",
    lambda text: "\ufeff" + text,
    lambda text: text.replace('"', "'"),
)


def damaged_json(data: bytes, rng: Random) -> bytes:
    """The bytes of a JSON file, damaged in structure (mostly), as text, or as bytes."""
    kind = rng.random()
    if kind < 0.7:
        return json.dumps(structure(json.loads(data), rng)).encode()
    if kind < 0.85:
        return rng.choice(TEXTS)(data.decode()).encode()
    return damaged_bytes(data, rng)


def damaged_bytes(data: bytes, rng: Random) -> bytes:
    """One to four bytes changed, a piece cut out or doubled, or another encoding."""
    kind = rng.randrange(5)
    if kind == 0:
        return data.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-32", "utf-7")))
    first, last = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    if kind == 1:
        return data[:first] + data[last:]
    if kind == 2:
        return data[:last] + data[first:]
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 4))):
        if changed:
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)
