"""Files that are read or written whole, and the one reader of documents: JSON and TOML, as strict as they must be.

A document is a regular file of bounded size in UTF-8. JSON has each key once, no NaN or Infinity, numbers that fit into
64 bits, texts that can be shown, and bounded depth. What is in it is checked by a schema: a TypedDict or a dataclass,
whose types pydantic enforces without converting anything.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn, SupportsFloat, TypeVar
from uuid import uuid4

from export.errors import ContractError, UserError

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")
MOST_BYTES = 8 << 20
MOST_TOML_BYTES = 256 << 10
# Deeper than any document of ours or of diffusers (6), and far from the interpreter's own limit (about 1000).
MOST_DEPTH = 48
BIGGEST_INTEGER = 2**63 - 1
# Line ends and tabs aside: they would steer a terminal that shows them, or cannot be encoded.
UNSHOWN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
SHOWN_CHARACTERS = 80
LISTED = 5
KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@dataclass(frozen=True)
class Rules:
    """How a kind of document is refused. version: what its `schema_version` must be; None: it has none.

    extra: whether keys that the schema does not name are left alone or refused. infinite: whether -Infinity and
    Infinity are numbers, as Python writes them into JSON; NaN never is.
    """

    error: type[UserError] = ContractError
    remedy: str = "build the bundle again"
    version: int | None = None
    version_remedy: str = "build it again, or install the version that made it"
    extra: Literal["ignore", "allow", "forbid"] = "allow"
    infinite: bool = False


class _WrongDocument(ValueError):
    """What is wrong with the text of a document, in words."""


# --- files ---------------------------------------------------------------------------------------------------------


def open_file(path: Path, error: type[UserError] = ContractError, remedy: str | None = None) -> BufferedReader:
    """A regular file, opened for reading. Raises `error` for whatever else has that name; nothing is waited for."""
    end = f"; {remedy}" if remedy else ""
    try:
        _refuse_special(path, os.stat(path).st_mode, error, end)
        # Not blocking: the name may have become that of a pipe since.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as missing:
        raise error(f"{path} is missing{end}") from missing
    except (OSError, ValueError) as reason:
        raise error(f"{path} cannot be read ({getattr(reason, 'strerror', None) or reason}){end}") from reason
    file = os.fdopen(descriptor, "rb")
    try:
        _refuse_special(path, os.fstat(descriptor).st_mode, error, end)
    except UserError:
        file.close()
        raise
    return file


@contextmanager
def whole_file(path: Path, shared: bool = False) -> Iterator[Path]:
    """Within, what is written to the path that is given; it takes `path`'s place at the end, if nothing was raised.

    So a reader finds the old file or the new one, and a failure leaves nothing. Folders are made. shared: others may
    write `path` at the same moment, as in a cache, so each has a name of its own beside it. Else the name is always the
    same, so that what a killed process left is overwritten. Not synced: the writer does where a crash must not harm.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid4().hex}.part" if shared else f"{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)  # there only if something failed


def _refuse_special(path: Path, mode: int, error: type[UserError], end: str) -> None:
    if not stat.S_ISREG(mode):
        kind = next((words for test, words in KINDS if test(mode)), "something else")
        raise error(f"{path} is {kind}, not a file{end}")


