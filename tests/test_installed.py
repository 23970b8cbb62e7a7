"""`pip install .`, without extras, into an empty environment: what it takes on the disk, and that it draws."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.distance import psnr_db
from pipeline.generate.__main__ import main as generate
from tests.support import pipelines
from tests.support.absent import HIDDEN
from tests.support.quick_build import build_unproven
from tests.test_alone import copy_tree

pytestmark = pytest.mark.slow  # packages are installed, and bundles are built
# The largest that site-packages may be, all that is asked for included.
MOST_BYTES = 300 * 10**6
# What tokenizers asks for; nothing imports it.
ASKED_FOR = {"huggingface_hub"}
# What pip says where there is no way to an index.
UNREACHABLE = re.compile(r"NewConnectionError|ConnectTimeout|name resolution|Network is unreachable|ProxyError")
# Equal where packages are of the same releases as here; others may flip codes, which leaves pictures alike.
ALIKE_DB = 30.0
PROMPT = "a red circle left of a blue ring on white"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that had nothing in it, not even pip."""
    folder = tmp_path_factory.mktemp("installed")
    copy_tree(folder / "tree")
    venv.create(folder / "venv", symlinks=os.name != "nt", with_pip=False)
    command = [sys.executable, "-m", "pip", "--python", folder / "venv/bin/python", "--retries", "1"]
    done = run(*command, "install", "--no-input", folder / "tree", cwd=folder)
    if done.returncode and (problem := UNREACHABLE.search(done.stdout + done.stderr)):
        pytest.skip(f"no index of packages can be reached ({problem[0]})")
    if "No module named pip" in done.stderr:
        pytest.skip("this environment has no pip")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return folder / "venv"


def run(*command: object, cwd: Path) -> Any:
    """A process that sees nothing of this tree."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    kept["DITC_CACHE"] = str(cwd / "cache")
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env=kept, capture_output=True, text=True, check=False, timeout=900)


def site_packages(environment: Path) -> Path:
    [place] = environment.glob("lib/python3.*/site-packages")
    return place


def test_it_is_small_and_has_nothing_of_the_compiler(environment: Path) -> None:
    place = site_packages(environment)
    sizes = {path: path.stat().st_size for path in place.rglob("*") if path.is_file() and not path.is_symlink()}
    assert 100 * 10**6 < sum(sizes.values()) < MOST_BYTES
    names = {path.name.partition("-")[0].removesuffix(".py") for path in place.iterdir()}
    assert {"ditc", "onnxruntime", "numpy"} <= names
    assert not names & (HIDDEN - ASKED_FOR), names


@pytest.mark.parametrize("kind", ["pixart_mini", "whole pipeline"])
def test_it_draws(kind: str, environment: Path, tmp_path: Path) -> None:
    bundle, flags = tmp_path / "bundle", ["--target", "cpu"]
    if kind == "whole pipeline":
        flags += ["-m", str(pipelines.write_wide(tmp_path / "pipeline"))]
    build_unproven(bundle, *flags)
    words = [str(bundle), "--prompt", PROMPT, "--n-steps", "4", "--seed", "3", "--threads", "1", "-o"]
    done = run(environment / "bin/ditc", "generate", *words, tmp_path / "there.png", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert generate([*words, str(tmp_path / "here.png")]) == 0
    here, there = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("here", "there"))
    assert there.shape == here.shape and np.ptp(there) > 100
    assert psnr_db(here, there, 255.0) > ALIKE_DB
