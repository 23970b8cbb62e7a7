"""The README: short, its generated parts are what the script writes, its commands are commands."""

import re
import shlex

import pytest

from benchmarks import readme
from pipeline.__main__ import VERBS

TEXT = readme.README.read_text(encoding="utf-8")
PAGES = [*readme.PAGES, readme.CLI]


def test_it_is_read_in_a_few_minutes():
    assert len(TEXT.encode()) <= 12_000


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)
def test_generated_parts_are_up_to_date(page):
    text = page.read_text(encoding="utf-8")
    assert text == readme.filled(text), "run python -m benchmarks.readme"


def test_every_generated_part_stands_somewhere():
    shown = [name for page in readme.PAGES for _, name, *_ in readme.PART.findall(page.read_text(encoding="utf-8"))]
    assert sorted(shown) == sorted(readme.PARTS)


def test_a_part_that_nothing_makes_is_an_error():
    with pytest.raises(KeyError, match="nothing"):
        readme.filled("<!-- begin nothing -->\n<!-- end nothing -->")


def test_the_verbs_page_is_what_their_parsers_say():
    assert readme.CLI.read_text(encoding="utf-8") == readme.cli(), "run python -m benchmarks.readme"
    assert re.findall(r"^## (\w+)", readme.cli(), re.MULTILINE) == list(VERBS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_verbs_and_modules_of_the_commands_exist(page):
    modules = set(re.findall(r"python -m ([a-z_]+(?:\.[a-z_][a-z0-9_]*)*)", page.read_text(encoding="utf-8")))
    assert {name.partition(".")[2] for name in modules if name.startswith("pipeline.")} <= set(VERBS)
    for name in modules:
        path = readme.ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_flags_shown_are_flags_of_their_verbs(page):
    from importlib import import_module

    for verb, line in re.findall(r"^    .*python -m pipeline\.(\w+) (.*)$", page.read_text("utf-8"), re.MULTILINE):
        flags = {name for flag in import_module(VERBS[verb][0]).make_parser().flags() for name in flag.option_strings}
        shown = {word for word in shlex.split(line, comments=True) if word.startswith("-")}
        assert shown <= flags, (verb, line)


def test_the_continuous_integration_finds_its_command():
    pattern = re.search(r"sed -n 's/(.*)/\\1/p'", (readme.ROOT / ".ci" / "run").read_text()).group(1)
    commands = re.findall(pattern.replace(r"\(", "(").replace(r"\)", ")"), TEXT, re.MULTILINE)
    assert commands == ["pip install -e '.[rtx,dev]' && ruff check . && mypy && pytest"]


def test_the_page_about_quality_is_up_to_date():
    from benchmarks.quality import tables as quality_tables

    assert quality_tables.PAGE.read_text() == quality_tables.page(), "run python -m benchmarks.quality.tables"