def sha256(path: Path, error: type[UserError] = ContractError, remedy: str | None = None) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces. Raises `error` as `open_file` does."""
    with open_file(path, error, remedy) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_bytes(path: Path, rules: Rules = Rules(), most_bytes: int = MOST_BYTES) -> bytes:
    """The content of a regular file of at most so many bytes."""
    with open_file(path, rules.error, rules.remedy) as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise rules.error(f"{path} has more than {most_bytes:,} bytes, which no such file needs; {rules.remedy}")
    return data


def read_text(path: Path, rules: Rules = Rules(), most_bytes: int = MOST_BYTES) -> str:
    """The text of a regular file of at most so many bytes, UTF-8 whatever the locale; a byte order mark is left out."""
    data = read_bytes(path, rules, most_bytes)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise rules.error(f"{path} is not in UTF-8 ({error.reason} at byte {error.start}); {rules.remedy}") from error


# --- JSON ----------------------------------------------------------------------------------------------------------


def read_json(path: Path, schema: type[T], rules: Rules = Rules()) -> T:
    """The JSON document in `path` as `schema` describes it. Raises `rules.error` naming the file and the first fault.

    schema: a TypedDict, a dataclass, or types made of them; keys that it does not name stay, unless rules.extra says
    otherwise.
    """
    text = read_text(path, rules)
    check_json(text, str(path), rules)
    return _validated(text, str(path), schema, rules)


def check_json(text: str, source: str, rules: Rules = Rules()) -> object:
    """The document in a JSON text, its form checked, its schema not."""
    with _refusing(source, rules, " is not valid JSON"):
        document = json.loads(
            text,
            parse_int=_integer,
            parse_float=_float,
            object_pairs_hook=_object,
            parse_constant=_infinity if rules.infinite else _no_constant,
        )
        _check_values(document)
    check_version(document, source, rules)
    return document


@contextmanager
def _refusing(source: str, rules: Rules, fault: str) -> Iterator[None]:
    """Within, a text is parsed and its values are checked. fault: what is wrong with a text of another form."""
    try:
        yield
    except RecursionError as error:
        raise rules.error(f"{source} is nested more than {MOST_DEPTH} deep; {rules.remedy}") from error
    except _WrongDocument as error:
        raise rules.error(f"{source}: {error}; {rules.remedy}") from error
    except ValueError as error:  # of json and tomllib, and what int() and datetime say of numbers and dates
        raise rules.error(f"{source}{fault} ({error}); {rules.remedy}") from error


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    document = dict(pairs)
    if len(document) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _WrongDocument(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
    return document


def _no_constant(name: str) -> NoReturn:
    raise _WrongDocument(f"{name} is not a number")


def _infinity(name: str) -> float:
    return _no_constant(name) if name == "NaN" else float(name)


def _integer(digits: str) -> int:
    if len(digits) > len(str(-BIGGEST_INTEGER)) or abs(int(digits)) > BIGGEST_INTEGER:
        raise _WrongDocument(f"the integer {digits[:20]}... does not fit into 64 bits")
    return int(digits)


def _float(digits: str) -> float:
    if not math.isfinite(float(digits)):
        raise _WrongDocument(f"the number {digits[:20]} is too large")
    return float(digits)


def _check_values(document: object) -> None:
    """Depth and texts of a parsed document, without recursion."""
    level: list[object] = [document]
    for _ in range(MOST_DEPTH):
        if not level:
            return
        level = [value for holder in level for value in _contents(holder)]
    raise RecursionError


def _contents(value: object) -> Iterator[object]:
    """What a value holds; nothing for a text or number, which is checked."""
    if isinstance(value, str) and UNSHOWN.search(value):
        raise _WrongDocument(f"the text {value[:SHOWN_CHARACTERS]!r} has characters that cannot be shown")
    if type(value) is int and abs(value) > BIGGEST_INTEGER:
        raise _WrongDocument(f"the integer {str(value)[:20]}... does not fit into 64 bits")
    if isinstance(value, dict):
        yield from value
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def check_version(document: object, source: str, rules: Rules) -> None:
    """Raise `rules.error` for a `schema_version` that is not the one of the rules."""
    if rules.version is None:
        return
    version = document.get("schema_version") if isinstance(document, dict) else None
    if type(version) is not int or version != rules.version:
        fault = f"schema version {shown(version)}, this version reads {rules.version}"
        raise rules.error(f"{source}: {fault}; {rules.version_remedy}")


def plain(value: object) -> object:
    """The same for JSON, which has no such numbers: nan becomes null, and inf a text; see `number_of`.

    >>> plain({"a": (1, math.inf, math.nan)})
    {'a': [1, 'inf', None]}
    """
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, int) or not isinstance(value, SupportsFloat):
        return value
    number = float(value)
    if math.isnan(number):
        return None
    return number if math.isfinite(number) else ("inf" if number > 0 else "-inf")


def number_of(value: float | str | None) -> float:
    """A number that `plain` has written."""
    return math.nan if value is None else float(value)


# --- schema --------------------------------------------------------------------------------------------------------


@cache
def _adapter(schema: type[T]) -> TypeAdapter[T]:
    from pydantic import TypeAdapter  # takes a tenth of a second, which `--help` and `list` need not spend

    return TypeAdapter(schema)


def _validated(text: str, source: str, schema: type[T], rules: Rules) -> T:
    """The document as an instance of `schema`; as JSON, where a list may stand for a tuple and nothing is converted."""
    from pydantic import ValidationError

    try:
        adapter: TypeAdapter[T] = _adapter(schema)  # type: ignore[arg-type]  # types are hashable
        return adapter.validate_json(text, strict=True, extra=rules.extra)
    except ValidationError as error:
        raise rules.error(f"{source}: {_first_fault(error)}; {rules.remedy}") from error


def validated(document: object, source: str, schema: type[T], rules: Rules = Rules()) -> T:
    """A document that was parsed already, as `schema` describes it; dates of TOML count as texts. Raises `rules.error`
    naming `source`."""
    return _validated(json.dumps(document, default=str), source, schema, rules)


# Of a value that may be of several kinds pydantic names the kind behind the key.
KIND = re.compile(r"constrained-\w+|\w+\[.+\]")


def _first_fault(error: ValidationError) -> str:
    """The first difference between a document and its schema, in words."""
    row = error.errors(include_url=False, include_context=False)[0]
    places = (str(place) for place in row["loc"])
    key = ".".join(place for place in places if not KIND.fullmatch(place)) or "the document"
    if row["type"] == "missing":
        return f"{key!r} is missing"
    if row["type"] in ("extra_forbidden", "unexpected_keyword_argument"):  # of a TypedDict, and of a dataclass
        return f"key {key!r} is unknown"
    return f"{key} is {shown(row['input'])}; {row['msg'].replace('Input', 'it', 1)}"


def listed(sentences: Sequence[str]) -> str:
    """The first few for a message, and how many there are more.

    >>> listed(list("abcdefg"))
    'a; b; c; d; e; and 2 more'
    """
    more = f"; and {len(sentences) - LISTED} more" if len(sentences) > LISTED else ""
    return f"{'; '.join(sentences[:LISTED])}{more}"


def shown(value: object) -> str:
    """A value of a document in a message: its beginning.

    >>> shown("a" * 200)[-5:], shown(None), shown([1, 2])
    ('aa...', 'None', '[1, 2]')
    """
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."


# --- TOML ----------------------------------------------------------------------------------------------------------


def parse_toml(text: str, source: str, rules: Rules) -> dict[str, object]:
    """The document in a TOML text; numbers may be inf or nan there. Raises `rules.error` naming `source`."""
    with _refusing(source, rules, ": not valid TOML"):
        document = tomllib.loads(text)
        _check_values(document)
    return document
