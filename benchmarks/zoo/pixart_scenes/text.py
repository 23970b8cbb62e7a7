"""The tokenizer: pieces of a Unigram model as T5 has them, learned from captions of scenes and of everyday pictures.

The pieces are those that merging pairs (BPE) finds, and the score of each is the logarithm of its share of the corpus:
training a Unigram model by expectation and maximisation gives other pieces from run to run, and few whole words where
the corpus has few.
"""

from __future__ import annotations

import math
import string
from collections import Counter
from importlib import resources
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import T5Tokenizer

from benchmarks.zoo.pixart_scenes import board
from benchmarks.zoo.pixart_scenes.captions import captions

PIECES = 768
SPECIAL = ("<pad>", "</s>", "<unk>")  # of the ids 0, 1 and 2, as T5 has them
MAX_LENGTH = 120  # tokens of a prompt, PixArt-alpha's own
SCENES, EVERYDAY = 4000, 200  # captions of scenes to learn from; how often each everyday caption counts


def corpus(seed: int) -> list[str]:
    """Captions to learn the pieces from."""
    scenes = captions(board.sample_split(SCENES, torch.Generator().manual_seed(seed)), seed)
    everyday = (resources.files("pipeline.generate") / "captions.txt").read_text(encoding="utf-8").lower().splitlines()
    return scenes + everyday * EVERYDAY


def train_tokenizer(folder: Path, seed: int) -> None:
    """Write tokenizer.json and tokenizer_config.json of a T5Tokenizer into `folder`."""
    merged = Tokenizer(models.BPE(unk_token=SPECIAL[2]))
    merged.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),  # so that no piece is a word with a comma
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first"),
        ]
    )
    # Every letter is a piece, so that words that were never seen are spelled.
    alphabet = [*string.ascii_lowercase, *string.digits, *".,:;!?'-\"()&%"]
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    texts = corpus(seed)
    merged.train_from_iterator(texts, trainer)
    counts = Counter(piece for encoding in merged.encode_batch(texts) for piece in encoding.tokens)
    # A piece of a word scores what it would if it had been seen once, at least.
    scores = {piece: math.log(max(counts[piece], 1) / counts.total()) for piece in merged.get_vocab()}
    learned = sorted(scores.keys() - set(SPECIAL), key=lambda piece: (-scores[piece], piece))
    vocabulary = [*((piece, 0.0) for piece in SPECIAL), *((piece, scores[piece]) for piece in learned)]
    T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=MAX_LENGTH).save_pretrained(folder)


def load_tokenizer(folder: Path) -> T5Tokenizer:
    """The one that `train_tokenizer` wrote."""
    return T5Tokenizer.from_pretrained(folder, local_files_only=True)
