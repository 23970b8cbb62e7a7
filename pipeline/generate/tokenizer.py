"""Prompts to the token ids that a text encoder takes, by the `tokenizers` package: no torch, no transformers.

A bundle's `tokenizer/tokenizer.json` says all: the vocabulary, special tokens, how prompts are padded and cut, and the
most tokens. `convert_tokenizer.py` writes it when a pipeline is built.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from export.documents import Rules, read_bytes, shown
from export.errors import ContractError, RecipeError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
# The largest in use, of vocabularies of 256,000 tokens, have some 35 MB.
MOST_BYTES = 128 << 20
# Of a prompt; what the longest text encoders of pipelines are called with is 1024.
MOST_TOKENS = 1 << 16
# What a file's truncation states where its text encoder has no limit.
NO_LIMIT = MOST_TOKENS + 1
REMEDY = "build the bundle again"


@dataclass(frozen=True)
class Tokens:
    """What a text encoder is called with, for B prompts.

    input_ids: [B, L] int64. attention_mask: [B, L] int64, 1 for tokens of the prompt and 0 for padding. left_out: for
    each prompt the part of it that did not fit, None where all did.
    """

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    left_out: tuple[str | None, ...]


@dataclass(frozen=True)
class Cut:
    """What of a prompt does not fit. text: that part. sentence: on it, for people."""

    text: str
    sentence: str


class PromptTokenizer:
    """Tokenizes prompts to `max_length` tokens each. Nothing in it changes: it may be called from many threads."""

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        self._tokenizer, self.max_length = tokenizer, max_length

    @classmethod
    def load(cls, path: Path, max_length: int | None = None) -> PromptTokenizer:
        """From a tokenizer.json. max_length: tokens of a prompt with special tokens and padding, L; None: the file's.

        Raises ContractError for a file that is none, and RecipeError for a length that leaves no room for a prompt.
        """
        tokenizer = _read(path)
        padding, truncation = tokenizer.padding, tokenizer.truncation
        if padding is None or truncation is None:
            raise ContractError(f"{path} does not say how prompts are padded and cut; {REMEDY}")
        length = truncation["max_length"] if max_length is None else max_length
        least = tokenizer.num_special_tokens_to_add(is_pair=False) + 1
        if max_length is None and length == NO_LIMIT:
            raise RecipeError(f"{path} states no length of prompts; give max_length")
        if not least <= length <= MOST_TOKENS:
            raise RecipeError(f"max_length {length} must be {least} to {MOST_TOKENS} tokens")
        tokenizer.enable_truncation(length, direction=truncation["direction"])
        tokenizer.enable_padding(
            direction=padding["direction"],
            pad_id=padding["pad_id"],
            pad_type_id=padding["pad_type_id"],
            pad_token=padding["pad_token"],
            length=length,
        )
        return cls(tokenizer, length)

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Of prompts, as they are: see `plain_caption` for pipelines that lower them first. What does not fit is cut
        off and logged. Raises RecipeError for a prompt with characters that no encoding has."""
        encodings = self._encodings(prompts)
        cuts = [self._cut(*pair) for pair in zip(prompts, encodings, strict=True)]
        for cut in filter(None, cuts):
            logger.warning("%s", cut.sentence)
        shape = (len(encodings), self.max_length)
        return Tokens(
            np.array([encoding.ids for encoding in encodings], np.int64).reshape(shape),
            np.array([encoding.attention_mask for encoding in encodings], np.int64).reshape(shape),
            tuple(None if cut is None else cut.text for cut in cuts),
        )

    def cuts(self, prompts: Sequence[str]) -> tuple[Cut | None, ...]:
        """What of each prompt does not fit, None where all does; nothing is logged. Raises as a call."""
        return tuple(self._cut(*pair) for pair in zip(prompts, self._encodings(prompts), strict=True))

    def _encodings(self, prompts: Sequence[str]) -> list[Encoding]:
        for prompt in prompts:
            _refuse_surrogates(prompt)
        return self._tokenizer.encode_batch(list(prompts))

    def _cut(self, prompt: str, encoding: Encoding) -> Cut | None:
        spans = [
            span
            for rest in encoding.overflowing
            for span, special in zip(rest.offsets, rest.special_tokens_mask, strict=True)
            if not special
        ]
        if not spans:
            return None
        text = prompt[min(start for start, _ in spans) : max(end for _, end in spans)]
        more = f"{len(spans)} tokens more than the {self.max_length} that fit"
        return Cut(text, f"the prompt {shown(prompt)} has {more}: {shown(text)} is left out")


def canonical(path: Path) -> str:
    """What a tokenizer.json says, in the one form that this release of the package writes."""
    return str(_read(path).to_str())


def plain_caption(prompt: str) -> str:
    """A prompt as the pipelines of PixArt take it: in lower case, without blanks around it.

    So diffusers does where a prompt is not cleaned (`clean_caption`), which it needs beautifulsoup4 and ftfy for: HTML,
    addresses of the web and the like, as they were taken out of the captions of the training data.

    >>> plain_caption("  A Red Cube ")
    'a red cube'
    """
    return prompt.lower().strip()


def _refuse_surrogates(prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise RecipeError(f"prompt {shown(prompt)} is not text ({error.reason}); give it in UTF-8") from error


def _read(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    data = read_bytes(path, Rules(ContractError, REMEDY), MOST_BYTES)
    try:
        return Tokenizer.from_buffer(data)
    except BaseException as error:
        # What the library's Rust does not expect ends in a PanicException, which is no Exception.
        if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":
            raise
        raise ContractError(f"{path} is not a tokenizer ({' '.join(str(error).split())[:200]}); {REMEDY}") from error
