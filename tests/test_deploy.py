"""The files of deploy/: what can be checked of them without Docker and without systemd as the first process."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from pipeline.serve.__main__ import KEY_VARIABLE, make_limits, make_parser

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text()
UNIT = (ROOT / "deploy/ditc.service").read_text()
# systemd's own judgement, from 0 to 10: what it calls "OK" ends at 4.0, in tenths.
MOST_EXPOSURE = 20


def copied() -> set[str]:
    """What the image's first stage takes of this folder."""
    lines = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    return {name for line in lines for name in line.split()}


def test_the_image_is_made_of_what_the_wheel_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {pattern.removesuffix("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    modules = {f"{name}.py" for name in project["tool"]["setuptools"]["py-modules"]}
    texts = {project["project"]["readme"], "LICENSE", "pyproject.toml", "setup.py"}
    assert copied() == packages | modules | texts
    assert all((ROOT / name).exists() for name in copied())
    assert "[serve]" in DOCKERFILE and "serve" in project["project"]["optional-dependencies"]


def test_the_image_s_context_is_what_it_copies() -> None:
    first, *others = (ROOT / "deploy/Dockerfile.dockerignore").read_text().split()
    assert first == "*" and {row.removeprefix("!") for row in others if row.startswith("!")} == copied()


def test_the_image_serves_as_nobody_and_looks_after_itself() -> None:
    _, final = re.split(r"^FROM .+$", DOCKERFILE, flags=re.MULTILINE)[1:]
    assert final.index("\nUSER ditc\n") < final.index("\nENTRYPOINT ")
    program, verb, *flags = json.loads(re.findall(r"^ENTRYPOINT (.+)$", final, re.MULTILINE)[0])
    args = make_parser().parse_args(flags)
    assert (program, verb) == ("ditc", "serve") and make_limits(args)
    assert f"EXPOSE {args.port}\n" in final and f"http://127.0.0.1:{args.port}/health" in final


def command() -> list[str]:
    [line] = re.findall(r"^ExecStart=(.+)$", UNIT, re.MULTILINE)
    return shlex.split(line)


def test_the_unit_s_command_is_one() -> None:
    program, verb, *flags = command()
    args = make_parser().parse_args(flags)
    assert Path(program).name == "ditc" and verb == "serve" and make_limits(args)
    [stop_s] = re.findall(r"^TimeoutStopSec=(\d+)$", UNIT, re.MULTILINE)
    assert int(stop_s) > args.timeout and KEY_VARIABLE in UNIT


@pytest.mark.process
def test_systemd_takes_the_unit_and_finds_it_confined(tmp_path: Path) -> None:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "ditc.service"
    unit.write_text(UNIT.replace(command()[0], "/bin/true"))  # the program need not be installed here
    verified = subprocess.run([tool, "verify", "--man=no", unit], capture_output=True, text=True, check=False)
    assert verified.returncode == 0 and not verified.stderr, verified.stderr
    judged = [tool, "security", "--offline=yes", f"--threshold={MOST_EXPOSURE}", "--no-pager", unit]
    done = subprocess.run(judged, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
