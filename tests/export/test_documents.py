"""The reader of documents from outside: form, bounds, schema; each fault has its sentence."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired

import pytest
from annotated_types import Ge
from typing_extensions import TypedDict

from export.documents import MOST_DEPTH, Rules, check_json, open_file, parse_toml, read_json, read_text, whole_file
from export.errors import ContractError, ModelError, RecipeError


@dataclass(frozen=True)
class Row:
    """A dataclass in a document; JSON has a list where it has a tuple."""

    name: str
    sizes: tuple[int, ...]


class Document(TypedDict):
    """A document of the tests."""

    count: Annotated[int, Ge(1)]
    ratio: NotRequired[float]
    rows: NotRequired[list[Row]]


PLAIN = Rules()


def read(tmp_path: Path, text: str | bytes, rules: Rules = PLAIN) -> Document:
    path = tmp_path / "a.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_json(path, Document, rules)


def test_a_document_is_what_its_schema_says(tmp_path: Path) -> None:
    document: Any = read(tmp_path, '{"count": 1, "ratio": 2, "rows": [{"name": "é", "sizes": [1, 2]}], "more": [null]}')
    assert document == {"count": 1, "ratio": 2.0, "rows": [Row("é", (1, 2))], "more": [None]}
    assert read(tmp_path, b'\xef\xbb\xbf{"count": 1}') == {"count": 1}, "a byte order mark is left out"


def test_infinity_is_a_number_where_it_may_be(tmp_path: Path) -> None:
    rules = Rules(infinite=True)
    assert read(tmp_path, '{"count": 1, "ratio": -Infinity}', rules) == {"count": 1, "ratio": -math.inf}
    with pytest.raises(ContractError, match="NaN is not a number"):
        read(tmp_path, '{"count": 1, "ratio": NaN}', rules)


FAULTS = {
    "{": "is not valid JSON",
    '{"count": 1} {}': "is not valid JSON",
    '{"count": 1, "count": 2}': "key 'count' stands there twice",
    '{"count": NaN}': "NaN is not a number",
    '{"count": -Infinity}': "-Infinity is not a number",
    '{"count": 1, "ratio": 1e999}': "too large",
    '{"count": 9223372036854775808}': "does not fit into 64 bits",
    '{"count": 1, "x": "\\u0000"}': "cannot be shown",
    '{"count": 1, "\\u001b[2J": 0}': "cannot be shown",
    '{"count": 1, "x": "\\ud800"}': "cannot be shown",
    "[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1): "is nested more than",
    "[" * 10**6: "is nested more than",
    "[]": "the document is []",
    "{}": "'count' is missing",
    '{"count": "1"}': "count is '1'; it should be a valid integer",
    '{"count": 1.0}': "count is 1.0",
    '{"count": true}': "count is True",
    '{"count": 0}': "count is 0; it should be greater than or equal to 1",
    '{"count": 1, "rows": [{"name": "a"}]}': "'rows.0.sizes' is missing",
}


@pytest.mark.parametrize("text", FAULTS, ids=lambda text: ascii(text[:30]))
def test_faults_are_named(text: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as refusal:
        read(tmp_path, text, Rules(ModelError, "download it again"))
    assert FAULTS[text] in str(refusal.value) and str(refusal.value).endswith("; download it again")
    assert "a.json" in str(refusal.value)


@pytest.mark.parametrize("data", [b"\xff\xfe{\x00}\x00", b'{"a": "\xe9"}'], ids=["UTF-16", "Latin-1"])
def test_other_encodings_are_refused(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"is not in UTF-8 \(.* at byte \d+\)"):
        read(tmp_path, data)


def test_unknown_keys_and_versions(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="key 'more' is unknown"):
        read(tmp_path, '{"count": 1, "more": 2}', Rules(extra="forbid"))
    for version in ("1", "true", '"2"', "2.0"):
        with pytest.raises(ContractError, match=r"schema version .*, this version reads 2; build it again"):
            read(tmp_path, f'{{"count": 1, "schema_version": {version}}}', Rules(version=2))
    assert check_json('{"schema_version": 2}', "here", Rules(version=2)) == {"schema_version": 2}


def test_a_text_of_any_length_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x" * 100)
    assert len(read_text(tmp_path / "a", most_bytes=100)) == 100
    with pytest.raises(ContractError, match="has more than 99 bytes"):
        read_text(tmp_path / "a", most_bytes=99)


def test_only_files_are_opened_and_nothing_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    cases = {"pipe": "is a pipe", "link": "is a pipe", ".": "is a folder", "none": "is missing"}
    for name, words in cases.items():
        with pytest.raises(ContractError, match=f"{words}.*; look"):
            open_file(tmp_path / name, remedy="look")
    for path in ("/dev/zero", "/dev/stdin"):
        with pytest.raises(ContractError, match=r"is a device|is a pipe|is missing"):
            open_file(Path(path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a = ", "not valid TOML"),
        ("a = " + "9" * 5000, "not valid TOML"),
        ("a = 9223372036854775808", "does not fit into 64 bits"),
        ("a = " + "[" * 5000, "is nested more than"),
        (".".join("a" * 200) + " = 1", "is nested more than"),
        ('a = "\\u001b"', "cannot be shown"),
        ("a = 1\na = 2", "not valid TOML"),
    ],
)
def test_toml_has_the_same_bounds(text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse_toml(text, "r.toml", Rules(RecipeError, "look"))


@pytest.mark.process
def test_the_locale_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('name = "caf\u00e9"\nmodel = "x"\n', "utf-8")
    code = "import sys; from pipeline.recipe import load; assert load(sys.argv[1]).name == 'caf\\xe9'"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.toml")], env=environment, cwd=root, check=True)


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, shared: bool) -> None:
    path = tmp_path / "new" / "file"
    with whole_file(path, shared) as part:
        part.write_text("old")
        assert not path.exists() and part.parent == path.parent
    with pytest.raises(OSError, match="full"), whole_file(path, shared) as part:
        part.write_text("ne")
        raise OSError("full")
    assert [file.name for file in path.parent.iterdir()] == ["file"] and path.read_text() == "old"


def test_writers_of_a_shared_file_have_names_of_their_own(tmp_path: Path) -> None:
    with whole_file(tmp_path / "f", shared=True) as one, whole_file(tmp_path / "f", shared=True) as other:
        one.write_text("one"), other.write_text("other")
        assert one != other
    assert (tmp_path / "f").read_text() == "one"  # whose block ended last
