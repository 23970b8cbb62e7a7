"""Prompts tokenized without transformers: the ids that transformers gives, from each kind of tokenizer folder."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from export.errors import ContractError, ModelError, RecipeError
from pipeline.generate import spiece
from pipeline.generate.convert_tokenizer import convert_tokenizer, refuse_tokenizer
from pipeline.generate.tokenizer import NO_LIMIT, PromptTokenizer

TEXTS = [
    "a red cube on a green table, photographed from above",
    "ein roter Würfel auf einem grünen Tisch",
    "un cube rouge posé sur une table verte, à côté d'une fenêtre",
    "赤い立方体が緑のテーブルの上にある",
    "красный куб на столе",
    "مكعب أحمر على طاولة خضراء",
    "an astronaut's 2 cats, 37 stars and 100 % of the moon",
    "빨간 큐브가 초록색 테이블 위에",
]
PROMPTS = [
    *TEXTS,
    "",
    " ",
    " \t\n  ",
    "  two  spaces\tand a tab \n",
    "A CAPITAL Letter",
    "🦊🌈 a fox 👩‍👩‍👧‍👦 under a rainbow 🏳️‍🌈",
    "\x00 null \x07 bell \x1b[31m escape \x7f",
    "\u200b zero \u200d width \ufeff mark \u00a0 blank \u3000 wide",
    "ﬁne ligatures Ⅳ ½ ① e\u0301 \u00e9 ㍿ ﾊﾝｶｸ",
    "</s> <pad> <extra_id_0> <|endoftext|> [SEP] [CLS] as they stand",
    "x" * 300,
    " ".join(TEXTS * 4),
    "日本語" * 60,
    "🦊" * 90,
    "don't I'll we've they're 1234567 3.14",
]
LENGTH = 24
# What transformers writes where there is none.
LIMITLESS = 1000000000000000019884624838656


def corpus() -> list[str]:
    return [text for text in TEXTS for _ in range(20)]


def message(number: int, data: bytes) -> bytes:
    """A field of protocol buffers."""
    size, head = len(data), b""
    while size > 127:
        head, size = head + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + head + bytes([size]) + data


def spiece_bytes(pieces: list[spiece.Piece], algorithm: int = spiece.UNIGRAM, charsmap: bytes = b"") -> bytes:
    """A SentencePiece model file."""
    parts = [
        message(1, message(1, p.text.encode()) + b"\x15" + struct.pack("<f", p.score) + bytes([0x18, p.kind]))
        for p in pieces
    ]
    return b"".join(parts) + message(2, bytes([0x18, algorithm])) + message(3, message(2, charsmap))


@cache
def t5_pieces() -> list[spiece.Piece]:
    """Of a Unigram model of the corpus."""
    trained = Tokenizer(models.Unigram())
    trained.normalizer = normalizers.NFKC()
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(corpus(), trainers.UnigramTrainer(vocab_size=300, show_progress=False))
    vocabulary = json.loads(trained.to_str())["model"]["vocab"]
    special = [("<pad>", spiece.CONTROL), ("</s>", spiece.CONTROL), ("<unk>", spiece.UNKNOWN)]
    return [spiece.Piece(text, 0.0, kind) for text, kind in special] + [
        spiece.Piece(text, float(np.float32(score))) for text, score in vocabulary
    ]


def write_config(folder: Path, **keys: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(keys))


def t5_spiece(folder: Path) -> str:
    (folder / "spiece.model").write_bytes(spiece_bytes(t5_pieces()))
    pad = {"__type": "AddedToken", "content": "<pad>"}
    write_config(folder, tokenizer_class="T5Tokenizer", extra_ids=5, model_max_length=512, pad_token=pad)
    return "T5Tokenizer"


def t5_fast(folder: Path) -> str:
    """As transformers saves it."""
    from transformers import T5Tokenizer

    vocabulary = [(piece.text, piece.score) for piece in t5_pieces()] + [
        (f"<extra_id_{i}>", 0.0) for i in range(4, -1, -1)
    ]
    T5Tokenizer(vocab=vocabulary, extra_ids=5, model_max_length=LIMITLESS).save_pretrained(folder)
    assert (folder / "tokenizer.json").is_file()
    return "T5TokenizerFast"


def clip(folder: Path) -> str:
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    trained.normalizer = normalizers.Lowercase()
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    trained.train_from_iterator(corpus(), trainer)
    trained.model.save(str(folder))
    write_config(folder, tokenizer_class="CLIPTokenizer", model_max_length=77)
    return "CLIPTokenizer"


def bert(folder: Path) -> str:
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizers.BertNormalizer()
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    trained.train_from_iterator(corpus(), trainer)
    trained.model.save(str(folder))
    write_config(folder, tokenizer_class="BertTokenizer", model_max_length=512, do_lower_case=True)
    return "BertTokenizer"


def qwen(folder: Path) -> str:
    """Byte-level BPE, padded and cut at the left, as text encoders that are language models are."""
    from transformers import Qwen2Tokenizer

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(corpus(), trainer)
    trained.model.save(str(folder))
    made = Qwen2Tokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), padding_side="left", truncation_side="left"
    )
    made.save_pretrained(folder)
    return "Qwen2Tokenizer"


FOLDERS = {row.__name__: row for row in (t5_spiece, t5_fast, clip, bert, qwen)}


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    place = tmp_path / "tokenizer"
    place.mkdir()
    return place, FOLDERS[request.param](place)


def of_transformers(folder: Path, class_name: str, prompts: list[str], length: int) -> Any:
    """Called as the pipelines of diffusers do."""
    import transformers

    if class_name == "T5Tokenizer":  # its file needs a package that transformers does not ask for
        vocabulary = [(piece.text, piece.score) for piece in t5_pieces()]
        vocabulary += [(f"<extra_id_{i}>", 0.0) for i in range(4, -1, -1)]
        tokenizer = transformers.T5Tokenizer(vocab=vocabulary, extra_ids=5)
    else:
        tokenizer = getattr(transformers, class_name).from_pretrained(folder, local_files_only=True)
    return tokenizer(
        prompts, padding="max_length", max_length=length, truncation=True, return_attention_mask=True,
        add_special_tokens=True, return_tensors="np",
    )  # fmt: skip


@pytest.mark.torch  # imports what imports it
@pytest.mark.parametrize("folder", FOLDERS, indirect=True)
def test_ids_are_those_of_transformers(folder: tuple[Path, str], tmp_path: Path) -> None:
    place, class_name = folder
    convert_tokenizer(place, class_name, tmp_path / "out")
    for length in (LENGTH, 3, 120):
        ours = PromptTokenizer.load(tmp_path / "out/tokenizer.json", length)(PROMPTS)
        theirs = of_transformers(place, class_name, PROMPTS, length)
        np.testing.assert_array_equal(ours.input_ids, theirs["input_ids"])
        np.testing.assert_array_equal(ours.attention_mask, theirs["attention_mask"])
        assert ours.input_ids.dtype == ours.attention_mask.dtype == np.int64
    assert sum(text is not None for text in ours.left_out) < len(PROMPTS)


@pytest.mark.torch
def test_bert_s_ids_are_those_of_its_first_tokenizer(tmp_path: Path) -> None:
    """The one written in Python, from which the others were made."""
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

    bert(tmp_path)
    convert_tokenizer(tmp_path, "BertTokenizer", tmp_path / "out")
    slow = BertTokenizerLegacy(str(tmp_path / "vocab.txt"))
    ours = PromptTokenizer.load(tmp_path / "out/tokenizer.json", LENGTH)(PROMPTS)
    theirs = slow(PROMPTS, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="np")
    np.testing.assert_array_equal(ours.input_ids, theirs["input_ids"])
    np.testing.assert_array_equal(ours.attention_mask, theirs["attention_mask"])


@pytest.mark.torch
def test_t5_s_ids_are_those_of_sentencepiece(tmp_path: Path) -> None:
    """Of a model that it trained, with its normalization."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    (tmp_path / "corpus.txt").write_text("\n".join(corpus()), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "spiece"), vocab_size=110, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, model_type="unigram", minloglevel=2,
    )  # fmt: skip
    write_config(tmp_path, tokenizer_class="T5Tokenizer", extra_ids=5, model_max_length=LIMITLESS)
    convert_tokenizer(tmp_path, "T5Tokenizer", tmp_path / "out")
    from transformers import T5Tokenizer

    theirs = T5Tokenizer.from_pretrained(tmp_path)(PROMPTS, padding="max_length", max_length=300, truncation=True)
    ours = PromptTokenizer.load(tmp_path / "out/tokenizer.json", 300)(PROMPTS)
    np.testing.assert_array_equal(ours.input_ids, theirs["input_ids"])
    own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    for prompt, ids, mask in zip(PROMPTS, ours.input_ids, ours.attention_mask, strict=True):
        if "</s>" not in prompt:  # special tokens are none to SentencePiece itself
            expected = [*own.encode(prompt)[:299], 1]
            assert ids[mask == 1].tolist() == expected, prompt


