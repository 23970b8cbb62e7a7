"""The tokenizer of a pipeline, as transformers reads it, made into the one file that a bundle has. Part of a build."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.documents import Rules, open_file, read_text, whole_file
from export.errors import ModelError
from pipeline.generate import spiece
from pipeline.generate.pipeline_folder import REMEDY, refused_as_model_error
from pipeline.generate.tokenizer import NO_LIMIT, TOKENIZER_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG_FILE = "tokenizer_config.json"
SPIECE_FILE = "spiece.model"
# THE table of tokenizers: class in transformers -> sets of files, of which one is needed.
CLASSES: dict[str, tuple[tuple[str, ...], ...]] = {
    "T5Tokenizer": ((TOKENIZER_FILE,), (SPIECE_FILE,)),
    "CLIPTokenizer": ((TOKENIZER_FILE,), ("vocab.json", "merges.txt")),
    "BertTokenizer": ((TOKENIZER_FILE,), ("vocab.txt",)),
    "Qwen2Tokenizer": ((TOKENIZER_FILE,), ("vocab.json", "merges.txt")),
    "GemmaTokenizer": ((TOKENIZER_FILE,),),
}


def refuse_tokenizer(folder: Path, class_name: str) -> tuple[str, ...]:
    """The files that the tokenizer is read from. Raises ModelError, before any work, for a class that is not supported
    or files that are missing. class_name: what model_index.json says of the part, with "Fast" at its end or without."""
    sets = CLASSES.get(class_name.removesuffix("Fast"))
    if sets is None:
        raise ModelError(f"{folder}: tokenizer {class_name} is not supported; use one of {', '.join(CLASSES)}")
    files = next((names for names in sets if all((folder / name).is_file() for name in names)), None)
    if files is None:
        wanted = " or ".join(" and ".join(names) for names in sets)
        raise ModelError(f"{folder}: {class_name} is read from {wanted}, which are missing; {REMEDY}")
    for name in (*files, CONFIG_FILE):
        open_file(folder / name, ModelError, REMEDY).close()
    return files


def convert_tokenizer(folder: Path, class_name: str, output: Path) -> None:
    """Write `output`/tokenizer.json: that of `folder`, with how it pads and cuts. Raises ModelError for what
    transformers cannot read, or what has no token to pad with."""
    tokenizer = read_tokenizer(folder, class_name)
    if tokenizer.pad_token is None:
        raise ModelError(
            f"{folder}: the tokenizer has no pad_token, which batches of prompts need; add one to its config"
        )
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(min(tokenizer.model_max_length, NO_LIMIT), direction=tokenizer.truncation_side)
    backend.enable_padding(
        direction=tokenizer.padding_side,
        pad_id=tokenizer.pad_token_id,
        pad_type_id=tokenizer.pad_token_type_id,
        pad_token=tokenizer.pad_token,
    )
    with whole_file(output / TOKENIZER_FILE) as part:
        part.write_text(backend.to_str(), encoding="utf-8")


def read_tokenizer(folder: Path, class_name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of transformers. Raises ModelError for what it cannot read."""
    files = refuse_tokenizer(folder, class_name)
    with refused_as_model_error(f"{folder}: transformers cannot read this tokenizer"):
        return _from_spiece(folder) if SPIECE_FILE in files else _from_pretrained(folder, class_name)


def _from_pretrained(folder: Path, class_name: str) -> PreTrainedTokenizerBase:
    import transformers

    # Either name is the same class; "Fast" is what older folders say.
    return getattr(transformers, class_name.removesuffix("Fast")).from_pretrained(folder, local_files_only=True)


# Keys of tokenizer_config.json that T5Tokenizer takes.
T5_KEYS = ("eos_token", "unk_token", "pad_token", "extra_ids", "model_max_length", "padding_side", "truncation_side")


def _from_spiece(folder: Path) -> PreTrainedTokenizerBase:
    """T5's tokenizer from its SentencePiece model, as transformers makes it where the package sentencepiece is."""
    from transformers import AddedToken, T5Tokenizer

    model = spiece.read(folder / SPIECE_FILE)
    # Read as transformers reads it, not by the rules of documents: it says 10**30 for "no limit".
    config: dict[str, Any] = json.loads(read_text(folder / CONFIG_FILE, Rules(ModelError, REMEDY)))
    keys = {key: _text(config[key]) for key in T5_KEYS if config.get(key) is not None}
    extra = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(keys.get("extra_ids", 100)))]
    own = [
        AddedToken(piece.text, normalized=False, special=piece.kind == spiece.CONTROL)
        for piece in model.pieces
        if piece.kind in (spiece.CONTROL, spiece.USER_DEFINED)
    ]
    vocabulary = [(piece.text, piece.score) for piece in model.pieces] + extra
    return T5Tokenizer(
        vocab=vocabulary, additional_special_tokens=own, _spm_precompiled_charsmap=model.charsmap, **keys
    )


def _text(value: Any) -> Any:
    """A token that is written with its settings, by its text alone."""
    return value.get("content") if isinstance(value, dict) else value
