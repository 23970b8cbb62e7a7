"""The card of a bundle: front matter, licence, what it says of formats, gates and how to run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from export.models.sources import ZOO
from pipeline.bundle import card
from pipeline.bundle.card import UNKNOWN, License, base_model, compose, license_of, read_parts
from pipeline.bundle.hub import Repository
from pipeline.push import main
from tests.bundle.test_hub import GATE, PARITY, make
from tests.support.hostile import edit, reseal

HERE = Repository("me/small", "v1")


def front(text: str) -> Any:
    """The front matter of a card."""
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def made_of(folder: Path, source: str, family: str = "pixart") -> Path:
    """The bundle, as if of another model."""
    edit(folder / "manifest.json", lambda row: row["model"].update(source=source, family=family, revision="abc"))
    return folder


def test_a_bundled_model(tmp_path: Path) -> None:
    text = compose(read_parts(made_of(make(tmp_path / "small"), "zoo:pixart_mini")), HERE)
    assert front(text) == {
        "license": "apache-2.0",
        "library_name": "ditc",
        "tags": ["ditc", "quantized", "onnx", "pixart", "e2m1", "e2m3"],
    }
    for words in (
        'load("hf://me/small@v1")',
        "Made of zoo:pixart_mini, revision abc (sha256 of the weights `0000",
        "| E2M1 x E2M3 | 1 |",
        "| `cpu/finite` | 0 | at most | 0 | values |",
        '```toml\nname = "small"\n```',
        "That of the model: apache-2.0.",
    ):
        assert words in text, words


def test_a_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "license_of", lambda source: License("openrail++"))
    source = "PixArt-alpha/PixArt-XL-2-512x512@main"
    text = compose(read_parts(made_of(make(tmp_path / "small"), source)), HERE)
    assert front(text)["base_model"] == ["PixArt-alpha/PixArt-XL-2-512x512"]
    assert front(text)["base_model_relation"] == "quantized" and front(text)["license"] == "openrail++"


def test_a_folder_is_not_named_and_its_licence_not_made_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made_of(make(tmp_path / "small"), "/home/ann/models/secret")
    assert main([str(folder), HERE.name, "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "the manifest of small names /home/ann/models/secret, from which its model was read" in shown.err
    assert "/home/ann" not in shown.out and "base_model" not in shown.out
    assert "license: 'unknown'" in shown.out and "does not say under which licence it is" in shown.out
    assert main([str(folder), HERE.name, "--dry-run", "--license", "mit", "--json"]) == 0
    assert front(json.loads(capsys.readouterr().out)["card"])["license"] == "mit"


@pytest.mark.parametrize(
    ("lines", "license"),
    [
        ("license: mit", License("mit")),
        ("tags:\n- a\nlicense: 'apache-2.0'  # really\nlanguage: en", License("apache-2.0")),
        (
            "license: other\nlicense_name: the model's own\nlicense_link: https://example.org/a",
            License("other", "the model's own", "https://example.org/a"),
        ),
        ("license:\n- a", UNKNOWN),
        ("tags: []", UNKNOWN),
    ],
)
def test_the_licence_is_what_the_model_s_card_says(lines: str, license: License, tmp_path: Path) -> None:
    model = tmp_path / "pipe/transformer"
    model.mkdir(parents=True)
    (tmp_path / "pipe/README.md").write_text(f"---\n{lines}\n---\n# Model\n\nlicense: gpl\n")
    assert license_of(str(model)) == license


def test_models_that_say_nothing(tmp_path: Path) -> None:
    assert license_of(str(tmp_path)) == license_of(str(tmp_path / "gone")) == license_of("nobody/nothing") == UNKNOWN
    (tmp_path / "README.md").write_bytes(b"\xff")
    assert license_of(str(tmp_path)) == UNKNOWN
    for source in ("zoo:dit_mini", str(ZOO / "pixart_scenes/transformer")):
        assert license_of(source).identifier == "apache-2.0"


def test_several_licences_and_texts_that_yaml_would_read(tmp_path: Path) -> None:
    parts = read_parts(make(tmp_path / "small"))
    stated = front(card.front_matter(parts, ["a/b", "c/d"], [License("mit"), License("apache-2.0")]) + "\n")
    assert (stated["license"], stated["license_name"]) == ("other", "mit and apache-2.0")
    stated = front(card.front_matter(parts, [], [License("other", "it's: no\n- list", "#x")]) + "\n")
    assert (stated["license_name"], stated["license_link"]) == ("it's: no - list", "#x")


def test_what_is_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a/b").mkdir(parents=True)
    assert base_model("a/b") is None and base_model("a/c") == "a/c"
    assert base_model("a/c.safetensors") is None and base_model("zoo:dit_mini") is None


def test_how_each_kind_is_run(tmp_path: Path) -> None:
    folder = make(tmp_path / "small")
    assert "pipe.transformer = load" in card.usage(read_parts(folder), HERE)
    (folder / "generation.json").write_text("{}")
    reseal(folder)
    assert "ditc generate hf://me/small@v1 --prompt" in card.usage(read_parts(folder), HERE)
    assert 'load("hf://me/small@v1").engine()' in card.usage(read_parts(made_of(folder, "here", "t5")), HERE)


def test_values_that_are_no_numbers(tmp_path: Path) -> None:
    gates = [GATE | {"value": None}, GATE | {"value": "inf", "at_most": False}]
    text = compose(read_parts(make(tmp_path / "small", PARITY | {"gates": gates})), HERE)
    assert "| `cpu/finite` | - | at most | 0 | values |" in text
    assert "| `cpu/finite` | inf | at least | 0 | values |" in text
