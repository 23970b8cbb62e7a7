"""The README: generated parts are what the script writes, every module is in the map, every named path exists."""

import re
import shlex

import pytest

from benchmarks import readme
from pipeline.__main__ import VERBS

TEXT = readme.README.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["formats", "recipes", "methods", "bundled-models", "quality", "speed"])
def test_generated_parts_are_up_to_date(name):
    assert readme.part(TEXT, name) == readme.PARTS[name](), "run python -m benchmarks.readme"


def test_the_code_map_names_every_module_and_only_modules():
    wanted, stated = (re.findall(r"^- `([^`]+)`", text, re.MULTILINE) for text in (readme.code_map(), TEXT))
    assert set(wanted) <= set(stated), "run python -m benchmarks.readme"
    for path in re.findall(r"^- `([^`]+)`", readme.part(TEXT, "code-map"), re.MULTILINE):
        assert (readme.ROOT / path).exists(), f"{path} is gone; run python -m benchmarks.readme"


def test_every_module_says_what_it_is():
    nameless = [line for line in readme.code_map().splitlines() if re.match(r"- `[^`]+`: *($|\()", line)]
    assert not nameless


def test_verbs_and_modules_of_the_commands_exist():
    modules = set(re.findall(r"python -m (\w+(?:\.\w+)*)", TEXT))
    assert {name.partition(".")[2] for name in modules if name.startswith("pipeline.")} <= set(VERBS)
    for name in modules:
        path = readme.ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", TEXT):
        assert (readme.ROOT / target).exists(), target


def test_the_flags_shown_are_flags_of_build(capsys):
    from pipeline import build

    with pytest.raises(SystemExit):
        build.main(["--help"])
    told = capsys.readouterr().out
    for line in re.findall(r"python -m pipeline\.build (.*)$", TEXT, re.MULTILINE):
        for word in shlex.split(line, comments=True):
            if word.startswith("-"):
                assert word in told, word


def test_the_continuous_integration_finds_its_command():
    pattern = re.search(r"sed -n 's/(.*)/\\1/p'", (readme.ROOT / ".ci" / "run").read_text()).group(1)
    found = re.findall(pattern.replace(r"\(", "(").replace(r"\)", ")"), TEXT, re.MULTILINE)
    assert found == ["pip install -e '.[rtx,dev]' && ruff check . && mypy && pytest"]


def test_the_page_about_quality_is_up_to_date():
    from benchmarks.quality import tables as quality_tables

    assert quality_tables.PAGE.read_text() == quality_tables.page(), "run python -m benchmarks.quality.tables"
