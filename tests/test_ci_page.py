"""docs/ci.md: its workflows are what GitHub and GitLab take, and their commands do what they say."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from benchmarks import readme
from benchmarks.tools.environments import CannotBeHadError
from pipeline.pytest_plugin import Parity
from pipeline.verify.baseline import load_tolerances
from tests.support import hostile
from tests.support.environments import python_with, without_xdist

PAGE = (readme.DOCS / "ci.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SCHEMAS = ("vendor.github-workflows", "vendor.gitlab-ci")
# What breaks each: else the check would show nothing.
BREAKS = (("    runs-on: ubuntu-latest\n", ""), ("    when: always\n", "    when: sometimes\n"))
INSTALL = "pip install 'ditc[build]'"
by_block = pytest.mark.parametrize("number", range(len(SCHEMAS)), ids=("github", "gitlab"))


def commands(number: int) -> list[str]:
    """What a workflow has a shell do."""
    document: Any = yaml.safe_load(BLOCKS[number])["parity" if number else "jobs"]
    if number:
        return list(document["script"])
    return [step["run"].strip() for step in document["parity"]["steps"] if "run" in step]


def test_there_is_a_workflow_for_each() -> None:
    assert len(BLOCKS) == len(SCHEMAS)
    for number in range(len(BLOCKS)):
        install, *others = commands(number)
        assert install == INSTALL and all(command.startswith("ditc ") for command in others) and len(others) == 2


def test_the_tolerances_shown_are_such(tmp_path: Path) -> None:
    [shown] = re.findall(r"(?:^ {4}.*\n|^\n)*^ {4}\[\[tolerance\]\]\n(?:^ {4}.*\n|^\n)*", PAGE, re.MULTILINE)
    path = tmp_path / "tolerances.toml"
    path.write_text(textwrap.dedent(shown))
    assert load_tolerances(path)[0].relative == 0.05


def test_the_test_shown_is_one() -> None:
    [code] = re.findall(r"^ {4}(def test_parity.*\n(?: {8}.*\n)*)", PAGE, re.MULTILINE)
    asked: list[tuple[object, object]] = []
    namespace: dict[str, Any] = {}
    exec(textwrap.dedent(f"    {code}"), namespace)
    namespace["test_parity"]("a bundle", lambda bundle, baseline: asked.append((bundle, baseline)))
    assert asked == [("a bundle", "parity/baseline.json")]
    assert "baseline" in inspect.signature(Parity.__call__).parameters


@pytest.mark.slow
@by_block
def test_it_is_what_the_published_schema_asks_for(number: int, tmp_path: Path) -> None:
    """The schemas are those that check-jsonschema carries."""
    try:
        python = python_with("check_jsonschema", "check-jsonschema>=0.33,<1")
    except CannotBeHadError as error:
        pytest.skip(str(error))
    assert BREAKS[number][0] in BLOCKS[number]
    for text, valid in ((BLOCKS[number], True), (BLOCKS[number].replace(*BREAKS[number]), False)):
        path = tmp_path / "workflow.yml"
        path.write_text(text)
        command = [str(python), "-m", "check_jsonschema", "--builtin-schema", SCHEMAS[number], str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=without_xdist())
        assert (done.returncode == 0) is valid, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.torch
def test_their_commands_do_what_they_say(tmp_path: Path) -> None:
    """On a model of a moment. All but the installation: what is tested is this tree."""
    hostile.make_models(tmp_path)
    (tmp_path / "recipe.toml").write_text(hostile.RECIPE.format(model=tmp_path / "model"))
    build, verify = commands(1)[1:]
    baseline = "ditc verify engines/candidate --quick --write-baseline parity/baseline.json"
    shell(tmp_path, build)
    assert shell(tmp_path, baseline).splitlines()[-1] == "PASSED engines/candidate"
    assert commands(0)[1] == build
    for command in (commands(0)[2], verify):
        assert shell(tmp_path, command).splitlines()[-1] == "PASSED engines/candidate"
        suites = ElementTree.parse(tmp_path / "parity.xml").getroot()
        assert suites.attrib["failures"] == "0" and int(suites.attrib["tests"]) > 20
        (tmp_path / "parity.xml").unlink()
    for name in ("parity.md", "step.md"):
        assert (tmp_path / name).read_text().startswith("### PASSED: fuzzed\n")
    path = tmp_path / "parity/baseline.json"
    stated = json.loads(path.read_text())
    stated["numbers"]["gates/quant_sqnr_db"]["value"] += 10
    path.write_text(json.dumps(stated))
    assert "worse than the baseline: gates/quant_sqnr_db" in shell(tmp_path, verify, code=6)


def shell(folder: Path, command: str, code: int = 0) -> str:
    """stdout of a command in the folder, where `ditc` is this tree's, with little measured."""
    script = folder / "bin/ditc"
    if not script.exists():
        script.parent.mkdir()
        lines = (
            f"#!{sys.executable}",
            "from tests.support.quick_build import shorten",
            "from pipeline.__main__ import command",
            "shorten()",
            "command()",
        )
        script.write_text("\n".join(lines))
        script.chmod(0o755)
    path = os.pathsep.join([str(script.parent), os.environ["PATH"]])
    more = {"PATH": path, "PYTHONPATH": str(readme.ROOT), "GITHUB_STEP_SUMMARY": str(folder / "step.md")}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env={**without_xdist(), **more},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr[-3000:]
    return done.stdout