# --- without transformers ------------------------------------------------------------------------------------------


def small(folder: Path, direction: str = "right") -> Path:
    """A tokenizer of words, of our own making."""
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "cube", "on", "table"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_padding(pad_id=0, pad_token="<pad>", direction=direction)
    tokenizer.enable_truncation(5, direction=direction)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_what_does_not_fit_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens = PromptTokenizer.load(small(tmp_path))(["A red cube", "a RED cube on a Table", "", "violet"])
    assert tokens.input_ids.tolist() == [[3, 4, 5, 1, 0], [3, 4, 5, 6, 1], [1, 0, 0, 0, 0], [2, 1, 0, 0, 0]]
    assert tokens.attention_mask.sum(axis=1).tolist() == [4, 5, 1, 2]
    assert tokens.left_out == (None, "a Table", None, None)
    assert "has 2 tokens more than the 5 that fit: 'a Table' is left out" in caplog.text
    assert PromptTokenizer.load(tmp_path / "tokenizer.json", 9)(["a RED cube on a Table"]).left_out == (None,)
    assert PromptTokenizer.load(tmp_path / "tokenizer.json")([]).input_ids.shape == (0, 5)


def test_from_the_left(tmp_path: Path) -> None:
    tokens = PromptTokenizer.load(small(tmp_path, "left"))(["a red", "a red cube on a table"])
    assert tokens.input_ids.tolist() == [[0, 0, 3, 4, 1], [5, 6, 3, 7, 1]]
    assert tokens.left_out == (None, "a red")


