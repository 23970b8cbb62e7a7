"""The page's tokenizer in node gives the ids of the package `tokenizers`; and what it does not know is refused."""
# ruff: noqa: RUF001 - letters of several scripts are what is tested

from __future__ import annotations

import copy
import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.errors import ModelError
from pipeline.generate.tokenizer import PromptTokenizer, plain_caption
from pipeline.web.tokenizer_rules import refuse_tokenizer
from tests.support.node import NEEDS_NODE, node
from tests.support.pieces import unigram

LENGTH = 60
LETTERS = (
    "abcdefghijklmnopqrstuvwxyzäöüéñçßøåабвгдежзийκλμνσςあいうカキク猫犬山川水火한국어नमस्तेสวัสดีمرحبا0123456789.,:;'-"
)
ODD = "  \t\r\n\v\u00a0\u3000\u200b\u200d\u0301\u0308\u0300ﬁ①½ＡｂÅ℃K★🙂👩🏽\u0085\ufeff\u2581~～ｶﾞŰİẞ\u0001ΣＺ"
WORDS = ("a", "the", "red", "blue", "circle", "ring", "on", "white", "猫", "über", "красный", "नमस्ते")
PLAIN = [
    "", " ", "a red circle on white", "  A Red circle\n\nON white ", "Ünïcödé ΣΑΣ", "e\u0301 o\u0308", "👩🏽‍👩‍👧 🇩🇪",
    "a</s>b<extra_id_0> <pad><unk>x</s></s>", "▁▁a ▁ b▁", "\r\na\r\nb", "red " * 300, "猫犬" * 200, "xyz" * 400,
    "★★★ ★a★",
]  # fmt: skip
SCRIPT = """
import { Tokenizer, plainCaption } from "./tokenizer.js";
const tokenizer = new Tokenizer(given.document, given.length);
console.log(JSON.stringify(given.prompts.map((text) => [tokenizer.tokens(text), plainCaption(text)])));
"""


def table() -> dict[str, str]:
    """As sentencepiece's for T5: blanks, control characters, compatible forms, and letters with marks."""
    found = dict.fromkeys("\t\r\n\v\u00a0\u3000\u200b", " ") | {"\u0001": "", "\u200d": ""}
    for text in [*ODD, *LETTERS, "e\u0301", "o\u0308", "a\u0300", "ｶﾞ"]:
        if (normal := unicodedata.normalize("NFKC", text)) != text:
            found.setdefault(text, normal)
    return found


def prompts() -> list[str]:
    rng, characters = random.Random(0), LETTERS + ODD * 4
    drawn = ["".join(rng.choices(characters, k=rng.randint(1, 50))) for _ in range(800)]
    spoken = [" ".join(rng.choices(WORDS, k=rng.randint(1, 80))) for _ in range(100)]
    return PLAIN + drawn + spoken


def pieces() -> list[tuple[str, float]]:
    rng = random.Random(1)
    parts = ["".join(rng.choices(LETTERS, k=rng.randint(2, 4))) for _ in range(1500)]
    # Without some letters, so that there are unknown ones side by side.
    texts = dict.fromkeys(["\u2581", *(f"\u2581{word}" for word in WORDS), *LETTERS[:60], *parts])
    return [(text, -rng.uniform(2, 14)) for text in texts]


@pytest.mark.process
@NEEDS_NODE
@pytest.mark.parametrize("normalized", [False, True])
def test_ids_are_those_of_tokenizers(normalized: bool, tmp_path: Path) -> None:
    tokenizer = unigram(pieces(), LENGTH, table() if normalized else None)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    refuse_tokenizer(tmp_path / "tokenizer.json", "it")
    texts = prompts()
    given = {"document": json.loads(tokenizer.to_str()), "length": LENGTH, "prompts": texts}
    rows = node(tmp_path / "t", SCRIPT, given)
    expected = PromptTokenizer.load(tmp_path / "tokenizer.json", LENGTH)(texts)
    cut = unknown = 0
    for text, (row, plain), ids, mask, left_out in zip(
        texts, rows, expected.input_ids.tolist(), expected.attention_mask.tolist(), expected.left_out, strict=True
    ):
        assert (row["ids"], row["mask"]) == (ids, mask), ascii(text)
        assert bool(row["leftOut"]) == (left_out is not None) and plain == plain_caption(text), ascii(text)
        cut += left_out is not None
        unknown += 2 in ids
    assert cut > 20 and 100 < unknown < len(texts) - 100


@pytest.mark.process
@NEEDS_NODE
def test_half_a_character_is_refused(tmp_path: Path) -> None:
    script = SCRIPT.replace("given.prompts.map", "['a\\ud800'].map")
    document = json.loads(unigram(pieces(), LENGTH).to_str())
    with pytest.raises(AssertionError, match="half a character"):
        node(tmp_path / "t", script, {"document": document, "length": LENGTH})


def put(*keys: str | int, value: Any) -> Callable[[Any], None]:
    """Sets a value in a document."""

    def changed(document: Any) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return changed


OTHERS = {
    "model 'WordPiece'": put("model", "type", value="WordPiece"),
    "byte_fallback": put("model", "byte_fallback", value=True),
    "without an unknown piece": put("model", "unk_id", value=None),
    "normalizer 'NFC'": put("normalizer", value={"type": "NFC"}),
    "pre_tokenizer .*'first'": put("pre_tokenizer", "pretokenizers", 1, "prepend_scheme", value="first"),
    "added token '</s>' with lstrip": put("added_tokens", 1, "lstrip", value=True),
    "an added token of no letters": put("added_tokens", 1, "content", value=""),
    "added token '</s>' with the id 9, which is read as 1": put("added_tokens", 1, "id", value=9),
    "model None": put("model", value={"vocab": []}),
    "post_processor 'BertProcessing'": put("post_processor", "type", value="BertProcessing"),
    "post_processor None": put("post_processor", value=None),
    r"post_processor \[\]": put("post_processor", "single", value=[]),
    "padding on the side 'Left'": put("padding", "direction", value="Left"),
    "truncation on the side 'Left'": put("truncation", "direction", value="Left"),
}


@pytest.mark.parametrize("words", OTHERS)
def test_what_the_page_does_not_know_is_refused_by_name(words: str, tmp_path: Path) -> None:
    document = copy.deepcopy(json.loads(unigram(pieces()[:5], LENGTH).to_str()))
    OTHERS[words](document)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(ModelError, match=f"^it: the page does not know .*{words}.*; it tokenizes as T5Tokenizer"):
        refuse_tokenizer(tmp_path / "tokenizer.json", "it")
