"""The page's scripts in node."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline.web import page_folder

PAGE = Path(page_folder.__file__).with_name("page")
NODE = shutil.which("node")
NEEDS_NODE = pytest.mark.skipif(NODE is None, reason="the page's scripts run in node, which is not installed")


def node(folder: Path, script: str, given: object) -> Any:
    """What a script, whose input is `given`, answers."""
    folder.mkdir(exist_ok=True)
    for path in PAGE.glob("*.js"):
        shutil.copyfile(path, folder / path.name)
    (folder / "package.json").write_text('{"type": "module"}')
    (folder / "given.json").write_text(json.dumps(given))
    text = "import { readFileSync } from 'node:fs';\nconst given = JSON.parse(readFileSync('given.json'));\n" + script
    (folder / "run.js").write_text(text)
    assert NODE is not None
    done = subprocess.run([NODE, "run.js"], cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
