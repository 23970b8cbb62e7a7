"""A tokenizer as transformers' T5Tokenizer makes it, by the package `tokenizers`; and tables of characters for one."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

PAD, END, UNKNOWN = SPECIAL = ("<pad>", "</s>", "<unk>")


def unigram(pieces: Sequence[tuple[str, float]], length: int, table: Mapping[str, str] | None = None) -> Tokenizer:
    """Of pieces and their scores, behind the special ones. length: tokens of a prompt. table: what characters are
    normalized to."""
    tokenizer = Tokenizer(models.Unigram([*((piece, 0.0) for piece in SPECIAL), *pieces], unk_id=2))
    if table is not None:
        tokenizer.normalizer = normalizers.Precompiled(compiled(table))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(f"$A {END}", special_tokens=[(END, 1)])
    tokenizer.add_special_tokens([*SPECIAL, "<extra_id_0>"])
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(pad_id=0, pad_token=PAD, length=length)
    return tokenizer


def compiled(table: Mapping[str, str]) -> bytes:
    """A table of sentencepiece: a double array (Darts) over the bytes of the keys, and the texts that they lead to."""
    texts, places = b"", {}
    for key, value in table.items():
        places[key.encode()] = len(texts)
        texts += value.encode() + b"\0"
    units, taken = [0] * (1 << 16), {0}

    def fill(place: int, keys: Sequence[bytes], depth: int) -> None:
        """The unit at `place` for keys that are equal up to `depth`: free places for what follows."""
        labels = sorted({key[depth] if len(key) > depth else 0 for key in keys})
        base = next(base for base in range(1, len(units)) if taken.isdisjoint(base ^ label for label in labels))
        taken.update(base ^ label for label in labels)
        units[place] |= (place ^ base) << 10 | (labels[0] == 0) << 8
        for label in labels:
            some = [key for key in keys if (key[depth] if len(key) > depth else 0) == label]
            if label == 0:
                units[base] = 1 << 31 | places[some[0]]
            else:
                units[base ^ label] = label
                fill(base ^ label, some, depth + 1)

    fill(0, list(places), 0)
    return struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + texts
