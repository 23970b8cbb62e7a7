"""Which tokenizer.json files page/tokenizer.js knows, and then tokenizes as the package `tokenizers` does: T5's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from export.documents import Rules, read_bytes, shown
from export.errors import ContractError, ModelError
from pipeline.generate.tokenizer import MOST_BYTES, REMEDY

# What splits a prompt into words, as transformers' T5Tokenizer has it.
WORDS = [
    {"type": "WhitespaceSplit"},
    {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
]
# Of an added token: flags by which it is found elsewhere than where it stands.
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def refuse_tokenizer(path: Path, source: str) -> None:
    """Raise ModelError, by name, for what the page does not know of a tokenizer.json, which `tokenizers` has read.
    source: the file's name in messages."""
    document = json.loads(read_bytes(path, Rules(ContractError, REMEDY), MOST_BYTES))
    problem = next(_problems(document), None)
    if problem is not None:
        raise ModelError(f"{source}: the page does not know {problem}; it tokenizes as T5Tokenizer does")


def _problems(document: Any) -> Iterator[str]:
    model, normalizer = document["model"], document.get("normalizer")
    if model.get("type") != "Unigram":
        yield f"model {shown(model.get('type'))}"
        return
    if model.get("byte_fallback"):
        yield "byte_fallback of its model"
    if model.get("unk_id") is None:
        yield "a model without an unknown piece"
    if normalizer is not None and normalizer["type"] != "Precompiled":
        yield f"normalizer {shown(normalizer['type'])}"
    splitting = document.get("pre_tokenizer")
    if splitting != {"type": "Sequence", "pretokenizers": WORDS}:
        steps = (splitting or {}).get("pretokenizers", [splitting])
        yield f"pre_tokenizer {shown(next((step for step in steps if step not in WORDS), steps))}"
    known = {piece: number for number, (piece, _) in enumerate(model["vocab"])}
    after = count(len(model["vocab"]))
    for token in document["added_tokens"]:
        if token["content"] == "":
            yield "an added token of no letters"
        # `tokenizers` numbers them itself: by the vocabulary, else one after the other.
        if token["content"] not in known:
            known[token["content"]] = next(after)
        if token["id"] != (number := known[token["content"]]):
            yield f"added token {shown(token['content'])} with the id {token['id']}, which is read as {number}"
        if flag := next((flag for flag in FLAGS if token[flag]), None):
            yield f"added token {shown(token['content'])} with {flag}"
    template = document.get("post_processor")
    if template is None or template["type"] != "TemplateProcessing":
        yield f"post_processor {shown(template and template['type'])}"
    elif sum("Sequence" in row for row in template["single"]) != 1:
        yield f"post_processor {shown(template['single'])}"
    for key in ("padding", "truncation"):
        if (side := document[key]["direction"]) != "Right":
            yield f"{key} on the side {shown(side)}"
