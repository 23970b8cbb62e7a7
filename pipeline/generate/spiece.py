"""SentencePiece models (spiece.model), read: a message of protocol buffers, of which a tokenizer needs three fields."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from export.documents import Rules, read_bytes
from export.errors import ModelError
from pipeline.generate.pipeline_folder import REMEDY

# Kinds of pieces. Control and user-defined ones are tokens by themselves, never found inside a word.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
UNIGRAM = 1
# Where the models of T5 and mT5 have their unknown piece, and transformers takes it to be.
UNKNOWN_ID = 2
# The largest in use, of 256,000 pieces, has 4.6 MB.
MOST_BYTES = 64 << 20
# Of protocol buffers: how a field is stored.
VARINT, EIGHT_BYTES, SIZED, FOUR_BYTES = 0, 1, 2, 5
Field = tuple[int, int | bytes]


@dataclass(frozen=True)
class Piece:
    """One token: its text, its logarithm of probability, its kind."""

    text: str
    score: float
    kind: int = NORMAL


@dataclass(frozen=True)
class SpieceModel:
    """pieces: in the order of their ids. charsmap: how characters are normalized first, compiled; None: not at all."""

    pieces: tuple[Piece, ...]
    charsmap: bytes | None


def read(path: Path) -> SpieceModel:
    """Raises ModelError for a file that is none, or a model of another algorithm than Unigram."""
    data = read_bytes(path, Rules(ModelError, REMEDY), MOST_BYTES)
    try:
        model, algorithm = _parsed(data)
    except (ValueError, IndexError, struct.error) as error:
        raise ModelError(f"{path} is not a whole SentencePiece model ({error}); {REMEDY}") from error
    if algorithm != UNIGRAM:
        raise ModelError(f"{path}: its model_type is {algorithm}, not {UNIGRAM} (Unigram); give its tokenizer.json")
    unknown = [i for i, piece in enumerate(model.pieces) if piece.kind == UNKNOWN]
    if unknown != [UNKNOWN_ID]:
        raise ModelError(f"{path}: unknown pieces at {unknown}, T5 has one at {UNKNOWN_ID}; give its tokenizer.json")
    return model


def _parsed(data: bytes) -> tuple[SpieceModel, int]:
    """A ModelProto, and its trainer's model_type."""
    pieces, charsmap, algorithm = [], None, UNIGRAM
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(_sized(value)))
        elif number == 2:  # trainer_spec
            algorithm = next((_number(kind) for field, kind in _fields(_sized(value)) if field == 3), UNIGRAM)
        elif number == 3:  # normalizer_spec
            charsmap = next((_sized(text) for field, text in _fields(_sized(value)) if field == 2), None)
    if not pieces:
        raise ValueError("it has no pieces")
    return SpieceModel(tuple(pieces), charsmap or None), algorithm


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    score = struct.unpack("<f", _sized(fields.get(2, b"\0" * 4)))[0]
    return Piece(_sized(fields.get(1, b"")).decode(), score, _number(fields.get(3, NORMAL)))


def _number(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("a field is bytes where it must be a number")
    return value


def _sized(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a field is a number where it must be bytes")
    return value


def _fields(data: bytes) -> Iterator[Field]:
    """(number, value) of the fields of a message; value: an integer, or the bytes of anything else."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        stored = tag & 7
        if stored == VARINT:
            value, position = _varint(data, position)
            yield tag >> 3, value
            continue
        if stored not in (EIGHT_BYTES, SIZED, FOUR_BYTES):
            raise ValueError(f"a field is stored in way {stored}, which there is not")
        size, position = _varint(data, position) if stored == SIZED else (8 if stored == EIGHT_BYTES else 4, position)
        if position + size > len(data):
            raise ValueError("it ends within a field")
        yield tag >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number of seven bits for each byte, the lowest first; and the position behind it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number has more than ten bytes")