def test_a_tokenizer_does_not_change(tmp_path: Path) -> None:
    long, short = (PromptTokenizer.load(small(tmp_path), length) for length in (8, 3))
    assert short(["a red cube"]).left_out == ("cube",) and long(["a red cube"]).left_out == (None,)


def test_prompts_and_lengths_that_are_none(tmp_path: Path) -> None:
    path = small(tmp_path)
    for length in (0, 1, 1 << 20):
        with pytest.raises(RecipeError, match=f"max_length {length} must be 2 to"):
            PromptTokenizer.load(path, length)
    with pytest.raises(RecipeError, match="is not text"):
        PromptTokenizer.load(path)(["a \ud800 cube"])


@pytest.mark.parametrize(
    "text, why",
    [
        ("", "is not a tokenizer"),
        ("{}", "is not a tokenizer"),
        ('{"model": 3}', "is not a tokenizer"),
        (None, "is missing"),
    ],
)
def test_a_file_that_is_no_tokenizer(text: str | None, why: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ContractError, match=why):
        PromptTokenizer.load(tmp_path / "tokenizer.json", 5)


def test_a_tokenizer_that_says_too_little(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(small(tmp_path)))
    tokenizer.enable_truncation(NO_LIMIT)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(RecipeError, match="states no length of prompts; give max_length"):
        PromptTokenizer.load(tmp_path / "tokenizer.json")
    tokenizer.no_padding()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ContractError, match="does not say how prompts are padded and cut"):
        PromptTokenizer.load(tmp_path / "tokenizer.json", 5)


def test_folders_that_cannot_be_converted(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="tokenizer LlamaTokenizer is not supported; use one of T5Tokenizer"):
        refuse_tokenizer(tmp_path, "LlamaTokenizer")
    with pytest.raises(ModelError, match=r"CLIPTokenizerFast is read from tokenizer.json or vocab.json and merges.txt"):
        refuse_tokenizer(tmp_path, "CLIPTokenizerFast")
    (tmp_path / "vocab.txt").write_text("[PAD]")
    with pytest.raises(ModelError, match=r"tokenizer_config.json is missing"):
        refuse_tokenizer(tmp_path, "BertTokenizer")


RUN = """
import sys
from tests.support.absent import hide, visible
hide()
from pathlib import Path
from pipeline.generate.schedulers.config import SCHEDULERS
from pipeline.generate.tokenizer import PromptTokenizer
print(PromptTokenizer.load(Path(sys.argv[1]))(["a red cube"]).input_ids.tolist(), len(SCHEDULERS), visible())
"""


@pytest.mark.process
def test_the_compiler_s_packages_are_not_needed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUN, str(small(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "[[3, 4, 5, 1, 0]] 9 []\n", done.stderr


# --- SentencePiece models ------------------------------------------------------------------------------------------

FEW = [spiece.Piece("<pad>", 0, 3), spiece.Piece("</s>", 0, 3), spiece.Piece("<unk>", 0, 2), spiece.Piece("▁a", -2.5)]


def test_a_model_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "spiece.model"
    path.write_bytes(spiece_bytes(FEW, charsmap=b"\x00\x01" * 100))
    assert spiece.read(path) == spiece.SpieceModel(tuple(FEW), b"\x00\x01" * 100)
    path.write_bytes(spiece_bytes(FEW))
    assert spiece.read(path).charsmap is None


@pytest.mark.parametrize(
    "data, why",
    [
        (b"", "it has no pieces"),
        (b"\x0a", "not a whole SentencePiece model"),
        (b"\xff" * 40, "not a whole SentencePiece model"),
        (b"\x08\x01", "where it must be bytes"),
        (spiece_bytes(FEW)[:20], "ends within a field"),
        (spiece_bytes(FEW, algorithm=2), r"model_type is 2, not 1 \(Unigram\)"),
        (spiece_bytes(FEW[1:]), r"unknown pieces at \[1\], T5 has one at 2"),
        (spiece_bytes([spiece.Piece("a", 0), *FEW[:2]]), r"unknown pieces at \[\]"),
    ],
)
def test_a_model_file_that_is_none(data: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(data)
    with pytest.raises(ModelError, match=why):
        spiece.read(tmp_path / "spiece.model")
