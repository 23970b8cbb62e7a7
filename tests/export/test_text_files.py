"""Text files are UTF-8 whatever the locale: no call relies on it, and a whole build works in an ASCII one."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.support import original_weights, tiny

ROOT = Path(__file__).parents[2]
PACKAGES = ("export", "plugins", "pipeline", "benchmarks")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
# Opens a file in the mode of its second argument ("Path.open": of its first).
TEXT_CALLS = ("read_text", "write_text")


def calls_without_encoding(path: Path) -> Iterator[int]:
    """Line numbers of calls that read or write text in the locale's encoding."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or "encoding" in {keyword.arg for keyword in node.keywords}:
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        modes = [part.value for part in node.args if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        opens = name in ("open", "fdopen") and (isinstance(node.func, ast.Name) or bool(modes) or not node.args)
        text = name in TEXT_CALLS and isinstance(node.func, ast.Attribute) and "utf-8" not in modes
        as_text = any(part.arg == "text" and getattr(part.value, "value", None) is True for part in node.keywords)
        if text or as_text or (opens and not any("b" in mode for mode in modes)):
            yield node.lineno


@pytest.mark.parametrize(
    ("line", "held"),
    [
        ("path.read_text()", False),
        ("path.write_text(text)", False),
        ("open(path)", False),
        ("path.open()", False),
        ("path.open('w', newline='')", False),
        ("subprocess.run(command, text=True)", False),
        ("path.read_text(encoding='utf-8')", True),
        ("path.read_text('utf-8')", True),
        ("read_text(path, rules)", True),  # the reader of documents
        ("replace(call, text='single')", True),
        ("path.open('rb')", True),
        ("open(path, 'wb')", True),
        ("os.open(path, os.O_RDONLY)", True),
        ("Image.open(path)", True),
    ],
)
def test_the_rule_finds_what_it_should(tmp_path: Path, line: str, held: bool) -> None:
    (tmp_path / "a.py").write_text(line, encoding="utf-8")
    assert bool(list(calls_without_encoding(tmp_path / "a.py"))) != held


def test_every_call_names_its_encoding() -> None:
    places = [f"{path.relative_to(ROOT)}:{line}" for path in FILES for line in calls_without_encoding(path)]
    # An object of our own has a method of that name.
    assert [place for place in places if not place.startswith("plugins/tensorrt/rtx_plugin.py")] == []


DESCRIPTION = "für mich: Größe"
PLAIN = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "POSIX", "PYTHONWARNDEFAULTENCODING": "1"}


@pytest.mark.slow
@pytest.mark.torch
def test_a_build_in_an_ascii_locale_from_an_original_file(tmp_path: Path) -> None:
    """One run of all that a build reads and writes; Python warns of every text file that is opened in the locale's
    encoding. The model is a single file in PixArt's own layout."""
    folder = tiny.folder("pixart", tmp_path)
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    original = {f"module.{key}": value.half().clone() for key, value in original_weights.pixart(weights, 2).items()}
    save_file(original, tmp_path / "original.safetensors")
    lines = [
        'name = "tiny"', f'model = "{tmp_path}/original.safetensors"', f'model_config = "{folder}"',
        f'description = "{DESCRIPTION}"', "[weights]", "group_size = 32", "[calibrate]", 'method = "rtn"', "size = 2",
        "[sampling]", "n_steps = 2", "[budgets]", "quant_sqnr_db = -100.0", "final_psnr_fp_db = -100.0",
    ]  # fmt: skip
    (tmp_path / "tiny.toml").write_text("\n".join(lines), encoding="utf-8")
    command = [sys.executable, "-W", "always::EncodingWarning", "-m", "tests.support.quick_build"]
    done = subprocess.run(
        [*command, "--engine", "tiny.toml", "--target", "cpu", "-o", "engine", "-v"],
        cwd=tmp_path,
        env=os.environ | PLAIN | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=300,
        check=False,
    )
    log = done.stderr.decode()
    assert done.returncode == 0, log[-3000:]
    warned = [line for line in log.splitlines() if "EncodingWarning" in line and str(ROOT) in line]
    assert [line for line in warned if f"{ROOT}/.venv" not in line] == []
    manifest = json.loads((tmp_path / "engine" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["recipe"]["description"] == DESCRIPTION
    assert DESCRIPTION in (tmp_path / "engine" / "recipe.toml").read_text(encoding="utf-8")
    ignored = manifest["model"]["tensors"]["ignored"]
    assert list(ignored) == ["module.y_embedder.y_embedding"]
    assert manifest["model"]["tensors"]["used"] + 1 == len(original)
    assert f"{len(original) - 1} of {len(original)} tensors used, harmless and left out: module.y_embedder" in log
